"""What every scheduler does: admission, memory pressure, chunks, and the books of the lanes.

Each lane has at most one batch in flight, the decode lane two if it looks ahead. What goes into the batches is what
schedulers differ in: `lanes.py` is ours, `baselines.py` has the others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

from agentserve.config import EngineConfig
from agentserve.core.batch import Batch, BatchOutput, Lane, ScheduledChunk
from agentserve.core.classify import classify
from agentserve.core.controllers import Controller, Decision
from agentserve.core.events import BatchScheduled, EngineEvent, RequestAdmitted, RequestPreempted
from agentserve.core.memory.manager import Allocation, AllocationOutcome, MemoryManager
from agentserve.core.queues import RankedQueue, rank
from agentserve.core.request import Request, RequestStatus
from agentserve.core.scheduler.chunks import decode_chunk, pending_chunk, prompt_chunk
from agentserve.core.scheduler.observer import LaneObserver
from agentserve.core.slots import PartitionTable, SlotPartition

_NUM_LANES = len(Lane)
# Looking up a member of an enumeration costs as much as a call.
_DECODE = Lane.DECODE
_RUNNING = RequestStatus.RUNNING


class Scheduler(ABC):
    """Owns the queues and the lanes. `EngineCore` calls it; nobody else does."""

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
        self._observer = LaneObserver()
        self._waits_for: dict[str, str] = {}
        """Waiting request -> the request that computes the prefix it needs; asked again when that one moves on."""
        self._refused: tuple[str, int, int, int] | None = None
        """Who got no memory, and the state of things then: asking again is not free for a long prompt."""
        self._loading: set[str] = set()
        """Running requests whose blocks are being filled from a lower tier; they count as in flight."""
        self._ended: list[str] = []
        self._num_batches = 0
        self.num_preemptions = 0
        self.num_prefix_query_tokens = 0
        self.num_prefix_hit_tokens = 0

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
        observation = self._observer.finished(batch, output)
        still_flying: frozenset[str] = frozenset()
        if output.lane is _DECODE and self.ahead is not None:
            self.in_flight[_DECODE] = self.ahead
            self._observer.started(self.ahead, output.finished_ns)
            self.ahead = None
            still_flying = frozenset([chunk.request_id for chunk in self.in_flight[_DECODE].chunks])
        if output.error is None and self._controller is not None:
            self._controller.observe(observation)
        return still_flying

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

    # ---- what schedulers differ in ----

    @abstractmethod
    def _compose(self, now_ns: int, events: list[EngineEvent]) -> dict[Lane, list[ScheduledChunk]]:
        """Chunks for idle lanes; called only while some request runs. Chunks of a lane may be empty."""

    def _co_partition(self) -> SlotPartition:
        """The partition for a batch that starts while the other lane is busy."""
        return self._table.stream

    # ---- scheduling ----

    def schedule(self, now_ns: int, events: list[EngineEvent]) -> list[Batch]:
        """Fills the idle lanes. The batches that it returns are `BatchScheduled` events, too."""
        batches: list[Batch] = []
        looks_ahead = self._may_look_ahead()
        if len(self.in_flight) == _NUM_LANES and not looks_ahead:
            return batches
        if self.waiting:
            self._admit(now_ns, events)
        if self.running:
            self._fill(now_ns, events, batches)
            if not looks_ahead and self._may_look_ahead():
                self._fill(now_ns, events, batches)
        return batches

    def _fill(self, now_ns: int, events: list[EngineEvent], batches: list[Batch]) -> None:
        chunks = self._compose(now_ns, events)
        busy = {lane for lane, lane_chunks in chunks.items() if lane_chunks}.union(self.in_flight)
        co_running = len(busy) == _NUM_LANES
        partition = self._co_partition() if co_running else self._table.whole
        for lane, lane_chunks in chunks.items():
            if not lane_chunks:
                continue
            batch = Batch(
                batch_id=self._num_batches,
                lane=lane,
                partition=partition,
                co_running=co_running,
                chunks=tuple(lane_chunks),
                ended_request_ids=tuple(self._ended),
            )
            self._ended.clear()
            self._num_batches += 1
            if lane in self.in_flight:
                self.ahead = batch
            else:
                self.in_flight[lane] = batch
                self._observer.started(batch, now_ns)
            events.append(BatchScheduled(now_ns, batch))
            batches.append(batch)

    def _admit(self, now_ns: int, events: list[EngineEvent]) -> None:
        """Gives blocks to waiting requests, first come first served.

        A request whose prefix is being computed by another one is passed over until that is done, and one whose adapter
        is not on the device until it is. One for which there is no memory is not passed over, or large requests would
        starve.
        """
        admitted: list[tuple[Request, Allocation]] = []
        adapters, held_adapters = self._memory.adapters, set[str]()
        for request in self.waiting:
            if len(self.running) + len(self._draining) >= self._config.max_num_seqs:
                break
            if request.request_id in self._waits_for:
                continue
            if adapters is not None and not adapters.admits(request, held_adapters):
                continue
            if self._state_of_things(request) == self._refused:
                break
            allocation = self._memory.allocate(
                request.request_id,
                request.token_ids,
                salt=request.cache_salt,
                # Whoever runs already can grow by one block before anybody is preempted.
                reserve_blocks=len(self.running),
                session=request.session_blocks,
                # As long as something runs it will end; else pinned blocks would be waited for in vain.
                ignore_pins=not (self.running or self._draining),
                priority=request.priority,
            )
            if allocation.outcome is AllocationOutcome.OUT_OF_BLOCKS:
                # Copies to a lower tier may have begun, and then there are fewer blocks than before.
                self._refused = self._state_of_things(request)
                break
            if allocation.outcome is AllocationOutcome.PENDING_PREFIX:
                assert allocation.pending_owner is not None
                self._waits_for[request.request_id] = allocation.pending_owner
                continue
            admitted.append((request, allocation))
            if adapters is not None:
                request.adapter_slot = adapters.acquire(request)
            self.running.add(request)
            self._reading.add(request)
        for request, allocation in admitted:
            self.waiting.remove(request)
            request.status = _RUNNING
            request.prefill_target = len(request.token_ids)
            request.num_computed_tokens = allocation.num_cached_tokens
            if allocation.num_loading_tokens:
                request.in_flight = True
                self._loading.add(request.request_id)
            else:
                self.start(request, now_ns, events)

    def _state_of_things(self, request: Request) -> tuple[str, int, int, int]:
        """What decides whether a request gets memory."""
        memory = self._memory
        return request.request_id, memory.num_available_blocks, memory.num_pinned_blocks, len(self.running)

    def start(self, request: Request, now_ns: int, events: list[EngineEvent]) -> None:
        """Lets a request run that has its blocks: what it has computed by now was cached or loaded."""
        num_cached_tokens = request.num_computed_tokens
        request.num_cached_at_admission = num_cached_tokens
        if request.first_scheduled_ns is None:
            request.first_scheduled_ns = now_ns
            request.num_cached_tokens = num_cached_tokens
            request.first_work_class = classify(request, self._config.resume_min_cached_tokens)
        self.num_prefix_query_tokens += len(request.token_ids)
        self.num_prefix_hit_tokens += num_cached_tokens
        events.append(RequestAdmitted(request.request_id, now_ns, len(request.token_ids), num_cached_tokens))

    def _decodes(self, now_ns: int, events: list[EngineEvent]) -> list[ScheduledChunk]:
        """A chunk for each running decode that is not in flight; makes room for its next token, by preemption if need
        be."""
        chunks = []
        blocks_for = self._memory.blocks_for
        # A copy: a preemption changes the queue.
        for request in list(self._decoding):
            if request.in_flight or request.status is not _RUNNING:  # preempted by one before it
                continue
            block_ids = blocks_for(request.request_id, len(request.token_ids))
            if block_ids is None:
                block_ids = self._grow(request, now_ns, events)
            if block_ids is not None:
                request.in_flight = True
                chunks.append(decode_chunk(request, block_ids))
        return chunks

    def _may_look_ahead(self) -> bool:
        """Whether the decode lane may be given a second batch now.

        Not while it reads a prompt in pieces: the next piece would miss that batch. Not if a sampler has to see tokens
        that are not known yet, or a grammar to follow them.
        """
        head = self.in_flight.get(_DECODE)
        if self._config.decode_lookahead < 2 or self.ahead is not None or head is None:
            return False
        if self._last_continuable[0] != head.batch_id:
            continuable = all(
                c.sample is not None and not c.sample.history and not c.sample.params.constrained for c in head.chunks
            )
            self._last_continuable = (head.batch_id, continuable)
        return self._last_continuable[1]

    def _continued(self) -> list[ScheduledChunk]:
        """A chunk for each request of the decode lane's batch whose next token it will sample, if there is room for it.

        Who reaches a limit with that token is left out. Who turns out to have stopped with it computes in vain.
        """
        befores = {chunk.request_id: chunk for chunk in self.in_flight[_DECODE].chunks}
        chunks = []
        for request in self.running:
            before = befores.get(request.request_id)
            if before is None or request.finish_after_flight is not None:
                continue
            assert before.sample is not None
            index, end = before.sample.output_index + 1, before.end
            # With the token that is being sampled there are `end + 1`.
            if index >= request.sampling.max_tokens or end + 1 >= self._config.max_model_len:
                continue
            block_ids = self._memory.blocks_for(request.request_id, end + 1)
            if block_ids is not None:
                chunks.append(pending_chunk(request, before, block_ids))
        return chunks

    def _prefilling(self) -> list[Request]:
        """Running requests whose prompt has tokens left that are not in flight, the next one first."""
        requests = [request for request in self._reading if not request.in_flight]
        if self._config.reads_shortest_first and len(requests) > 1:
            requests.sort(key=self._shortest_first)
        return requests

    def _shortest_first(self, request: Request) -> tuple[int, int, int]:
        """Shortest remaining prompt first, with aging.

        What a request has to its credit for its age grows by `aging_tokens_per_s`. The same amount grows for all, so
        the order is that of `remaining + rate * arrival`, which does not change while they wait: a prompt of R tokens
        is overtaken only by those that arrive less than R / rate seconds after it.
        """
        age_key = request.num_remaining_prefill_tokens * 1_000_000_000
        return (
            request.priority,
            age_key + self._config.aging_tokens_per_s * request.arrival_ns,
            request.sequence,
        )

    def _prompts(self, requests: Iterable[Request], budget: int) -> list[ScheduledChunk]:
        """The next chunks of `requests`, in their order, `budget` tokens in all."""
        chunks = []
        for request in requests:
            if budget <= 0:
                break
            num_tokens = min(budget, request.num_remaining_prefill_tokens)
            budget -= num_tokens
            block_ids = self._memory.blocks_for(request.request_id, request.num_computed_tokens + num_tokens)
            assert block_ids is not None, "a prompt has its blocks since its admission"
            request.in_flight = True
            chunks.append(prompt_chunk(request, num_tokens, block_ids, self._config.resume_min_cached_tokens))
        return chunks

    # ---- memory pressure ----

    def _grow(self, request: Request, now_ns: int, events: list[EngineEvent]) -> tuple[int, ...] | None:
        """Makes room for the request's next token; returns its blocks. None: it does not run in this batch."""
        while (block_ids := self._memory.blocks_for(request.request_id, len(request.token_ids))) is None:
            residency = self._memory.residency
            if residency is not None and residency.is_freeing:
                return None  # blocks are on their way down: when they are free, that wakes us
            victim = self._victim(request)
            if victim is not None:
                self._preempt(victim, now_ns, events)
            elif any(rank(other) > rank(request) for other in self.running):
                # Those behind it are in flight: they can be preempted when their batch is done, which wakes us.
                return None
            else:
                self._preempt(request, now_ns, events)
                return None
        return block_ids

    def _victim(self, request: Request) -> Request | None:
        """The last in rank that is not in flight, if it comes after `request`."""
        for other in reversed(self.running):
            if rank(other) <= rank(request):
                return None
            if not other.in_flight:
                return other
        return None

    def _preempt(self, request: Request, now_ns: int, events: list[EngineEvent]) -> None:
        """Takes the blocks of a request; it is computed again when there is room (what stays cached is a hit)."""
        self._stop(request)
        self._release(request)
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
            is_underway = owner in running_ids or owner in self._memory.prefetches
            assert is_underway, f"{waiter} waits for {owner}, which does not run"
