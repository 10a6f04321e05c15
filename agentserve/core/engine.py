"""The engine core: one step function over plain inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from agentserve.config import EngineConfig
from agentserve.core.adapters import AdapterLoadOutput, TransferOrder
from agentserve.core.agents import AgentRuntime, Seats, build_policies
from agentserve.core.batch import Batch, BatchOutput, Lane, ScheduledChunk, TokenSample
from agentserve.core.controllers import Controller
from agentserve.core.decode_run import DecodePlan, DecodeRun, TokenSource
from agentserve.core.events import (
    Command,
    EngineEvent,
    FlushTiers,
    NoteTurn,
    PrefillProgress,
    RequestAdmitted,
    RequestFinished,
    RequestPreempted,
    RequestStats,
    SetDistances,
    Speculate,
    SubmitRequest,
    TokenGenerated,
)
from agentserve.core.executor import Report
from agentserve.core.memory.answers import ReadTokens, Whereabouts
from agentserve.core.memory.manager import MemoryManager
from agentserve.core.memory.modules import AdapterModule
from agentserve.core.memory.residency import RecomputeCost
from agentserve.core.request import FinishReason, Request, RequestStatus
from agentserve.core.scheduler import build_scheduler
from agentserve.core.slots import PartitionTable
from agentserve.core.stats import EngineStats
from agentserve.core.transfers import TierContents, TransferOutput

_MOVES = (RequestAdmitted, RequestPreempted)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step did, in order."""

    events: tuple[EngineEvent, ...]
    batches: tuple[Batch, ...]
    """What the driver must hand to the executor now, in this order: the batches of the `BatchScheduled` events."""
    transfers: tuple[TransferOrder, ...] = ()
    """Copies between tiers, and of adapters, that it must hand to the executor, too."""
    run: DecodeRun | None = None
    """Of `EngineCore.run_decodes`: the steps that were booked in one go. Their tokens and batches are no `events`:
    these are what happened behind the last completion."""


