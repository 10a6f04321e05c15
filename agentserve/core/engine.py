"""The engine core: one step function over plain inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from agentserve.config import EngineConfig
from agentserve.core.batch import Batch, BatchOutput, Lane, ScheduledChunk, TokenSample
from agentserve.core.controllers import Controller
from agentserve.core.events import (
    Command,
    EngineEvent,
    PrefillProgress,
    RequestFinished,
    RequestStats,
    SubmitRequest,
    TokenGenerated,
)
from agentserve.core.memory.manager import MemoryManager
from agentserve.core.request import FinishReason, Request, RequestStatus
from agentserve.core.scheduler import build_scheduler
from agentserve.core.slots import PartitionTable
from agentserve.core.stats import EngineStats


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step did, in order."""

    events: tuple[EngineEvent, ...]
    batches: tuple[Batch, ...]
    """What the driver must hand to the executor now, in this order: the batches of the `BatchScheduled` events."""


class EngineCore:
    """A deterministic function of `(now, completions, commands)`; see the design, section 2.

    Whoever drives it passes the time, hands `StepResult.batches` to an executor, and calls `step` again when there
    are completions or commands, or when `next_deadline_ns` has come. Not thread-safe: one driver, one thread.
    """

    def __init__(self, config: EngineConfig, table: PartitionTable, controller: Controller | None) -> None:
        """`controller`: only the scheduler `lanes` has one."""
        self.config = config
        self._max_model_len = config.max_model_len
        self.memory = MemoryManager(
            config.num_blocks, config.block_size, enable_prefix_caching=config.enable_prefix_caching
        )
        self._scheduler = build_scheduler(config, self.memory, table, controller)
        self._requests: dict[str, Request] = {}
        self._sequence = 0
        self._last_now_ns: int | None = None
        self._num_steps = 0
        self._num_batches = dict.fromkeys(Lane, 0)
        self._num_computed_prefill_tokens = 0
        self._num_generated_tokens = 0

    @property
    def has_unfinished(self) -> bool:
        """Whether a request has not had its terminal event yet."""
        return bool(self._requests)

    def next_deadline_ns(self) -> int | None:
        """When the next timer is due, or None: no part of the control plane needs a timer at present."""
        return None

    def step(self, now_ns: int, completions: Sequence[BatchOutput], commands: Sequence[Command]) -> StepResult:
        """Takes what happened and decides what happens next.

        In this order: completions, commands as they arrived, idle lanes. `now_ns` must not go backwards (ValueError).
        """
        if self._last_now_ns is not None and now_ns < self._last_now_ns:
            raise ValueError(f"time went backwards: {now_ns} < {self._last_now_ns}")
        self._last_now_ns = now_ns
        self._num_steps += 1
        events: list[EngineEvent] = []
        for output in completions:
            self._complete(output, now_ns, events)
        for command in commands:
            if isinstance(command, SubmitRequest):
                self._submit(command, now_ns, events)
            else:
                self._end(command.request_id, command.reason, now_ns, events)
        batches = self._scheduler.schedule(now_ns, events)
        return StepResult(tuple(events), tuple(batches))

    # ---- commands ----

    def _submit(self, command: SubmitRequest, now_ns: int, events: list[EngineEvent]) -> None:
        assert command.request_id not in self._requests, f"request id {command.request_id} is in use"
        request = Request(
            request_id=command.request_id,
            prompt_token_ids=command.prompt_token_ids,
            sampling=command.sampling,
            arrival_ns=now_ns,
            sequence=self._sequence,
            agent_id=command.agent_id,
            session_id=command.session_id,
            priority=command.priority,
            cache_salt=command.cache_salt,
        )
        self._sequence += 1
        self._requests[request.request_id] = request
        self._scheduler.waiting.add(request)
        num_tokens, limit = request.num_prompt_tokens, self.config.max_model_len
        if not 1 <= num_tokens < limit:
            # The door has checked this for HTTP requests; a recording or a simulated workload has no door.
            error = f"the prompt has {num_tokens} tokens; it must have at least 1 and fewer than {limit}"
            self._finish(request, FinishReason.ERROR, now_ns, events, error)

    def _end(self, request_id: str, reason: FinishReason, now_ns: int, events: list[EngineEvent]) -> None:
        request = self._requests.get(request_id)
        if request is None or request.finish_after_flight is not None:
            return
        if request.in_flight:
            request.finish_after_flight = reason
        else:
            self._finish(request, reason, now_ns, events)

    # ---- completions ----

    def _complete(self, output: BatchOutput, now_ns: int, events: list[EngineEvent]) -> None:
        batch = self._scheduler.in_flight.get(output.lane)
        assert batch is not None and batch.batch_id == output.batch_id, f"unexpected {output}"
        still_flying = self._scheduler.batch_done(output)
        self._num_batches[output.lane] += 1
        samples = {sample.request_id: sample for sample in output.samples}
        for chunk in batch.chunks:
            request_id = chunk.request_id
            request = self._requests.get(request_id)
            if request is None:  # it ended with a token that was not known when this batch was made
                self._scheduler.drained(request_id)
                continue
            request.in_flight = request_id in still_flying
            if output.error is not None:
                self._finish(request, FinishReason.ERROR, now_ns, events, output.error)
            else:
                self._advance(request, chunk, samples.get(request_id), now_ns, events)

    def _advance(
        self,
        request: Request,
        chunk: ScheduledChunk,
        sample: TokenSample | None,
        now_ns: int,
        events: list[EngineEvent],
    ) -> None:
        """Books a chunk that was computed and the token that was sampled behind it."""
        assert (sample is None) == (chunk.sample is None), f"wrong samples for {chunk.request_id}"
        request_id = request.request_id
        end = chunk.start + len(chunk.token_ids)
        was_prefilling = request.num_computed_tokens < request.prefill_target
        request.num_computed_tokens = end
        self.memory.commit(request_id, request.token_ids, end)
        if was_prefilling:
            self._num_computed_prefill_tokens += chunk.num_tokens
            self._scheduler.prefill_advanced(request)
        if request.finish_after_flight is not None:
            self._finish(request, request.finish_after_flight, now_ns, events)
            return
        if was_prefilling:
            events.append(PrefillProgress(request_id, now_ns, end, request.prefill_target))
        if sample is None:
            return
        token_ids, params = request.token_ids, request.sampling
        token_ids.append(sample.token_id)
        num_outputs = len(token_ids) - request.num_prompt_tokens
        self._num_generated_tokens += 1
        if request.first_token_ns is None:
            request.first_token_ns = now_ns
        request.last_token_ns = now_ns
        events.append(TokenGenerated(request_id, now_ns, sample, num_outputs - 1))
        if sample.token_id in params.stop_token_ids and num_outputs > params.min_tokens:
            self._finish(request, FinishReason.STOP, now_ns, events)
        elif num_outputs >= params.max_tokens or len(token_ids) >= self._max_model_len:
            self._finish(request, FinishReason.LENGTH, now_ns, events)

    def _finish(
        self,
        request: Request,
        reason: FinishReason,
        now_ns: int,
        events: list[EngineEvent],
        error: str | None = None,
    ) -> None:
        self._scheduler.drop(request)
        request.status = RequestStatus.FINISHED
        del self._requests[request.request_id]
        stats = RequestStats(
            num_prompt_tokens=request.num_prompt_tokens,
            num_cached_tokens=request.num_cached_tokens,
            num_output_tokens=request.num_output_tokens,
            num_preemptions=request.num_preemptions,
            first_work_class=request.first_work_class or "",
            arrival_ns=request.arrival_ns,
            first_scheduled_ns=request.first_scheduled_ns,
            first_token_ns=request.first_token_ns,
            last_token_ns=request.last_token_ns,
        )
        events.append(RequestFinished(request.request_id, now_ns, reason, stats, error))

    # ---- views ----

    def stats(self) -> EngineStats:
        """A snapshot of the counters."""
        scheduler, memory = self._scheduler, self.memory
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_blocks=memory.num_blocks,
            num_free_blocks=memory.num_free_blocks,
            num_cached_blocks=memory.num_cached_blocks,
            num_prefix_query_tokens=scheduler.num_prefix_query_tokens,
            num_prefix_hit_tokens=scheduler.num_prefix_hit_tokens,
            num_computed_prefill_tokens=self._num_computed_prefill_tokens,
            num_generated_tokens=self._num_generated_tokens,
            num_preemptions=scheduler.num_preemptions,
            decision=scheduler.decision,
            num_evicted_blocks=memory.num_evicted_blocks,
            num_steps=self._num_steps,
            num_batches_prefill=self._num_batches[Lane.PREFILL],
            num_batches_decode=self._num_batches[Lane.DECODE],
        )

    def check_invariants(self) -> None:
        """Raises AssertionError when any part is inconsistent. For tests: it looks at everything."""
        self.memory.check_invariants()
        self._scheduler.check_invariants()
        queued = {r.request_id for r in self._scheduler.running} | {r.request_id for r in self._scheduler.waiting}
        assert queued == set(self._requests), "a request is lost or queued twice"
        assert len(queued) == len(self._scheduler.running) + len(self._scheduler.waiting)
        if self.has_unfinished:
            # Liveness: something must be under way that will wake the driver.
            assert self._scheduler.in_flight, "requests are unfinished, but nothing will wake them"
