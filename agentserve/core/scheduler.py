"""What runs next: admission, and the batches of the two lanes.

The decode lane takes every running decode plus resume-prefill chunks within the budget; the prefill lane takes cold
and long resume prefills in chunks. Each lane has at most one batch in flight. A lane that runs alone gets the whole
device; while both are busy the controller's partition holds. (AgentServe, section 4; design, section 5.)
"""

from __future__ import annotations

from agentserve.config import EngineConfig
from agentserve.core.batch import Batch, Lane, SampleSpec, ScheduledChunk
from agentserve.core.classify import classify, lane_of
from agentserve.core.controllers import Controller, ControlSignal, Decision
from agentserve.core.events import BatchScheduled, EngineEvent, RequestAdmitted, RequestPreempted
from agentserve.core.memory.manager import AllocationOutcome, MemoryManager
from agentserve.core.queues import RankedQueue, rank
from agentserve.core.request import Request, RequestStatus, WorkClass
from agentserve.core.slots import PartitionTable


class Scheduler:
    """Owns the queues and the lanes. `EngineCore` calls it; nobody else does."""

    def __init__(
        self, config: EngineConfig, memory: MemoryManager, table: PartitionTable, controller: Controller
    ) -> None:
        self._config = config
        self._memory = memory
        self._table = table
        self._controller = controller
        self.waiting = RankedQueue()
        self.running = RankedQueue()
        self.in_flight: dict[Lane, Batch] = {}
        self._waits_for: dict[str, str] = {}
        """Waiting request -> the request that computes the prefix it needs; asked again when that one moves on."""
        self._refused: tuple[str, int, int] | None = None
        """Who got no memory, and the state of things then: asking again is not free for a long prompt."""
        self._ended: list[str] = []
        self._num_batches = 0
        self._decode_step_ns: int | None = None
        self.num_preemptions = 0
        self.num_prefix_query_tokens = 0
        self.num_prefix_hit_tokens = 0

    # ---- what the engine tells ----

    def prefix_moved(self, owner_id: str) -> None:
        """Blocks of `owner_id` became ready or vanished: those who wait for them may look again."""
        self._refused = None
        if self._waits_for:
            self._waits_for = {w: owner for w, owner in self._waits_for.items() if owner != owner_id}

    def batch_done(self, lane: Lane, duration_ns: int) -> None:
        del self.in_flight[lane]
        if lane is Lane.DECODE:
            self._decode_step_ns = duration_ns

    def drop(self, request: Request) -> None:
        """Takes a request that ends out of its queue and gives its blocks back."""
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
            self._release(request)
        else:
            self.waiting.remove(request)
            self._waits_for.pop(request.request_id, None)

    # ---- scheduling ----

    def schedule(self, now_ns: int, events: list[EngineEvent]) -> None:
        """Fills the idle lanes. Batches are returned as `BatchScheduled` events."""
        if len(self.in_flight) == len(Lane):
            return
        self._admit(now_ns, events)
        if not self.running:
            return
        decision = self._controller.decide(self._signal(now_ns))
        chunks: dict[Lane, list[ScheduledChunk]] = {}
        if Lane.DECODE not in self.in_flight:
            chunks[Lane.DECODE] = self._decode_chunks(now_ns, decision, events)
        if Lane.PREFILL not in self.in_flight:
            chunks[Lane.PREFILL] = self._prefill_chunks(decision)
        busy = {lane for lane, lane_chunks in chunks.items() if lane_chunks} | set(self.in_flight)
        co_running = len(busy) == len(Lane)
        partition = decision.partition if co_running else self._table.whole
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
            self.in_flight[lane] = batch
            events.append(BatchScheduled(now_ns, batch))

    def _signal(self, now_ns: int) -> ControlSignal:
        missing = [request.num_remaining_prefill_tokens for request in self.running]
        return ControlSignal(
            now_ns=now_ns,
            num_decodes=missing.count(0),
            num_pending_prefill_tokens=sum(missing),
            decode_step_ns=self._decode_step_ns,
        )

    def _admit(self, now_ns: int, events: list[EngineEvent]) -> None:
        """Gives blocks to waiting requests, first come first served.

        A request whose prefix is being computed by another one is passed over until that is done. One for which there
        is no memory is not passed over, or large requests would starve.
        """
        admitted: list[tuple[Request, int]] = []
        for request in self.waiting:
            if len(self.running) >= self._config.max_num_seqs:
                break
            if request.request_id in self._waits_for:
                continue
            state = (request.request_id, self._memory.num_available_blocks, len(self.running))
            if state == self._refused:
                break
            allocation = self._memory.allocate(
                request.request_id,
                request.token_ids,
                salt=request.cache_salt,
                # Whoever runs already can grow by one block before anybody is preempted.
                reserve_blocks=len(self.running),
            )
            if allocation.outcome is AllocationOutcome.OUT_OF_BLOCKS:
                self._refused = state
                break
            if allocation.outcome is AllocationOutcome.PENDING_PREFIX:
                assert allocation.pending_owner is not None
                self._waits_for[request.request_id] = allocation.pending_owner
                continue
            admitted.append((request, allocation.num_cached_tokens))
            self.running.add(request)
        for request, num_cached_tokens in admitted:
            self.waiting.remove(request)
            self._start(request, num_cached_tokens, now_ns, events)

    def _start(self, request: Request, num_cached_tokens: int, now_ns: int, events: list[EngineEvent]) -> None:
        request.status = RequestStatus.RUNNING
        request.prefill_target = len(request.token_ids)
        request.num_computed_tokens = num_cached_tokens
        request.num_cached_at_admission = num_cached_tokens
        if request.first_scheduled_ns is None:
            request.first_scheduled_ns = now_ns
            request.num_cached_tokens = num_cached_tokens
            request.first_work_class = classify(request, self._config.resume_min_cached_tokens)
        self.num_prefix_query_tokens += len(request.token_ids)
        self.num_prefix_hit_tokens += num_cached_tokens
        events.append(RequestAdmitted(request.request_id, now_ns, len(request.token_ids), num_cached_tokens))

    def _decode_chunks(self, now_ns: int, decision: Decision, events: list[EngineEvent]) -> list[ScheduledChunk]:
        chunks = []
        # A copy: a preemption changes the queue.
        for request in list(self.running):
            if request.is_prefilling or request.in_flight:
                continue
            if request.status is not RequestStatus.RUNNING:  # preempted by one before it
                continue
            if self._grow(request, now_ns, events):
                chunks.append(self._chunk(request, WorkClass.DECODE, 1))
        # Nobody's next token is delayed when nobody decodes: then the budget would only slow the resume down.
        budget = decision.resume_budget if chunks else max(decision.resume_budget, decision.prefill_chunk)
        chunks += self._prompt_chunks(Lane.DECODE, budget, decision)
        return chunks

    def _prefill_chunks(self, decision: Decision) -> list[ScheduledChunk]:
        return self._prompt_chunks(Lane.PREFILL, decision.prefill_chunk, decision)

    def _prompt_chunks(self, lane: Lane, budget: int, decision: Decision) -> list[ScheduledChunk]:
        """Chunks of the prompts that belong to `lane`, in order of rank, `budget` tokens in all."""
        resume_limit = decision.resume_budget * self._config.resume_max_steps
        chunks = []
        for request in self.running:
            if budget == 0:
                break
            if request.in_flight or not request.is_prefilling:
                continue
            work_class = classify(request, self._config.resume_min_cached_tokens)
            if lane_of(request, work_class, resume_limit) is not lane:
                continue
            num_tokens = min(budget, request.num_remaining_prefill_tokens)
            budget -= num_tokens
            chunks.append(self._chunk(request, work_class, num_tokens))
        return chunks

    def _chunk(self, request: Request, work_class: WorkClass, num_tokens: int) -> ScheduledChunk:
        request.in_flight = True
        start = request.num_computed_tokens
        end = start + num_tokens
        sample = None
        if end == len(request.token_ids):
            params = request.sampling
            sample = SampleSpec(
                params=params,
                output_index=request.num_output_tokens,
                history=tuple(request.token_ids) if params.needs_history else (),
                num_prompt_tokens=request.num_prompt_tokens,
            )
        block_ids = self._memory.block_ids(request.request_id)
        num_blocks = -(-end // self._config.block_size)
        return ScheduledChunk(
            request_id=request.request_id,
            work_class=work_class,
            start=start,
            token_ids=tuple(request.token_ids[start:end]),
            block_ids=block_ids if len(block_ids) == num_blocks else block_ids[:num_blocks],
            sample=sample,
        )

    # ---- memory pressure ----

    def _grow(self, request: Request, now_ns: int, events: list[EngineEvent]) -> bool:
        """Makes room for the request's next token. False: it does not run in this batch."""
        while not self._memory.extend(request.request_id, len(request.token_ids)):
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

    def _preempt(self, request: Request, now_ns: int, events: list[EngineEvent]) -> None:
        """Takes the blocks of a request; it is computed again when there is room (what stays cached is a hit)."""
        self.running.remove(request)
        self._release(request)
        request.status = RequestStatus.WAITING
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.add(request)
        events.append(RequestPreempted(request.request_id, now_ns))

    def _release(self, request: Request) -> None:
        assert not request.in_flight, "blocks that a batch may still write to must not be given away"
        self._memory.free(request.request_id)
        self._ended.append(request.request_id)
        self.prefix_moved(request.request_id)

    def check_invariants(self) -> None:
        """Raises AssertionError when the queues, the lanes and the memory disagree."""
        flying = {chunk.request_id for batch in self.in_flight.values() for chunk in batch.chunks}
        assert len(flying) == sum(len(batch.chunks) for batch in self.in_flight.values()), "in two batches"
        for request in self.running:
            assert request.status is RequestStatus.RUNNING, request.request_id
            assert self._memory.holds(request.request_id), f"{request.request_id} runs without blocks"
            assert request.in_flight == (request.request_id in flying), request.request_id
            assert request.num_computed_tokens < len(request.token_ids), request.request_id
        for request in self.waiting:
            assert request.status is RequestStatus.WAITING, request.request_id
            assert not self._memory.holds(request.request_id), f"{request.request_id} waits with blocks"
            assert not request.in_flight, request.request_id
        running_ids = {request.request_id for request in self.running}
        assert flying <= running_ids, "a batch in flight has a request that does not run"
        for waiter, owner in self._waits_for.items():
            assert owner in running_ids, f"{waiter} waits for {owner}, which does not run"
