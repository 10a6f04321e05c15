"""Runs a recording through a fresh control plane and compares what it decides."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from agentserve.core.controllers.factory import build_controller
from agentserve.core.costmodel import CostModel
from agentserve.core.decision_log import describe
from agentserve.core.engine import EngineCore
from agentserve.core.slots import build_partition_table
from agentserve.runtime.recording import Header, Recording


@dataclass(frozen=True, slots=True)
class ReplayReport:
    """What a replay found."""

    num_steps: int
    num_decisions: int
    num_requests: int
    truncated: bool
    """The recording ends in the middle of a line."""
    divergence: str | None
    """Where and how the first difference shows, or None: all decisions are identical."""

    @property
    def identical(self) -> bool:
        return self.divergence is None


def build_core(header: Header) -> EngineCore:
    """An engine core as the header describes it. The daemon builds its own through this, too."""
    config = header.config
    table = build_partition_table(
        header.compute_units, header.unit_granularity, header.min_units, unused_units=header.unused_units
    )
    cost_model = None
    if header.device is not None and header.model_shape is not None:
        cost_model = CostModel(header.device, header.model_shape)
    controller = build_controller(config, table, cost_model) if config.scheduler == "lanes" else None
    return EngineCore(config, table, controller)


def replay(path: Path) -> ReplayReport:
    """Replays a recording. Raises RecordingError if it cannot be read."""
    recording = Recording(path)
    core = build_core(recording.header)
    num_steps = num_decisions = num_requests = 0
    for step in recording.steps():
        try:
            decisions = describe(core.step(step.now_ns, step.completions, step.commands))
        except (AssertionError, ValueError, KeyError) as error:
            # The inputs do not fit the state of this core: that, too, is a divergence.
            return ReplayReport(num_steps, num_decisions, num_requests, False, f"step {num_steps}: {error!r}")
        num_requests += sum(line.startswith("finish ") for line in decisions)
        for index, (was, now) in enumerate(zip(step.decisions, decisions, strict=False)):
            if was != now:
                divergence = f"step {num_steps}, decision {index}:\n  recorded: {was}\n  replayed: {now}"
                return ReplayReport(num_steps, num_decisions, num_requests, False, divergence)
        if len(decisions) != len(step.decisions):
            divergence = f"step {num_steps}: {len(step.decisions)} decisions recorded, {len(decisions)} replayed"
            return ReplayReport(num_steps, num_decisions, num_requests, False, divergence)
        num_steps += 1
        num_decisions += len(decisions)
    return ReplayReport(num_steps, num_decisions, num_requests, recording.truncated, None)
