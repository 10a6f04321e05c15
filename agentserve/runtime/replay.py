"""Runs a recording through a fresh control plane and compares what it decides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from agentserve.core.agents.costs import ForwardCosts
from agentserve.core.agents.factory import POLICIES, PolicyFactory, build_policies
from agentserve.core.batch import Lane
from agentserve.core.controllers.factory import build_controller
from agentserve.core.costmodel import BatchShape, CostModel
from agentserve.core.decision_log import describe
from agentserve.core.engine import EngineCore
from agentserve.core.memory.residency import RecomputeCost
from agentserve.core.slots import PartitionTable, build_partition_table
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


def build_core(header: Header, factories: Mapping[str, PolicyFactory] = POLICIES) -> EngineCore:
    """An engine core as the header describes it. The daemon builds its own through this, too.

    Raises ConfigError if a policy is not in `factories`, or needs a profile of the device and the header has none.
    """
    config = header.config
    table = build_partition_table(
        header.compute_units, header.unit_granularity, header.min_units, unused_units=header.unused_units
    )
    cost_model = None
    if header.device is not None and header.model_shape is not None:
        cost_model = CostModel(header.device, header.model_shape)
    controller = build_controller(config, table, cost_model) if config.scheduler == "lanes" else None
    costs = None if cost_model is None else ForwardCosts.of(cost_model, table, config.max_num_batched_tokens)
    return EngineCore(
        config,
        table,
        controller,
        None if cost_model is None else prefill_cost(cost_model, table),
        build_policies(config, costs, factories),
    )


def prefill_cost(cost_model: CostModel, table: PartitionTable) -> RecomputeCost:
    """What computing KV costs: a prompt's duration alone on the whole device, in one batch."""

    def recompute_ns(start: int, num_tokens: int) -> int:
        shape = BatchShape().with_prefill(num_tokens, start)
        return cost_model.duration_ns(shape, Lane.PREFILL, table.whole, False)

    return recompute_ns


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
