"""The books of a scheduler: the queues, the lanes, what is in flight, and who holds memory.

Each lane has at most one batch in flight, the decode lane two if it looks ahead.
"""

from __future__ import annotations

from collections.abc import Callable

from agentserve.config import EngineConfig
from agentserve.core.batch import Batch, BatchOutput, Lane, OpenPrompts
from agentserve.core.controllers import Controller, Decision
from agentserve.core.events import EngineEvent, RequestPreempted
from agentserve.core.memory.manager import MemoryManager
from agentserve.core.queues import RankedQueue, rank
from agentserve.core.request import Request, RequestStatus
from agentserve.core.scheduler.observer import LaneObserver
from agentserve.core.scheduler.speculation import SpeculationSlot
from agentserve.core.slots import PartitionTable

_NUM_LANES = len(Lane)
# Looking up a member of an enumeration costs as much as a call.
_DECODE = Lane.DECODE
_RUNNING = RequestStatus.RUNNING
_MOST_VACANT = 4
"""No place is vacated while so many wait for what is loaded into them: about what a link loads during one batch."""


class Books:
    """What happened, as far as schedulers need to know. They all keep the same books."""

    def __init__(
        self, config: EngineConfig, memory: MemoryManager, table: PartitionTable, controller: Controller | None = None
    ) -> None:
        self._config = config
        self._memory = memory
        self._table = table
        self._controller = controller
        self.waiting = RankedQueue()
        self.running = RankedQueue()
        self._reading = RankedQueue()
        """Those of `running` whose prompt is not computed yet."""
        self._decoding = RankedQueue()
        """The others."""
        self.speculation = SpeculationSlot(memory, self._give_back)
        """What is computed although nobody waits for it."""
        self.in_flight: dict[Lane, Batch] = {}
        """The batch that each busy lane is running."""
        self.ahead: Batch | None = None
        """The batch that the decode lane runs after that one, if the scheduler looks ahead."""
        self._last_continuable = (-1, False)
        """A batch by id, and whether another one may follow it before its tokens are known."""
        self._draining: set[str] = set()
        """Requests that have ended but are in the batch `ahead`, which still writes to their blocks."""
        self.decision: Decision | None = None
        """How the device is shared at present, if a controller decides that."""
        self.shape_batch: Callable[[OpenPrompts], int] | None = None
        """How many tokens of prompts a batch is to read, if a policy has a say in that."""
        self._observer = None if controller is None else LaneObserver()
        """What the controller is told of; nobody else asks."""
        self._waits_for: dict[str, str] = {}
        """Waiting request -> the request that computes the prefix it needs; asked again when that one moves on."""
        self._refused: tuple[str, int, int, int] | None = None
        """Who got no memory, and the state of things then: asking again is not free for a long prompt."""
        self._loading: set[str] = set()
        """Running requests whose blocks are being filled from a lower tier; they count as in flight."""
        self._ended: list[str] = []
        self._num_batches = 0
        self.num_preemptions = 0
        self._slice_ns = config.time_slice_ns or 0
        """How long a request may run before it gives way to others; 0: until it ends."""
        self.num_prefix_query_tokens = 0
        self.num_prefix_hit_tokens = 0
        if memory.residency is not None:
            memory.residency.num_queued_tokens = self._num_unread_tokens

    # ---- what the engine tells ----

    def prefix_moved(self, owner_id: str) -> None:
        """Blocks of `owner_id` became ready or vanished: those who wait for them may look again."""
        self._refused = None
        if self._waits_for:
            self._waits_for = {w: owner for w, owner in self._waits_for.items() if owner != owner_id}

    def prefill_advanced(self, request: Request) -> None:
        """A chunk of a prompt was computed: it may have been the last one."""
        if not request.is_prefilling:
            self._reading.remove(request)
            self._decoding.add(request)
        self.prefix_moved(request.request_id)

    def batch_done(self, output: BatchOutput) -> frozenset[str]:
        """Takes a batch that is done out of its lane, and tells the controller what became of it.

        Returns the requests of the batch that follows it in the lane, if one was made ahead: they stay in flight.
        """
        batch = self.in_flight.pop(output.lane)
        if self._observer is not None and self._controller is not None:
            observation = self._observer.finished(batch, output)
            if output.error is None:
                self._controller.observe(observation)
        still_flying: frozenset[str] = frozenset()
        if output.lane is _DECODE and self.ahead is not None:
            self._begin(self.ahead, output.finished_ns)
            self.ahead = None
            still_flying = frozenset([chunk.request_id for chunk in self.in_flight[_DECODE].chunks])
        return still_flying

    def _begin(self, batch: Batch, now_ns: int) -> None:
        """A lane runs this batch now."""
        self.in_flight[batch.lane] = batch
        if self._observer is not None:
            self._observer.started(batch, now_ns)

    def drained(self, request_id: str) -> None:
        """A batch is done that was made for a request before it ended."""
        self._draining.remove(request_id)
        self._give_back(request_id)

    def loaded(self, request: Request) -> None:
        """What was being loaded for a request is there, as far as it comes at all."""
        self._loading.remove(request.request_id)
        request.in_flight = False
        self.prefix_moved(request.request_id)

    def load_aborted(self, request: Request) -> bool:
        """Cuts short what is being loaded for a request; whether nothing is written to its blocks any more."""
        if request.request_id not in self._loading or not self._memory.abort_load(request.request_id):
            return False
        self.loaded(request)
        return True

    def drop(self, request: Request) -> None:
        """Takes a request that ends out of its queue and gives its blocks back, as soon as nobody writes to them."""
        if request.status is _RUNNING:
            self._stop(request)
            if request.in_flight:
                self._draining.add(request.request_id)
            else:
                self._release(request)
        else:
            self.waiting.remove(request)
            self._waits_for.pop(request.request_id, None)
            if self._memory.adapters is not None:
                self._memory.adapters.cancel(request)

    # ---- what order policies do ----

    def reprioritize(self, request: Request, key: tuple[float, ...]) -> bool:
        """Gives a request that waits another place; whether it comes before one now that arrived before it."""
        self.waiting.remove(request)
        request.order_key = key
        return self.waiting.add(request)

    def forget_order(self) -> None:
        """All go in the order of their arrival again."""
        for queue in (self.waiting, self.running):
            for request in queue:
                request.order_key = ()
        for queue in (self.waiting, self.running, self._reading, self._decoding):
            queue.sort()

    def _num_unread_tokens(self) -> int:
        """Tokens of prompts that are to be computed, without what is being loaded."""
        residency = self._memory.residency
        assert residency is not None, "there are no tiers"
        return sum(r.num_remaining_prefill_tokens for r in self._reading if not residency.is_loading(r.request_id))

    def num_claimed_blocks(self) -> int:
        """Blocks that requests may need which have come: all of those that wait, one more of each that runs."""
        size = self._config.block_size
        return len(self.running) + sum(-(-len(request.token_ids) // size) for request in self.waiting)

    # ---- what nobody waits for ----

    @property
    def num_seqs(self) -> int:
        """All that hold blocks."""
        return len(self.running) + len(self._draining) + (self.speculation.request is not None)

    @property
    def may_speculate(self) -> bool:
        """Whether no prompt waits or is read, and there is room for one more."""
        is_free = self.speculation.request is None and not self.waiting and not self._reading
        return is_free and self.num_seqs < self._config.max_num_seqs

    def speculate(self, request: Request) -> bool:
        """Starts a piece of a prompt that nobody waits for; False if it has to be tried later."""
        return self.speculation.start(request)

    def speculated(self, num_computed_tokens: int | None) -> None:
        """A batch with the piece is done. It goes on if nobody needs the lanes; None: the batch has failed."""
        slot = self.speculation
        assert slot.request is not None, "nothing is under way"
        slot.request.in_flight = False
        if num_computed_tokens is None:
            slot.end()
            return
        slot.advanced(num_computed_tokens)
        if self.waiting or self._reading:
            slot.give_way()

    # ---- memory pressure ----

    def _has_blocks(self, request: Request, num_tokens: int) -> bool:
        """Whether a request that decodes has blocks for so many tokens, or gets one more at once."""
        if num_tokens <= request.num_block_tokens:
            return True
        block_ids = self._memory.blocks_for(request.request_id, num_tokens)
        if block_ids is None:
            return False
        request.block_ids, request.num_block_tokens = block_ids, len(block_ids) * self._memory.block_size
        return True

    def _grow(self, request: Request, num_tokens: int, now_ns: int, events: list[EngineEvent]) -> bool:
        """Makes room for so many tokens of a request, by preemption if need be. False: it does not run this time."""
        while not self._has_blocks(request, num_tokens):
            residency = self._memory.residency
            if residency is not None and residency.is_freeing:
                return False  # blocks are on their way down: when they are free, that wakes us
            if self.speculation.request is not None:
                if not self.speculation.give_way():
                    return False  # its batch wakes us
                continue
            victim = self._victim(request)
            if victim is not None:
                self._preempt(victim, now_ns, events)
            elif any(rank(other) > rank(request) for other in self.running):
                # Those behind it are in flight: they can be preempted when their batch is done, which wakes us.
                return False
            else:
                self._preempt(request, now_ns, events)
                return False
        return True

    def _victim(self, request: Request) -> Request | None:
        """The last in rank that is not in flight, if it comes after `request`."""
        for other in reversed(self.running):
            if rank(other) <= rank(request):
                return None
            if not other.in_flight:
                return other
        return None

    def _make_way(self, refused: Request, now_ns: int, events: list[EngineEvent]) -> bool:
        """Takes its place from a request that has run for its time slice, for one that has used up fewer; whether there
        was one.

        Multi-level feedback (FastServe, Wu et al. 2023, section 4): the level of a request is how many slices it has
        used up, and each level's slice is twice as long as that of the level before it. Few places are vacated at a
        time: until what the next ones need is loaded, nobody has any use for more.
        """
        adapters, residency = self._memory.adapters, self._memory.residency
        if not self._slice_ns or self._draining:
            return False  # who drains gives its place back in a moment
        num_vacant = len(self._loading)
        lacking = None if adapters is None or adapters.admits(refused, set()) else adapters
        if lacking is not None:
            num_vacant += lacking.num_idle_slots
        elif self.num_seqs < self._config.max_num_seqs and residency is not None and residency.is_freeing:
            return False  # what it lacks is blocks, and there will be more
        if num_vacant >= _MOST_VACANT:
            return False
        for victim in reversed(self.running):
            if victim.priority < refused.priority:
                break
            if victim.in_flight or victim.is_prefilling or not self._is_ahead(victim, refused, now_ns):
                continue
            if lacking is None or lacking.holds_slot_alone(victim):
                self._preempt(victim, now_ns, events, num_slices=self._num_slices(victim, now_ns))
                return True
        return False

    def _is_ahead(self, request: Request, other: Request, now_ns: int) -> bool:
        """Whether a request that runs has used up more slices than another one, and not run just now and then."""
        least = max(1, (2 << other.num_slices) - (1 << request.num_slices))
        return now_ns - request.runs_since_ns >= least * self._slice_ns

    def _num_slices(self, request: Request, now_ns: int) -> int:
        """How many slices a request that runs has used up."""
        count, left_ns = request.num_slices, now_ns - request.runs_since_ns
        while left_ns >= self._slice_ns << count:
            left_ns -= self._slice_ns << count
            count += 1
        return count

    def _preempt(
        self, request: Request, now_ns: int, events: list[EngineEvent], *, num_slices: int | None = None
    ) -> None:
        """Takes the blocks of a request; it is computed again when there is room (what stays cached is a hit).

        `num_slices`: time slices that it has used up by now; None: they are not what this is about.
        """
        self._stop(request)
        self._release(request)
        if num_slices is not None:
            request.num_slices = num_slices
        request.status = RequestStatus.WAITING
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.add(request)
        if self._memory.adapters is not None:
            self._memory.adapters.on_request(request)
        events.append(RequestPreempted(request.request_id, now_ns))

    def _stop(self, request: Request) -> None:
        """Takes a request out of the queues of those that run."""
        self.running.remove(request)
        (self._reading if request.is_prefilling else self._decoding).remove(request)

    def _release(self, request: Request) -> None:
        assert not request.in_flight, "blocks that a batch may still write to must not be given away"
        self._give_back(request.request_id)

    def _give_back(self, request_id: str) -> None:
        self._memory.free(request_id)
        if self._memory.adapters is not None:
            self._memory.adapters.release(request_id)
        self._ended.append(request_id)
        self.prefix_moved(request_id)

    def check_invariants(self) -> None:
        """Raises AssertionError when the queues, the lanes and the memory disagree."""
        flying = {chunk.request_id for batch in self.in_flight.values() for chunk in batch.chunks}
        assert len(flying) == sum(len(batch.chunks) for batch in self.in_flight.values()), "in two batches"
        ahead = {chunk.request_id for chunk in self.ahead.chunks} if self.ahead else set()
        assert not ahead or _DECODE in self.in_flight, "ahead of nothing"
        flying |= ahead
        assert not flying & self._loading, "a request is computed while it is being loaded"
        flying |= self._loading
        self.speculation.check_invariants(flying)
        piece = self.speculation.request
        piece_ids = set() if piece is None else {piece.request_id}
        flying -= piece_ids
        for request in self.running:
            assert request.status is _RUNNING, request.request_id
            assert self._memory.holds(request.request_id), f"{request.request_id} runs without blocks"
            assert request.in_flight == (request.request_id in flying), request.request_id
            assert request.num_computed_tokens < len(request.token_ids), request.request_id
        assert list(self._reading) == [r for r in self.running if r.is_prefilling], "the wrong prompts are to be read"
        assert list(self._decoding) == [r for r in self.running if not r.is_prefilling], "the wrong requests decode"
        for request in self.waiting:
            assert request.status is RequestStatus.WAITING, request.request_id
            assert not self._memory.holds(request.request_id), f"{request.request_id} waits with blocks"
            assert not request.in_flight, request.request_id
        running_ids = {request.request_id for request in self.running}
        assert flying <= running_ids | self._draining, "a batch in flight has a request that does not run"
        assert self._draining <= flying - running_ids, "a request drains for no batch"
        assert all(self._memory.holds(request_id) for request_id in self._draining)
        for waiter, owner in self._waits_for.items():
            is_underway = owner in running_ids | piece_ids or owner in self._memory.prefetches
            assert is_underway, f"{waiter} waits for {owner}, which does not run"