class EngineCore:
    """A deterministic function of `(now, completions, commands)`; see the design, section 2.

    Whoever drives it passes the time, hands `StepResult.batches` to an executor, and calls `step` again when there
    are completions or commands, or when `next_deadline_ns` has come. Not thread-safe: one driver, one thread.
    """

    def __init__(
        self,
        config: EngineConfig,
        table: PartitionTable,
        controller: Controller | None,
        recompute_ns: RecomputeCost | None = None,
        seats: Seats | None = None,
    ) -> None:
        """Makes an idle core.

        Args:
            config: all constants.
            table: the ways to share the device.
            controller: only the scheduler `lanes` has one.
            recompute_ns: what computing KV costs, against loading it from a tier; None: loading is always cheaper.
            seats: the policies; None: the built-in ones that the configuration names.
        """
        self.config = config
        self._max_model_len = config.max_model_len
        self.memory = MemoryManager(
            config.num_blocks,
            config.block_size,
            enable_prefix_caching=config.enable_prefix_caching,
            tiering=config.tiering,
            recompute_ns=recompute_ns,
        )
        if config.lora is not None:
            self.memory.adapters = AdapterModule(config.lora, queue=self.memory.loads)
        self._scheduler = build_scheduler(config, self.memory, table, controller)
        self.agents = AgentRuntime(config, self.memory, seats or build_policies(config, None))
        if self.agents.shapes_batches:
            self._scheduler.shape_batch = self.agents.batch_tokens
        self._requests: dict[str, Request] = {}
        self._sequence = 0
        self._last_now_ns: int | None = None
        self._num_steps = 0
        self._num_batches = dict.fromkeys(Lane, 0)
        self._has_told_policies = False
        """Whether they know something that they have had no chance to act on."""
        self._num_computed_prefill_tokens = 0
        self._num_generated_tokens = 0

    @property
    def has_unfinished(self) -> bool:
        """Whether a request has not had its terminal event yet."""
        return bool(self._requests)

    @property
    def is_speculating(self) -> bool:
        """Whether something is being computed that nobody waits for."""
        return self._scheduler.speculation.request is not None

    @property
    def is_copying(self) -> bool:
        """Whether KV blocks are being copied between tiers."""
        return self.memory.residency is not None and self.memory.residency.is_busy

    def next_deadline_ns(self) -> int | None:
        """When the next timer is due, or None: the policies' timers count only while somebody waits."""
        if self.agents.is_behind:
            return self._last_now_ns
        return self.agents.next_deadline_ns() if self._scheduler.waiting or self.agents.held else None

    def step(self, now_ns: int, completions: Sequence[Report], commands: Sequence[Command]) -> StepResult:
        """Takes what happened and decides what happens next.

        In this order: completions, commands as they arrived, idle lanes. `now_ns` must not go backwards (ValueError).
        """
        if self._last_now_ns is not None and now_ns < self._last_now_ns:
            raise ValueError(f"time went backwards: {now_ns} < {self._last_now_ns}")
        self._last_now_ns = now_ns
        self._num_steps += 1
        events: list[EngineEvent] = []
        for output in completions:
            if isinstance(output, TransferOutput):
                self._transferred(output, now_ns, events)
            elif isinstance(output, AdapterLoadOutput):
                self._adapter_loaded(output, now_ns, events)
            elif isinstance(output, TierContents):
                assert self.memory.residency is not None, f"unexpected contents of the {output.tier} tier"
                self.memory.residency.restore(output)
            else:
                self._complete(output, now_ns, events)
        for command in commands:
            self._obey(command, now_ns, events)
        batches = self._schedule(now_ns, events)
        return StepResult(tuple(events), tuple(batches), tuple(self.memory.start_transfers()))

    # ---- runs of decode steps ----

    def decode_plan(self, *, settled: bool = False) -> DecodePlan | None:
        """The decode steps that are certain as long as nothing comes from outside; None if the next one is not.

        `settled`: None, too, if something within the engine may change the batches that follow.
        """
        if not self.agents.is_active:
            return self._scheduler.decode_plan(settled=settled)
        # Policies act at every step, but only on what they were told and on their deadlines.
        is_calm = not (self._has_told_policies or self.agents.is_behind or self.agents.may_speculate(self._scheduler))
        plan = self._scheduler.decode_plan(settled=settled) if is_calm else None
        return None if plan is None else dataclasses.replace(plan, before_ns=self.agents.next_deadline_ns())

    def run_decodes(self, plan: DecodePlan, started_ns: int, ends_ns: Sequence[int], tokens: TokenSource) -> StepResult:
        """Makes as many steps as `ends_ns` has times, each with the end of one decode batch and nothing else.

        Fewer if the controller changes its mind or the memory is short, but at least one: see `StepResult.run`.

        Args:
            plan: what `decode_plan` says at present.
            started_ns: when the first of its batches started.
            ends_ns: when the batches end, in order; at least one and at most `plan.num_steps`. No command, deadline or
                completion of the other lane may lie at or before the last of these times.
            tokens: what the executor samples; no token may be one that ends a request.
        """
        assert 1 <= len(ends_ns) <= plan.num_steps, f"{len(ends_ns)} of {plan.num_steps} steps"
        if self._last_now_ns is not None and ends_ns[0] < self._last_now_ns:
            raise ValueError(f"time went backwards: {ends_ns[0]} < {self._last_now_ns}")
        run = self._scheduler.run_decodes(plan, started_ns, ends_ns, tokens)
        self._last_now_ns = now_ns = run.ends_ns[-1]
        self._num_steps += run.num_steps
        self._num_batches[Lane.DECODE] += run.num_steps
        self._num_generated_tokens += run.num_steps * run.num_decodes
        events: list[EngineEvent] = []
        batches = self._schedule(now_ns, events)
        return StepResult(tuple(events), tuple(batches), tuple(self.memory.start_transfers()), run)

    def _schedule(self, now_ns: int, events: list[EngineEvent]) -> list[Batch]:
        """Lets the policies act, fills the idle lanes, and tells the policies what came of it."""
        agents = self.agents
        if agents.is_active:
            agents.act(now_ns, self._scheduler)
            self._queue_released()
        num_events = len(events)
        batches = self._scheduler.schedule(now_ns, events)
        moves = [event for event in events[num_events:] if isinstance(event, _MOVES)]
        agents.scheduled(moves)
        self._has_told_policies = bool(moves)
        failures = agents.settle(now_ns, self._scheduler)
        events += failures
        if failures and self._queue_released():
            batches += self._schedule(now_ns, events)
        return batches

    def _queue_released(self) -> bool:
        """Queues the calls that are not held back any more; whether there are any."""
        released = self.agents.held.take_released()
        for request in released:
            self._queue(request)
        return bool(released)

    def _queue(self, request: Request) -> None:
        if self._scheduler.waiting.add(request):
            self.agents.counts["reorders"] += 1
        if self.memory.adapters is not None:
            self.memory.adapters.on_request(request)

    # ---- commands ----

    def _obey(self, command: Command, now_ns: int, events: list[EngineEvent]) -> None:
        if isinstance(command, SubmitRequest):
            self._submit(command, now_ns, events)
        elif isinstance(command, FlushTiers):
            self.memory.flush()
        elif isinstance(command, SetDistances):
            self.agents.set_distances(command, now_ns)
        elif isinstance(command, NoteTurn):
            self.agents.note_turn(command, now_ns)
        elif isinstance(command, Speculate):
            self.agents.predicted(command)
        else:
            self._end(command.request_id, command.reason, now_ns, events)

    def _submit(self, command: SubmitRequest, now_ns: int, events: list[EngineEvent]) -> None:
        assert command.request_id not in self._requests, f"request id {command.request_id} is in use"
        adapters, adapter = self.memory.adapters, command.adapter
        is_known = adapter is None or (adapters is not None and adapter in adapters)
        if adapters is not None and is_known:
            command = dataclasses.replace(command, cache_salt=adapters.salt(command.cache_salt, adapter))
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
            adapter=adapter if is_known else None,
        )
        self._sequence += 1
        self._requests[request.request_id] = request
        self.agents.submitted(request, command, now_ns)
        num_tokens, limit, error = request.num_prompt_tokens, self.config.max_model_len, None
        if not 1 <= num_tokens < limit:
            # The door has checked this for HTTP requests; a recording or a simulated workload has no door.
            error = f"the prompt has {num_tokens} tokens; it must have at least 1 and fewer than {limit}"
        elif not is_known:
            error = f"there is no adapter {adapter!r}"
        if error is not None or not self.agents.holds(request, now_ns):
            self._queue(request)
        if error is not None:
            self._finish(request, FinishReason.ERROR, now_ns, events, error)

    def _end(self, request_id: str, reason: FinishReason, now_ns: int, events: list[EngineEvent]) -> None:
        request = self._requests.get(request_id)
        if request is None or request.finish_after_flight is not None:
            return
        if request.in_flight and not self._scheduler.load_aborted(request):
            request.finish_after_flight = reason
        else:
            self._finish(request, reason, now_ns, events)

    # ---- completions ----

    def _complete(self, output: BatchOutput, now_ns: int, events: list[EngineEvent]) -> None:
        batch = self._scheduler.in_flight.get(output.lane)
        assert batch is not None and batch.batch_id == output.batch_id, f"unexpected {output}"
        still_flying = self._scheduler.batch_done(output)
        self._num_batches[output.lane] += 1
        samples, error = iter(output.samples), output.error
        for chunk in batch.chunks:
            request_id = chunk.request_id
            sample = None if chunk.sample is None else next(samples, None)
            request = self._requests.get(request_id)
            if request is None:
                piece = self._scheduler.speculation.request
                if piece is not None and piece.request_id == request_id:
                    self._speculated(chunk, output)
                else:  # it ended with a token that was not known when this batch was made
                    self._scheduler.drained(request_id)
                continue
            request.in_flight = request_id in still_flying
            if error is not None:
                self._finish(request, FinishReason.ERROR, now_ns, events, error)
                continue
            assert sample is None or sample.request_id == request_id, f"the samples of {output} are out of order"
            self._advance(request, chunk, sample, now_ns, events)

    def _speculated(self, chunk: ScheduledChunk, output: BatchOutput) -> None:
        """Books a chunk that nobody waits for."""
        if output.error is None:
            self.agents.speculated(chunk.start, chunk.end)
        self._scheduler.speculated(chunk.end if output.error is None else None)

    def _transferred(self, output: TransferOutput, now_ns: int, events: list[EngineEvent]) -> None:
        """Books a copy between tiers; the last one that a request waits for lets it run."""
        progress = self.memory.finish_transfer(output)
        if progress is None:
            return
        if progress.request_id in self.memory.prefetches:
            self.memory.prefetches.advanced(progress.request_id, progress.num_blocks, is_over=progress.is_over)
            self._scheduler.prefix_moved(progress.request_id)
            return
        request = self._requests[progress.request_id]
        request.num_computed_tokens += progress.num_blocks * self.config.block_size
        self.memory.commit(request.request_id, request.token_ids, request.num_computed_tokens)
        if not progress.is_over:
            return
        self._scheduler.loaded(request)
        if request.finish_after_flight is not None:
            self._finish(request, request.finish_after_flight, now_ns, events)
        else:
            self._scheduler.start(request, now_ns, events)
            self.agents.scheduled(events[-1:])

    def _adapter_loaded(self, output: AdapterLoadOutput, now_ns: int, events: list[EngineEvent]) -> None:
        """Books a part of an adapter that is there; who waits for one that cannot be loaded has failed."""
        assert self.memory.adapters is not None, f"unexpected {output}"
        for request in self.memory.adapters.finish(output):
            error = f"the adapter {request.adapter} cannot be loaded: {output.error}"
            self._finish(request, FinishReason.ERROR, now_ns, events, error)

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
        if end >= request.commit_at:
            request.commit_at = self.memory.commit(request_id, request.token_ids, end)
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
        if request not in self.agents.held:  # those are in no queue of the scheduler
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
        self.agents.finished(request, reason, now_ns)

    # ---- views ----

    def locate(self, sequences: Iterable[ReadTokens]) -> Whereabouts:
        """Where the KV of sequences of tokens is. O(their blocks); changes nothing."""
        adapters = self.memory.adapters
        return self.memory.locate(
            (token_ids, salt if adapters is None else adapters.salt(salt, adapter))
            for token_ids, salt, adapter in sequences
        )

    def pins_end_ns(self, session_ids: Iterable[str]) -> int | None:
        """When the last pin of these sessions ends; None if there is none, or none that ends before the next call."""
        sessions = (self.agents.registry.sessions.get(session_id) for session_id in session_ids)
        ends_ns = (s.pinned_until_ns for s in sessions if s is not None and not s.num_waiting)
        return max((end_ns for end_ns in ends_ns if end_ns is not None), default=None)

    def stats(self) -> EngineStats:
        """A snapshot of the counters."""
        scheduler, memory = self._scheduler, self.memory
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting) + len(self.agents.held),
            num_blocks=memory.num_blocks,
            num_free_blocks=memory.num_free_blocks,
            num_cached_blocks=memory.num_cached_blocks,
            num_prefix_query_tokens=scheduler.num_prefix_query_tokens,
            num_prefix_hit_tokens=scheduler.num_prefix_hit_tokens,
            num_computed_prefill_tokens=self._num_computed_prefill_tokens,
            num_generated_tokens=self._num_generated_tokens,
            num_preemptions=scheduler.num_preemptions,
            decision=scheduler.decision,
            policies=self.agents.stats() if self.agents.is_active else None,
            num_evicted_blocks=memory.num_evicted_blocks,
            num_steps=self._num_steps,
            num_batches_prefill=self._num_batches[Lane.PREFILL],
            num_batches_decode=self._num_batches[Lane.DECODE],
            tiers=() if memory.residency is None else memory.residency.stats(),
            adapters=None if memory.adapters is None else memory.adapters.stats(),
        )

    def check_invariants(self) -> None:
        """Raises AssertionError when any part is inconsistent. For tests: it looks at everything."""
        self.memory.check_invariants()
        self._scheduler.check_invariants()
        self.agents.check_invariants()
        places = (self._scheduler.running, self._scheduler.waiting, self.agents.held)
        queued = [request.request_id for place in places for request in place]
        assert sorted(queued) == sorted(self._requests), "a request is lost or queued twice"
        if self.has_unfinished or self.is_speculating:
            # Liveness: something must be under way that will wake the driver.
            is_copying = self.memory.residency is not None and self.memory.residency.is_busy
            is_copying |= self.memory.adapters is not None and self.memory.adapters.is_busy
            is_timed = bool(self.agents.held) and self.next_deadline_ns() is not None
            is_busy = self._scheduler.in_flight or is_copying or is_timed
            assert is_busy, "requests are unfinished, but nothing will wake them"
