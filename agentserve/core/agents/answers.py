"""Whether prompts go on with the answers before them: some clients leave out thoughts, or write tool calls anew."""

from __future__ import annotations

from collections import OrderedDict

from agentserve.core.agents.registry import MAX_SESSIONS, Session
from agentserve.core.request import Request

MIN_REUSE = 0.2
"""Answers that come back less often than this are not worth keeping."""
_NEW = 0.25
"""Weight of the latest call."""
_MAX_AGENTS = 4096


class AnswerReuse:
    """How often the blocks of an agent's answers are a part of its next prompt. Each call costs O(block)."""

    def __init__(self) -> None:
        self._rates: OrderedDict[str, float] = OrderedDict()
        self._num_prompt_tokens: OrderedDict[str, int] = OrderedDict()
        """Of the last call that ended, by session."""

    def asked(self, session: Session, agent: str, request: Request) -> None:
        """A call has come: looks at the first block behind the prompt before."""
        num_tokens, path = self._num_prompt_tokens.get(session.session_id), session.blocks.path
        if num_tokens is None or not path:
            return
        size = len(path[0].key)
        index = num_tokens // size
        end = (index + 1) * size
        if len(path) <= index or request.num_prompt_tokens < end:
            return  # the answer did not fill a block, or this prompt does not reach it
        came_back = tuple(request.token_ids[index * size : end]) == path[index].key
        rate = self._rates.get(agent, 1.0)
        self._rates[agent] = rate + _NEW * (came_back - rate)
        self._rates.move_to_end(agent)
        if len(self._rates) > _MAX_AGENTS:
            self._rates.popitem(last=False)

    def answered(self, session: Session, request: Request) -> None:
        """A call has ended."""
        known = self._num_prompt_tokens
        known[session.session_id] = request.num_prompt_tokens
        known.move_to_end(session.session_id)
        if len(known) > MAX_SESSIONS:
            known.popitem(last=False)

    def come_back(self, agent: str) -> bool:
        """Whether what an agent has been answered is worth keeping."""
        return self._rates.get(agent, 1.0) >= MIN_REUSE
