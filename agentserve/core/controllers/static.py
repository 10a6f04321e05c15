"""The controller that never changes its mind."""

from __future__ import annotations

from agentserve.config import EngineConfig
from agentserve.core.controllers import BatchObservation, ControlSignal, Decision, DecodeSteps
from agentserve.core.slots import PartitionTable


class StaticController:
    """Always returns the same decision: the ablation without an algorithm, and the baseline of the adaptive ones."""

    def __init__(self, decision: Decision) -> None:
        self._decision = decision

    def observe(self, observation: BatchObservation) -> None:
        """What happened changes nothing."""

    def decide(self, signal: ControlSignal) -> Decision:  # noqa: ARG002 - the point of this controller
        return self._decision

    def follow(self, steps: DecodeSteps, present: Decision) -> tuple[int, Decision]:
        return (len(steps.ends_ns) if self._decision == present else 0), self._decision


def static_decision(config: EngineConfig, table: PartitionTable) -> Decision:
    """The decision that the configuration describes."""
    partition = {
        "auto": table.split_nearest(config.control.decode_share),
        "cap": table.cap_nearest(1.0 - config.control.decode_share),
        "stream": table.stream,
        "off": table.whole,
    }[config.control.slots]
    return Decision(partition, config.resume_budget, config.prefill_chunk)
