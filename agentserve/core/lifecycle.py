"""What becomes of requests: they come, are computed, get tokens and end."""

from __future__ import annotations

import dataclasses

from agentserve.config import EngineConfig
from agentserve.core.adapters import AdapterLoadOutput
from agentserve.core.agents import AgentRuntime, Seats, build_policies
from agentserve.core.batch import BatchOutput, Lane, ScheduledChunk, TokenSample
from agentserve.core.controllers import Controller
from agentserve.core.events import (
    Command,
    EngineEvent,
    FlushTiers,
    NoteTurn,
    PrefillProgress,
    RequestFinished,
    RequestStats,
    SetDistances,
    Speculate,
    SubmitRequest,
    TokenGenerated,
)
from agentserve.core.memory.manager import MemoryManager
from agentserve.core.memory.modules import AdapterModule
from agentserve.core.memory.residency import RecomputeCost
from agentserve.core.request import FinishReason, Request, RequestStatus
from agentserve.core.scheduler import build_scheduler
from agentserve.core.slots import PartitionTable
from agentserve.core.transfers import TransferOutput


class Lifecycle:
    """The parts of an engine core, and what commands and completions do to its requests."""

    def __init__(
        self,
        config: EngineConfig,
        table: PartitionTable,
        controller: Controller | None,
        recompute_ns: RecomputeCost | None = None,
        seats: Seats | None = None,
    ) -> None:
        """Makes the parts of an idle core.

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
        self._has_told_policies = False
        """Whether they know something that they have had no chance to act on."""
        self._num_batches = dict.fromkeys(Lane, 0)
        self._num_computed_prefill_tokens = 0
        self._num_generated_tokens = 0

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

    def _queue(self, request: Request) -> None:
        if self._scheduler.waiting.add(request):
            self.agents.counts["reorders"] += 1
        if self.memory.adapters is not None:
            self.memory.adapters.on_request(request)

    # ---- completions ----

    def _complete(self, output: BatchOutput, now_ns: int, events: list[EngineEvent]) -> None:
        batch = self._scheduler.in_flight.get(output.lane)
        assert batch is not None and batch.batch_id == output.batch_id, f"unexpected {output}"
        still_flying = self._scheduler.batch_done(output)
        self._num_batches[output.lane] += 1
        samples, error, requests = iter(output.samples), output.error, self._requests
        for chunk in batch.chunks:
            request_id = chunk.request_id
            sample = None if chunk.sample is None else next(samples, None)
            request = requests.get(request_id)
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
