"""The engine core: one step function over plain inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from agentserve.core.adapters import AdapterLoadOutput, TransferOrder
from agentserve.core.batch import Batch, Lane
from agentserve.core.decode_run import DecodePlan, DecodeRun, TokenSource
from agentserve.core.events import Command, EngineEvent, RequestAdmitted, RequestPreempted
from agentserve.core.executor import Report
from agentserve.core.lifecycle import Lifecycle
from agentserve.core.memory.answers import ReadTokens, Whereabouts
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


class EngineCore(Lifecycle):
    """A deterministic function of `(now, completions, commands)`; see the design, section 2.

    Whoever drives it passes the time, hands `StepResult.batches` to an executor, and calls `step` again when there
    are completions or commands, or when `next_deadline_ns` has come. Not thread-safe: one driver, one thread.
    """

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
