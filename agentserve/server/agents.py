"""Agents as the server sees them: by the name that they give, else by session and by how their prompts begin."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from agentserve.core.agents.fingerprint import fingerprint
from agentserve.server.token_history import HistoryScope

_MAX_AGENTS = 4096
_MAX_SESSIONS = 4096
"""Of one agent that are counted."""
_MAX_SESSION_AGENTS = 32
"""Of one session that are told apart: more of them are no agents, but a system prompt that changes all the time."""


@dataclass(slots=True)
class Counts:
    """What a session or an agent has asked for."""

    num_requests: int = 0
    num_active: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    last_used_s: float = 0.0
    """Unix time."""

    def describe(self) -> dict[str, Any]:
        hit_ratio = self.num_cached_tokens / self.num_prompt_tokens if self.num_prompt_tokens else None
        return {
            "num_requests": self.num_requests,
            "num_active": self.num_active,
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_cached_tokens": self.num_cached_tokens,
            "num_output_tokens": self.num_output_tokens,
            "hit_ratio": hit_ratio,
            "last_used": self.last_used_s,
        }


class SessionAgents:
    """Who makes the calls of one session."""

    def __init__(self, session: str) -> None:
        self._session = session
        self._by_fingerprint: dict[str, str] = {}
        self._names: dict[str, None] = {}

    @property
    def names(self) -> list[str]:
        """In the order in which they came."""
        return list(self._names)

    def name_of(self, agent_id: str | None, token_ids: Sequence[int]) -> str:
        """The agent that sends a prompt; `agent_id` is what it calls itself, if it does.

        Without a name it is whose prompts begin alike; the first such agent of a session has the session's name.
        """
        mark = fingerprint(token_ids)
        name = agent_id
        if name is None and mark is not None:
            name = self._by_fingerprint.get(mark)
        if name is None:
            is_first = not self._by_fingerprint or mark is None or len(self._by_fingerprint) == _MAX_SESSION_AGENTS
            name = next(iter(self._names), self._session) if is_first else f"{self._session}{mark}"
        if mark is not None and len(self._by_fingerprint) < _MAX_SESSION_AGENTS:
            self._by_fingerprint.setdefault(mark, name)
        if len(self._names) < _MAX_SESSION_AGENTS:
            self._names[name] = None
        return name


@dataclass(slots=True)
class _Agent:
    counts: Counts = field(default_factory=Counts)
    sessions: set[HistoryScope] = field(default_factory=set)


class AgentBook:
    """What each agent has asked for. Bounded: who asked longest ago is forgotten first."""

    def __init__(self) -> None:
        self._agents: OrderedDict[str, _Agent] = OrderedDict()

    def open(self, name: str, scope: HistoryScope) -> Counts:
        """An agent is about to ask in a session: where that is counted."""
        agent = self._agents.setdefault(name, _Agent())
        self._agents.move_to_end(name)
        if len(agent.sessions) < _MAX_SESSIONS:
            agent.sessions.add(scope)
        if len(self._agents) > _MAX_AGENTS:
            self._agents.popitem(last=False)
        return agent.counts

    def describe(self) -> list[dict[str, Any]]:
        """All agents, the one that asked last first."""
        return [
            {"agent": name, "num_sessions": len(agent.sessions), **agent.counts.describe()}
            for name, agent in reversed(self._agents.items())
        ]
