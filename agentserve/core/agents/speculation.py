"""Next prompts, computed before they come: while a tool runs, what its session's next prompt begins with is known.

It is the conversation with the answer in it, up to the result of the tool. Most of it is cached. What is not, because
it was evicted, is written in another way than it was generated, or is the end of the turn, is computed in pieces while
nobody waits for a prompt. A piece is a prompt that nobody waits for: it takes free blocks and those of what is worth
less, ends as soon as it is in anybody's way, and what it has computed is cached like anything else. Between two pieces
nothing is held.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from agentserve.core.agents.policy import TurnEvent, TurnKind
from agentserve.core.agents.ports import IdleLanes
from agentserve.core.agents.registry import Session
from agentserve.core.events import Speculate
from agentserve.core.memory.eviction import Key, Rank, lru_key
from agentserve.core.memory.load_queue import urgency_at
from agentserve.core.memory.manager import MemoryManager
from agentserve.core.memory.radix import RadixNode
from agentserve.core.request import Request, SamplingParams

MAX_TURNS = 64
"""Sessions whose next prompts are remembered, those whose calls ended last. With more of them no device is idle."""
_MAX_LOOKS = 4
"""Prompts that are looked up in one step at most."""
_URGENT = urgency_at(0.0)
_NO_SAMPLING = SamplingParams(max_tokens=1)
_PLACEHOLDER = 0
"""Stands for the first token that is not known: a prompt ends with a token whose KV is not in the cache."""

Question = Callable[[Session, int, int, int], int]
"""`Policy.speculates`."""


@dataclass(slots=True, eq=False)
class _Turn:
    """A session whose call has ended."""

    session: Session
    request_id: str
    """The call that ended. No more of it is kept: a prompt is large, and would be freed in some later step."""
    cache_salt: str | None
    adapter: str | None
    last_access: int
    """Logical time of its end: what was used before is worth less, if nobody says anything else."""
    token_ids: tuple[int, ...] = ()
    """Whole blocks that its next prompt begins with, and a placeholder; empty: not known yet."""
    num_left: int = 0
    """Tokens that may still be computed."""
    last: RadixNode | None = None
    """The last cached block of them, when somebody looked."""
    is_refused: bool = False
    """Whether there was no room."""
    is_due: bool = False
    is_over: bool = False
    start: int = 0
    """Where the first piece began."""
    end: int = 0
    """Where the last one ended, so far."""
    num_computed: int = 0


class SpeculationQueue:
    """Whose next prompt is to be completed. Costs nothing per token, and O(`MAX_TURNS`) when a call ends."""

    def __init__(self, memory: MemoryManager, max_tokens: int, ask: Question) -> None:
        """`max_tokens`: between two calls of a session at most; `ask`: how many the policy wants in a piece."""
        self._memory = memory
        self._max_tokens = max_tokens
        self._ask = ask
        self._turns: dict[str, _Turn] = {}
        """By session; the one that ended last comes last."""
        self._early: dict[str, tuple[int, ...]] = {}
        """What comes after calls that have not ended yet, by request."""
        self._due: deque[_Turn] = deque()
        """To be looked at. The first one may have a piece under way."""
        self._awaited: dict[str, _Turn] = {}
        """Calls that have come and wait for memory, by request: what was computed for them is used or wasted then."""
        self._is_stale = False
        """Whether a call has ended since: there may be room, and blocks may be gone."""
        self._is_stopped = False
        self._num_pieces = 0
        self.num_tokens = 0
        """Tokens that were computed though nobody had asked for them yet."""
        self.num_used_tokens = 0
        """Those of them that the next call of their session has found in the cache."""
        self.num_wasted_tokens = 0
        """Those that it has not, or for which no call came while they were remembered. The others are still open."""

    @property
    def has_due(self) -> bool:
        """Whether `start` has something to look at."""
        return self._is_stale or bool(self._due)

    def stop(self) -> None:
        """The policy has failed: nothing is started any more."""
        self._is_stopped = True
        for turn in self._turns.values():
            self._forget(turn)
        self._turns.clear()
        self._early.clear()
        self._due.clear()

    # ---- what happens ----

    def predicted(self, command: Speculate, session: Session | None, *, is_open: bool) -> None:
        """Takes what the next prompt behind a call begins with.

        Args:
            command: says so.
            session: whose latest call this was; None, or one that has called since, is ignored.
            is_open: whether the call has not ended yet: then it counts when it has.
        """
        if self._is_stopped:
            return
        if is_open:
            self._early[command.request_id] = command.token_ids
            return
        turn = None if session is None else self._turns.get(session.session_id)
        if turn is not None and turn.request_id == command.request_id:
            self._take(turn, command.token_ids)

    def counts(self) -> dict[str, int]:
        """Tokens since the start."""
        return {
            "tokens_speculated": self.num_tokens,
            "tokens_speculated_used": self.num_used_tokens,
            "tokens_speculated_wasted": self.num_wasted_tokens,
        }

    def observe(self, event: TurnEvent) -> None:
        """Called for everything that happens to a call, in order."""
        if event.kind is TurnKind.SUBMITTED:
            turn = self._turns.pop(event.session.session_id, None)
            if turn is not None:
                turn.is_over = True
                self._awaited[event.request.request_id] = turn
        elif event.kind is TurnKind.ADMITTED:
            self._settle(event.request, event.request.num_cached_tokens)
        elif event.kind is TurnKind.FINISHED:
            self._settle(event.request, 0)
            self._ended(event.session, event.request)

    def computed(self, start: int, end: int) -> None:
        """Books tokens of the piece under way, by their places in the prompt."""
        self.num_tokens += end - start
        turn = self._due[0] if self._due else None
        if turn is None or (turn.is_over and turn not in self._awaited.values()):
            self.num_wasted_tokens += end - start  # nobody will find them, or has done without
            return
        if not turn.num_computed:
            turn.start = start
        turn.num_computed += end - start
        turn.num_left -= end - start
        turn.end = max(turn.end, end)

    # ---- pieces ----

    def start(self, now_ns: int, lanes: IdleLanes, *, has_sessions: bool) -> None:
        """Starts a piece if nothing is in its way. `has_sessions`: blocks are to belong to their sessions."""
        if not self.has_due or not lanes.may_speculate:
            return
        if self._is_stale:
            self._is_stale = False
            for turn in self._turns.values():
                if turn.is_refused or (turn.last is not None and not turn.last.is_in_tree):
                    self._enqueue(turn)
        for _ in range(_MAX_LOOKS):
            while self._due and self._due[0].is_over:
                self._due.popleft()
            if not self._due:
                return
            turn = self._due[0]
            request = self._piece(turn, now_ns, lanes.num_seqs)
            if request is not None:
                request.session_blocks = turn.session.blocks if has_sessions else None
                if lanes.speculate(request):
                    return
                turn.is_refused = True
            self._due.popleft()
            turn.is_due = False

    def _piece(self, turn: _Turn, now_ns: int, num_seqs: int) -> Request | None:
        """The next piece of a prompt; None if all of it is there, is not worth it, or has no room."""
        memory, size, token_ids, salt = self._memory, self._memory.block_size, turn.token_ids, turn.cache_salt
        match = memory.match_prefix(token_ids, salt=salt)
        turn.last, first = match.last, match.num_tokens
        # What somebody computes or loads just now is there later.
        turn.is_refused = match.pending_owner is not None
        num_missing = len(token_ids) - 1 - first
        if turn.is_refused or num_missing <= 0:
            return None
        asked = self._ask(turn.session, first, num_missing + turn.num_computed, now_ns)
        wanted = min(max(asked, size) if asked > 0 else 0, num_missing, turn.num_left) // size
        if wanted < 1 or memory.loadable(token_ids[: first + wanted * size], salt=salt, urgency=_URGENT):
            return None  # a lower tier has it: its call loads it sooner than anybody computes it
        num_evicted, spare = memory.num_evicted_blocks, memory.num_available_blocks - num_seqs
        # One block more than is computed: a prompt has a token behind what is cached.
        num_free = memory.make_room_before(wanted + 1, self._worth(turn), counts_use=True)
        num_new = min(wanted + 1, spare, num_free)
        has_moved = memory.num_evicted_blocks != num_evicted and memory.match_prefix(token_ids, salt=salt) != match
        if num_new < 2 or has_moved:
            turn.is_refused = True
            return None
        self._num_pieces += 1
        return Request(
            request_id=f"\0speculation/{self._num_pieces}",
            prompt_token_ids=(*token_ids[: first + (num_new - 1) * size], _PLACEHOLDER),
            sampling=_NO_SAMPLING,
            arrival_ns=now_ns,
            sequence=self._num_pieces,
            agent_id=turn.session.agent_id,
            session_id=turn.session.session_id,
            priority=sys.maxsize,
            cache_salt=salt,
            adapter=turn.adapter,
        )

    def _worth(self, turn: _Turn) -> Key:
        """What the session's blocks are worth: nothing that is worth as much is evicted for them."""
        order, group = self._memory.order, turn.session.blocks.group
        if group.is_pinned:
            return (Rank.SHARED,)  # more than what other sessions have, and less than what they share
        if group is not order.common:
            return group.key
        return (Rank.PRIVATE, turn.last_access) if order.block_key is lru_key else (Rank.PRIVATE,)

    # ---- books ----

    def _take(self, turn: _Turn, token_ids: tuple[int, ...]) -> None:
        num_tokens = len(token_ids) // self._memory.block_size * self._memory.block_size
        if 1 <= num_tokens < self._memory.num_blocks * self._memory.block_size:
            turn.token_ids = (*token_ids[:num_tokens], _PLACEHOLDER)
            turn.num_left = self._max_tokens
            self._enqueue(turn)

    def _enqueue(self, turn: _Turn) -> None:
        if not turn.is_due and turn.token_ids:
            turn.is_due = True
            self._due.append(turn)

    def _ended(self, session: Session, request: Request) -> None:
        token_ids = self._early.pop(request.request_id, None)
        self._is_stale = not self._is_stopped
        if self._is_stopped or not session.is_idle or session.is_last_turn:
            return
        turn = self._turns[session.session_id] = _Turn(
            session, request.request_id, request.cache_salt, request.adapter, self._memory.last_access
        )
        if token_ids is not None:
            self._take(turn, token_ids)
        if len(self._turns) > MAX_TURNS:
            self._forget(self._turns.pop(next(iter(self._turns))))

    def _settle(self, request: Request, num_cached_tokens: int) -> None:
        """Books what was computed for a call that has got its memory, or never will."""
        turn = self._awaited.pop(request.request_id, None)
        if turn is not None:
            num_used = min(turn.num_computed, max(0, min(num_cached_tokens, turn.end) - turn.start))
            self.num_used_tokens += num_used
            self.num_wasted_tokens += turn.num_computed - num_used

    def _forget(self, turn: _Turn) -> None:
        turn.is_over = True
        self.num_wasted_tokens += turn.num_computed

    def check_invariants(self) -> None:
        """Raises AssertionError if a token or a turn is counted twice or not at all."""
        held = [*self._turns.values(), *self._awaited.values()]
        num_open = sum(turn.num_computed for turn in held)
        assert self.num_tokens == self.num_used_tokens + self.num_wasted_tokens + num_open, "tokens were lost"
        assert len({id(turn) for turn in self._due}) == len(self._due), "a turn is due twice"
        assert all(turn.is_due for turn in self._due), "a turn is due that does not know it"
        for session_id, turn in self._turns.items():
            assert turn.session.session_id == session_id and not turn.is_over, f"{session_id}: its turn is over"
            assert turn.session.is_idle, f"{session_id} has called, and its next prompt is still speculated about"
