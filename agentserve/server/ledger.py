"""Who asked for what, and what the cache had of it: sessions, agents, and an explanation of every miss."""

from __future__ import annotations

import logging
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from agentserve.core.memory.answers import ReadTokens
from agentserve.server.agents import AgentBook, Counts, SessionAgents
from agentserve.server.breakers import Difference
from agentserve.server.metrics import ServerMetrics
from agentserve.server.misses import Divergence, MissReason, Reading, find_divergence, num_common_tokens
from agentserve.server.prompt import TokenizedPrompt
from agentserve.server.token_history import HistoryScope, TokenHistory
from agentserve.server.types import Identity

logger = logging.getLogger("agentserve.cache")
_MAX_SESSIONS = 4096
_MAX_EXPLAINED = 2048
_MAX_READINGS = 8
"""Conversations of one session that are remembered, those of sub-agents among them."""
_CAPACITY_BYTES = 64 << 20
_MAX_BREAKERS = 16
_NUM_CHANGES, _NUM_TEXT_CHANGES = 2, 3
"""A part that changes so often in the same place is a cache breaker: once may be an edit, and texts are edited more."""


@dataclass(slots=True)
class Breaker:
    """A part of the system prompt or the tools that changes from request to request."""

    part: str
    difference: Difference
    num_changes: int = 0
    num_lost_tokens: int = 0
    """Prompt tokens behind it, over all requests."""

    @property
    def is_certain(self) -> bool:
        return self.num_changes >= (_NUM_TEXT_CHANGES if self.difference.kind == "text" else _NUM_CHANGES)

    def describe(self) -> dict[str, Any]:
        return {
            "part": self.part,
            "kind": self.difference.kind,
            "at_character": self.difference.at,
            "before": self.difference.before,
            "old": self.difference.old,
            "new": self.difference.new,
            "num_changes": self.num_changes,
            "num_lost_tokens": self.num_lost_tokens,
            "stabilize": self.difference.pattern,
        }


@dataclass(slots=True)
class _Session:
    scope: HistoryScope
    agent_id: str | None
    is_named: bool
    agents: SessionAgents
    counts: Counts = field(default_factory=Counts)
    readings: list[Reading] = field(default_factory=list)
    breakers: OrderedDict[tuple[str, str], Breaker] = field(default_factory=OrderedDict)
    num_reused_turns: int = 0
    last: dict[str, Any] | None = None
    """The explanation of its last request."""


class Trace:
    """One request on its way."""

    def __init__(
        self,
        ledger: SessionLedger,
        session: _Session,
        agent: Counts,
        prompt: TokenizedPrompt,
        request_id: str,
        *,
        adapter: str | None,
    ) -> None:
        self._ledger = ledger
        self._session = session
        self._agent = agent
        self._prompt = prompt
        self._adapter = adapter
        self.request_id = request_id
        self._is_closed = False
        self.reason: MissReason | None = None
        """Known once the request has been admitted and has ended; None if it never was."""
        self._closest, self._num_common = _closest(session.readings, prompt)
        self._under_other_salt = self._closest is None and ledger.is_known_elsewhere(prompt)
        for counts in (session.counts, agent):
            counts.num_active += 1

    def close(
        self,
        num_cached_tokens: int | None = None,
        num_output_tokens: int = 0,
        computed_ids: Sequence[int] = (),
        answer_digest: bytes | None = None,
    ) -> None:
        """The request has ended. `num_cached_tokens` is None if it was not finished: nobody knows what it computed.

        Only the first call counts.
        """
        if self._is_closed:
            return
        self._is_closed = True
        for counts in (self._session.counts, self._agent):
            counts.num_active -= 1
            counts.num_requests += 1
            counts.num_prompt_tokens += self._num_tokens
            counts.num_cached_tokens += num_cached_tokens or 0
            counts.num_output_tokens += num_output_tokens
            counts.last_used_s = time.time()
        if num_cached_tokens is not None:
            self._explain(num_cached_tokens)
        packed = self._prompt.packed + array("I", computed_ids).tobytes()
        reading = Reading(
            self.request_id,
            packed,
            self._num_tokens,
            self._prompt.conversation,
            num_cached_tokens is not None,
            answer_digest,
            self._adapter,
        )
        self._ledger.remember(self._session, reading, self._closest)

    @property
    def _num_tokens(self) -> int:
        return len(self._prompt.token_ids)

    def _explain(self, num_cached_tokens: int) -> None:
        ledger, closest = self._ledger, self._closest
        num_possible = ledger.num_reusable(self._num_common, self._num_tokens)
        divergence: Divergence | None = None
        if not ledger.has_cache:
            self.reason = MissReason.DISABLED
        elif closest is None:
            self.reason = MissReason.SALT if self._under_other_salt else MissReason.NEW_SESSION
        else:
            num_lost = min(closest.num_tokens, self._num_tokens) - self._num_common
            if num_lost >= ledger.block_size:
                divergence = find_divergence(self._prompt, closest, self._num_common, ledger.decode)
            if num_cached_tokens < num_possible:
                self.reason = MissReason.EVICTED if closest.complete else MissReason.NOT_COMPUTED
            else:
                self.reason = MissReason.NONE if divergence is None else divergence.reason
        breakers = self._note(divergence) if divergence is not None else []
        conversation = self._prompt.conversation
        self._session.num_reused_turns += 0 if conversation is None else conversation.num_reused_turns
        ledger.explained(
            self._session,
            {
                "request": self.request_id,
                "session": self._session.scope.session,
                "agent": self._session.agent_id,
                "reason": self.reason.value,
                "num_prompt_tokens": self._num_tokens,
                "num_cached_tokens": num_cached_tokens,
                "num_reusable_tokens": num_possible,
                "num_reused_turns": 0 if conversation is None else conversation.num_reused_turns,
                "compared_with": None if closest is None else closest.request_id,
                "divergence": None if divergence is None else divergence.describe(),
                "breakers": [breaker.describe() for breaker in breakers],
            },
        )
        ledger.metrics.count_miss(self.reason.value)

    def _note(self, divergence: Divergence) -> list[Breaker]:
        """Counts what has changed in the system prompt and the tools; returns what does so again and again."""
        if divergence.reason not in (MissReason.SYSTEM, MissReason.TOOLS):
            return []
        num_lost = self._num_tokens - divergence.num_common_tokens
        certain = []
        for part, difference in divergence.differences:
            breaker = self._ledger.note_change(self._session, part, difference, num_lost)
            if breaker.is_certain:
                certain.append(breaker)
        return certain


