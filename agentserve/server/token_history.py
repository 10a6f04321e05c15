"""The token ids of answers, kept to be read again when their client sends them back.

A template that writes an old answer anew breaks the prefix: the client has dropped the reasoning, a call is written
with other spaces, a text is cut into other tokens than the model's own. With the ids that were generated it does not.
"""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

DEFAULT_CAPACITY_BYTES = 64 << 20
_ENTRY_BYTES = 400
"""What an answer costs besides its token ids, about."""


@dataclass(frozen=True, slots=True)
class HistoryScope:
    """Answers are found again only by requests of the same scope."""

    session: str
    cache_salt: str | None = None


@dataclass(frozen=True, slots=True)
class StoredTurn:
    """An answer as it was read and written."""

    opening: str
    """What the prompt had behind the header of the assistant's turn, such as a tag that opens the reasoning."""
    token_ids: Sequence[int]
    """As they were generated, without the token that ended the turn."""

    @property
    def num_bytes(self) -> int:
        return _ENTRY_BYTES + 4 * len(self.token_ids) + 4 * len(self.opening)


@dataclass(slots=True)
class _Session:
    turns: OrderedDict[bytes, StoredTurn] = field(default_factory=OrderedDict)
    num_bytes: int = 0


@dataclass(frozen=True, slots=True)
class HistoryStats:
    """How much is kept, and how often it was used."""

    num_sessions: int
    num_turns: int
    num_bytes: int
    num_stored_turns: int
    """Since the start, as the two below."""
    num_reused_turns: int
    num_evicted_turns: int


class TokenHistory:
    """Answers by scope and by the digest of the conversation up to and with them. May be used from any thread.

    Bounded by bytes: the session that was used longest ago goes first, as a whole, since an answer in the middle of a
    conversation is worth nothing when the one before it is gone.
    """

    def __init__(self, capacity_bytes: int = DEFAULT_CAPACITY_BYTES) -> None:
        self._capacity_bytes = capacity_bytes
        self._lock = threading.Lock()
        self._sessions: OrderedDict[HistoryScope, _Session] = OrderedDict()
        self._num_bytes = 0
        self._num_stored = self._num_reused = self._num_evicted = 0

    def store(self, scope: HistoryScope, digest: bytes, opening: str, token_ids: Sequence[int]) -> None:
        """Keeps an answer; a later one of the same digest replaces it."""
        turn = StoredTurn(opening, array("I", token_ids))
        if turn.num_bytes > self._capacity_bytes:
            return
        with self._lock:
            session = self._sessions.setdefault(scope, _Session())
            self._sessions.move_to_end(scope)
            replaced = session.turns.pop(digest, None)
            session.turns[digest] = turn
            self._grow(session, turn.num_bytes - (0 if replaced is None else replaced.num_bytes))
            self._num_stored += 1
            self._make_room()

    def find(self, scope: HistoryScope, digests: Sequence[bytes]) -> dict[int, StoredTurn]:
        """Those of `digests`, by their index, that are known in the scope. Counts as a use of the session."""
        with self._lock:
            session = self._sessions.get(scope)
            if session is None:
                return {}
            self._sessions.move_to_end(scope)
            return {index: session.turns[key] for index, key in enumerate(digests) if key in session.turns}

    def count_reused(self, num_turns: int) -> None:
        """Counts answers that a prompt was made with."""
        with self._lock:
            self._num_reused += num_turns

    def held_by(self, scope: HistoryScope) -> tuple[int, int]:
        """Answers and bytes that are kept of a session."""
        with self._lock:
            session = self._sessions.get(scope)
            return (0, 0) if session is None else (len(session.turns), session.num_bytes)

    def stats(self) -> HistoryStats:
        with self._lock:
            num_turns = sum(len(session.turns) for session in self._sessions.values())
            return HistoryStats(
                len(self._sessions), num_turns, self._num_bytes, self._num_stored, self._num_reused, self._num_evicted
            )

    def _grow(self, session: _Session, num_bytes: int) -> None:
        session.num_bytes += num_bytes
        self._num_bytes += num_bytes

    def _make_room(self) -> None:
        while self._num_bytes > self._capacity_bytes and len(self._sessions) > 1:
            _, session = self._sessions.popitem(last=False)
            self._num_bytes -= session.num_bytes
            self._num_evicted += len(session.turns)
        for session in self._sessions.values():  # the last one, if it alone is too much: its oldest answers go
            while self._num_bytes > self._capacity_bytes:
                _, turn = session.turns.popitem(last=False)
                self._grow(session, -turn.num_bytes)
                self._num_evicted += 1
