"""What every scheduler does: admission, chunks and batches.

What goes into the batches is what schedulers differ in: `lanes.py` is ours, `baselines.py` has the others.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence

from agentserve.core.batch import Batch, BatchShape, Lane, OpenPrompts, ScheduledChunk
from agentserve.core.classify import classify
from agentserve.core.events import BatchScheduled, EngineEvent, RequestAdmitted
from agentserve.core.memory.load_queue import urgency_of
from agentserve.core.memory.manager import Allocation, AllocationOutcome
from agentserve.core.request import Request, RequestStatus
from agentserve.core.scheduler.books import Books
from agentserve.core.scheduler.chunks import decode_chunks, pending_chunk, prompt_chunk
from agentserve.core.scheduler.missing_adapters import MissingAdapters
from agentserve.core.slots import SlotPartition

_NUM_LANES = len(Lane)
# Looking up a member of an enumeration costs as much as a call.
_DECODE = Lane.DECODE
_RUNNING = RequestStatus.RUNNING


class Scheduler(Books, ABC):
    """Owns the queues and the lanes. `EngineCore` calls it; nobody else does."""

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
            self.speculation.give_way()
            while True:
                refused = self._admit(now_ns, events)
                if refused is None or not self._make_way(refused, now_ns, events):
                    break
        if self.running or self.speculation.request is not None:
            self._fill(now_ns, events, batches)
            if not looks_ahead and self._may_look_ahead():
                self._fill(now_ns, events, batches)
        return batches

    def _fill(self, now_ns: int, events: list[EngineEvent], batches: list[Batch]) -> None:
        chunks = self._compose(now_ns, events)
        if not any(chunks.values()):
            return
        num_started = sum([bool(lane_chunks) and lane not in self.in_flight for lane, lane_chunks in chunks.items()])
        co_running = len(self.in_flight) + num_started == _NUM_LANES
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
                self._begin(batch, now_ns)
            events.append(BatchScheduled(now_ns, batch))
            batches.append(batch)

    def _admit(self, now_ns: int, events: list[EngineEvent]) -> Request | None:
        """Gives blocks to waiting requests, first come first served. Returns the first one for which there is no place.

        A request whose prefix is being computed by another one is passed over until that is done, and one whose adapter
        is not on the device until it is, but not by those that have used up more time slices. One for which there is no
        memory is not passed over, or large requests would starve.
        """
        admitted: list[tuple[Request, Allocation]] = []
        adapters, missing = self._memory.adapters, MissingAdapters(self._memory.adapters)
        refused: Request | None = None
        for request in self.waiting:
            if missing.shut_out(request):
                break
            if self.num_seqs >= self._config.max_num_seqs:
                refused = request
                break
            if request.request_id in self._waits_for or missing.pass_over(request):
                continue
            allocation = self._allocate(request)
            if allocation is None:
                refused = request
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
            request.prefill_target = len(request.token_ids)
            request.num_computed_tokens = allocation.num_cached_tokens
        for request, allocation in admitted:
            self.waiting.remove(request)
            request.status = _RUNNING
            if allocation.num_loading_tokens:
                request.in_flight = True
                self._loading.add(request.request_id)
            else:
                self.start(request, now_ns, events)
        return (missing.first_without_slot() if self._slice_ns else None) or refused

    def _allocate(self, request: Request) -> Allocation | None:
        """Blocks for a request that waits; None if there are too few."""
        if self._state_of_things(request) == self._refused:
            return None
        allocation = self._memory.allocate(
            request.request_id,
            request.token_ids,
            salt=request.cache_salt,
            # Whoever runs already can grow by one block before anybody is preempted.
            reserve_blocks=len(self.running),
            session=request.session_blocks,
            # As long as something runs it will end; else pinned blocks would be waited for in vain.
            ignore_pins=not (self.running or self._draining),
            urgency=urgency_of(request),
        )
        if allocation.outcome is not AllocationOutcome.OUT_OF_BLOCKS:
            return allocation
        # Copies to a lower tier may have begun, and then there are fewer blocks than before.
        self._refused = self._state_of_things(request)
        return None

    def _state_of_things(self, request: Request) -> tuple[str, int, int, int]:
        """What decides whether a request gets memory."""
        memory = self._memory
        return request.request_id, memory.num_available_blocks, memory.num_pinned_blocks, len(self.running)

    def start(self, request: Request, now_ns: int, events: list[EngineEvent]) -> None:
        """Lets a request run that has its blocks: what it has computed by now was cached or loaded."""
        num_cached_tokens = request.num_computed_tokens
        request.num_cached_at_admission = num_cached_tokens
        request.num_block_tokens = request.commit_at = 0
        request.runs_since_ns = now_ns
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
        ready = []
        # A copy: a preemption changes the queue.
        for request in list(self._decoding):
            if request.in_flight or request.status is not _RUNNING:  # preempted by one before it
                continue
            num_tokens = len(request.token_ids)
            if num_tokens > request.num_block_tokens and not self._grow(request, num_tokens, now_ns, events):
                continue
            request.in_flight = True
            ready.append(request)
        return decode_chunks(ready)

    def _may_look_ahead(self) -> bool:
        """Whether the decode lane may be given a second batch now.

        Not while it reads a prompt in pieces: the next piece would miss that batch. Not if a sampler has to see tokens
        that are not known yet, or a grammar to follow them.
        """
        head = self.in_flight.get(_DECODE)
        if self._slice_ns and self.waiting:
            return False  # who runs may have to give way behind this batch
        if self._config.decode_lookahead < 2 or self.ahead is not None or head is None:
            return False
        if self._last_continuable[0] != head.batch_id:
            specs = [chunk.sample for chunk in head.chunks]
            hinders = [spec is None or bool(spec.history) or spec.params.constrained for spec in specs]
            self._last_continuable = (head.batch_id, True not in hinders)
        return self._last_continuable[1]

    def _continued(self) -> list[ScheduledChunk]:
        """A chunk for each request of the decode lane's batch whose next token it will sample, if there is room for it.

        Who reaches a limit with that token is left out. Who turns out to have stopped with it computes in vain.
        """
        befores = {chunk.request_id: chunk for chunk in self.in_flight[_DECODE].chunks}
        limit = self._config.max_model_len - 1
        chunks = []
        for request in self.running:
            before = befores.get(request.request_id)
            if before is None or request.finish_after_flight is not None:
                continue
            spec, end = before.sample, before.start + len(before.token_ids)
            assert spec is not None
            # With the token that is being sampled there are `end + 1`.
            if spec.output_index + 1 >= request.sampling.max_tokens or end >= limit:
                continue
            if end < request.num_block_tokens or self._has_blocks(request, end + 1):
                chunks.append(pending_chunk(request, spec, end))
        return chunks

    def _prefilling(self) -> list[Request]:
        """Running requests whose prompt has tokens left that are not in flight, the next one first."""
        requests = [request for request in self._reading if not request.in_flight]
        if self._config.reads_shortest_first and len(requests) > 1:
            requests.sort(key=self._shortest_first)
        if self.speculation.ready is not None:
            requests.append(self.speculation.ready)
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

    def _share(self, now_ns: int, requests: Sequence[Request], decodes: Sequence[ScheduledChunk]) -> int:
        """How many tokens of these prompts a policy wants in a batch with these decodes."""
        assert self.shape_batch is not None, "nobody shapes batches"
        return self.shape_batch(
            OpenPrompts(
                num_tokens=sum([request.num_remaining_prefill_tokens for request in requests]),
                waited_ns=sum([now_ns - (request.first_scheduled_ns or now_ns) for request in requests]),
                decodes=BatchShape(len(decodes), sum([chunk.end for chunk in decodes]), num_samples=len(decodes)),
                num_waiting=len(self.waiting),
            )
        )

    def _prompts(
        self, now_ns: int, requests: Sequence[Request], budget: int, decodes: Sequence[ScheduledChunk] = ()
    ) -> list[ScheduledChunk]:
        """The next chunks of `requests`, in their order, `budget` tokens in all, for a batch with these decodes.

        Fewer if a policy wants the first of them to be done sooner, or the batch to be done sooner; it cuts no prompt.
        """
        chunks: list[ScheduledChunk] = []
        share = sys.maxsize if self.shape_batch is None or not requests else self._share(now_ns, requests, decodes)
        if decodes and not share:
            return chunks
        for request in requests:
            num_tokens = request.num_remaining_prefill_tokens
            if budget <= 0 or (chunks and num_tokens > share):
                break
            num_tokens = min(budget, num_tokens)
            share -= num_tokens
            budget -= num_tokens
            block_ids = self._memory.blocks_for(request.request_id, request.num_computed_tokens + num_tokens)
            assert block_ids is not None, "a prompt has its blocks since its admission"
            request.in_flight = True
            chunks.append(prompt_chunk(request, num_tokens, block_ids, self._config.resume_min_cached_tokens))
        return chunks