class SessionLedger:
    """All sessions that are remembered, bounded in number and bytes. Used on the event loop only."""

    def __init__(
        self,
        metrics: ServerMetrics,
        decode: Callable[[Sequence[int]], str],
        *,
        block_size: int,
        has_cache: bool = True,
        history: TokenHistory | None = None,
        capacity_bytes: int = _CAPACITY_BYTES,
    ) -> None:
        """`decode` gives the text of token ids, special ones included. Without a `has_cache` all is a miss."""
        self.metrics = metrics
        self.decode = decode
        self.block_size = block_size
        self.has_cache = has_cache
        self._history = history
        self._capacity_bytes = capacity_bytes
        self._num_bytes = 0
        self._sessions: OrderedDict[HistoryScope, _Session] = OrderedDict()
        self._agents = AgentBook()
        self._explained: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._named: set[tuple[str, str, str]] = set()

    def open(
        self, prompt: TokenizedPrompt, identity: Identity, request_id: str, *, adapter: str | None = None
    ) -> Trace:
        """A request is about to be submitted. Its trace must be closed."""
        scope = prompt.scope
        session = self._sessions.get(scope)
        if session is None:
            agents = SessionAgents(scope.session)
            session = _Session(scope, identity.agent_id, identity.session_id is not None, agents)
            self._sessions[scope] = session
        session.agent_id = identity.agent_id or session.agent_id
        self._sessions.move_to_end(scope)
        agent = self._agents.open(session.agents.name_of(identity.agent_id, prompt.token_ids), scope)
        self._forget()
        return Trace(self, session, agent, prompt, request_id, adapter=adapter)

    def sessions(self) -> list[tuple[dict[str, Any], list[ReadTokens]]]:
        """All sessions, the one used last first, and what each has read."""
        return [
            (self._describe(session), [(r.token_ids, session.scope.cache_salt, r.adapter) for r in session.readings])
            for session in reversed(self._sessions.values())
        ]

    def agents(self) -> list[dict[str, Any]]:
        """All agents, the one that asked last first."""
        return self._agents.describe()

    def explain(self, request_id: str) -> dict[str, Any] | None:
        """What the cache had of a request and why not more; None if it is not known or not over."""
        return self._explained.get(request_id)

    # ---- for traces ----

    def num_reusable(self, num_common_tokens: int, num_prompt_tokens: int) -> int:
        """Tokens of a common prefix that a cache can have: whole blocks, and never the last token of a prompt."""
        return min(num_common_tokens, max(0, num_prompt_tokens - 1)) // self.block_size * self.block_size

    def is_known_elsewhere(self, prompt: TokenizedPrompt) -> bool:
        """Whether the session has read something like it under another salt."""
        return any(
            self.num_reusable(_closest(session.readings, prompt)[1], len(prompt.token_ids)) > 0
            for scope, session in self._sessions.items()
            if scope.session == prompt.scope.session and scope.cache_salt != prompt.scope.cache_salt
        )

    def remember(self, session: _Session, reading: Reading, continued: Reading | None) -> None:
        """Keeps what was read in place of what it goes on from."""
        if self._sessions.get(session.scope) is not session:
            return  # it was forgotten meanwhile
        readings = session.readings
        if continued in readings and _goes_on(reading, continued):
            readings.remove(continued)
            self._num_bytes -= continued.num_bytes
        readings.append(reading)
        self._num_bytes += reading.num_bytes
        if len(readings) > _MAX_READINGS:
            self._num_bytes -= readings.pop(0).num_bytes
        self._forget()

    def note_change(self, session: _Session, part: str, difference: Difference, num_lost_tokens: int) -> Breaker:
        """Counts a change of a part in its place, and says so once if it is not the first one there."""
        key = (part, difference.place)
        breaker = session.breakers.setdefault(key, Breaker(part, difference))
        session.breakers.move_to_end(key)
        if len(session.breakers) > _MAX_BREAKERS:
            session.breakers.popitem(last=False)
        breaker.difference = difference
        breaker.num_changes += 1
        breaker.num_lost_tokens += num_lost_tokens
        name = (session.scope.session, *key)
        if breaker.is_certain and name not in self._named and len(self._named) < _MAX_SESSIONS:
            self._named.add(name)
            self.metrics.count_breaker(difference.kind)
            logger.warning(
                "session %s: the %s changes from request to request at character %d (%s: %r, then %r, behind %r), so "
                "all %d tokens behind it are read again.%s",
                session.scope.session,
                "system prompt" if part == "system" else "list of tools",
                difference.at,
                difference.kind,
                difference.old,
                difference.new,
                difference.before[-24:],
                num_lost_tokens,
                f" --stabilize {difference.pattern!r} freezes it." if difference.pattern else "",
            )
        return breaker

    def explained(self, session: _Session, explanation: dict[str, Any]) -> None:
        session.last = explanation
        self._explained.pop(explanation["request"], None)
        self._explained[explanation["request"]] = explanation
        if len(self._explained) > _MAX_EXPLAINED:
            self._explained.popitem(last=False)

    # ---- details ----

    def _forget(self) -> None:
        """Makes room: the session that was used longest ago goes first, those with open requests last."""
        while len(self._sessions) > 1 and (
            len(self._sessions) > _MAX_SESSIONS or self._num_bytes > self._capacity_bytes
        ):
            _, session = self._sessions.popitem(last=False)
            self._num_bytes -= sum(reading.num_bytes for reading in session.readings)
            session.readings.clear()

    def _describe(self, session: _Session) -> dict[str, Any]:
        num_turns, num_bytes = (0, 0) if self._history is None else self._history.held_by(session.scope)
        last = session.last
        return {
            "session": session.scope.session,
            "is_named": session.is_named,
            "has_salt": session.scope.cache_salt is not None,
            "agent": session.agent_id,
            "agents": session.agents.names,
            **session.counts.describe(),
            "num_conversations": len(session.readings),
            "token_history": {
                "enabled": self._history is not None,
                "num_turns": num_turns,
                "num_bytes": num_bytes,
                "num_reused_turns": session.num_reused_turns,
            },
            "last_request": None if last is None else last["request"],
            "last_reason": None if last is None else last["reason"],
            "breakers": [breaker.describe() for breaker in session.breakers.values() if breaker.is_certain],
        }


def _closest(readings: Sequence[Reading], prompt: TokenizedPrompt) -> tuple[Reading | None, int]:
    """What the prompt has most in common with, the same conversation before others, and how many tokens."""
    best: Reading | None = None
    best_key = (False, -1)
    name = None if prompt.conversation is None else prompt.conversation.name
    for reading in readings:
        same = reading.conversation is not None and reading.conversation.name == name
        key = (same, num_common_tokens(reading.packed, prompt.packed))
        if key >= best_key:  # of equals the later one
            best, best_key = reading, key
    return best, max(0, best_key[1])


def _goes_on(reading: Reading, before: Reading) -> bool:
    """Whether the one replaces the other: it is the same conversation, or begins with it."""
    if reading.conversation is not None and before.conversation is not None:
        return reading.conversation.name == before.conversation.name
    return reading.packed.startswith(before.packed)
