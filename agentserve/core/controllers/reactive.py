"""The paper's Algorithm 1: measured time per token against two thresholds.

Above `theta_high` times the target, decode gets a larger reservation and fewer resume tokens join its batches; below
`theta_low` times the target both are relaxed; in between nothing changes (AgentServe, Algorithm 1). The paper names
neither thresholds nor steps nor the interval: they are configuration, and adr/0006 argues the defaults.
"""

from __future__ import annotations

from agentserve.config import EngineConfig
from agentserve.core.controllers import BatchObservation, ControlSignal, Decision, DecodeSteps, follow_singly
from agentserve.core.slots import PartitionTable, SlotPartition


class ReactiveController:
    """Needs no model of the device: it looks at what happened, one interval behind."""

    def __init__(self, config: EngineConfig, table: PartitionTable, tpot_target_ns: int) -> None:
        self._control = config.control
        self._prefill_chunk = config.prefill_chunk
        self._target_ns = tpot_target_ns
        self._ladder = reservations(config, table)
        # The entry nearest to the share that the user names; the larger reservation in a tie.
        total = table.whole.prefill_units
        reserved = [total - entry.prefill_units for entry in self._ladder]
        wanted = config.control.decode_share * total
        self._level = min(range(len(reserved)), key=lambda i: (abs(reserved[i] - wanted), -i))
        self._budget = min(max(config.resume_budget, self._control.min_resume_budget), self._control.max_resume_budget)
        self._sum_ns = 0
        self._num_gaps = 0
        self._changed_ns: int | None = None

    def observe(self, observation: BatchObservation) -> None:
        if observation.since_previous_decode_ns is not None:
            self._sum_ns += observation.since_previous_decode_ns
            self._num_gaps += 1

    def decide(self, signal: ControlSignal) -> Decision:
        if self._changed_ns is None:
            self._changed_ns = signal.now_ns
        if self._num_gaps and signal.now_ns - self._changed_ns >= self._control.interval_ns:
            self._adapt(self._sum_ns / self._num_gaps)
            self._sum_ns = self._num_gaps = 0
            self._changed_ns = signal.now_ns
        return Decision(self._ladder[self._level], self._budget, self._prefill_chunk)

    def follow(self, steps: DecodeSteps, present: Decision) -> tuple[int, Decision]:
        return follow_singly(self, steps, present)

    def _adapt(self, tpot_ns: float) -> None:
        control = self._control
        if tpot_ns > control.theta_high * self._target_ns:
            self._budget = max(control.min_resume_budget, self._budget - control.resume_budget_step)
            self._level = min(len(self._ladder) - 1, self._level + 1)
        elif tpot_ns < control.theta_low * self._target_ns:
            self._budget = min(control.max_resume_budget, self._budget + control.resume_budget_step)
            self._level = max(0, self._level - 1)


def reservations(config: EngineConfig, table: PartitionTable) -> tuple[SlotPartition, ...]:
    """Partitions by rising reservation for decode, as far as `control.slots` allows."""
    if config.control.slots == "stream":
        return (table.stream,)
    if config.control.slots == "cap" and table.caps:
        return table.caps[::-1]  # the less prefill has, the more is left for decode
    if config.control.slots == "off" or not table.splits:
        return (table.whole,)
    return table.splits
