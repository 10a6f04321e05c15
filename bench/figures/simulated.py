"""Simulated timing for figures: the daemon's control plane on a virtual clock over the cost model of a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from agentserve.build import model_shape
from agentserve.config import ControlConfig, EngineConfig
from agentserve.core.batch import Lane
from agentserve.core.costmodel import BatchShape, CostModel, DeviceProfile
from agentserve.core.slots import PartitionTable, build_partition_table
from agentserve.errors import ConfigError
from agentserve.executors.simulated.executor import SimulatedExecutor
from agentserve.models.registry import resolve_model
from agentserve.profiles import load_profile
from agentserve.runtime.recording import Header
from agentserve.runtime.replay import build_core
from agentserve.runtime.virtual import VirtualDriver
from agentserve.sim.orchestrator import SimulatedRun, simulate
from agentserve.sim.programs import Workload
from agentserve.sim.workloads import WORKLOADS, make_workload
from bench.figures.runs import Run, Source
from bench.figures.variants import (
    ABLATION,
    ABLATION_AGENTS,
    COMPARED,
    SIMPLE,
    TIMELINE,
    TIMELINE_AGENTS,
    VARIANTS,
    Variant,
)

_BLOCK_SIZE = 16
_MEMORY_SHARE = 0.9
"""As the daemon takes it: the rest is for activations."""
_CONTEXT_TOKENS = 3000
"""The usual context of the paper's workloads: the target is set there."""
_TARGET_FACTOR = 2.0
ATTACK_SCALE = 3.0
"""On a GPU attackers need prompts of 3k tokens, as the paper has, to be noticed."""
WORKLOAD_NAMES = ("react", "plan_execute")


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU and a model on it."""

    profile: DeviceProfile
    cost_model: CostModel
    model: str

    @classmethod
    def load(cls, gpu: str, model: str) -> Device:
        """Raises ConfigError or ModelError if either is not known or the model does not fit."""
        profile = load_profile(gpu)
        source = resolve_model(model)
        if source.config is None:
            raise ConfigError(f"the shape of {model} is not known, so its timing cannot be simulated")
        device = cls(profile, CostModel(profile, model_shape(source.config)), source.name)
        if device.num_blocks < 1:
            raise ConfigError(f"{model} does not fit a {profile.description}")
        return device

    @property
    def num_blocks(self) -> int:
        shape = self.cost_model.model
        pool_bytes = int(self.profile.memory_bytes * _MEMORY_SHARE) - shape.weight_bytes
        return pool_bytes // (shape.kv_bytes_per_token * _BLOCK_SIZE)

    @property
    def table(self) -> PartitionTable:
        profile = self.profile
        return build_partition_table(profile.compute_units, profile.unit_granularity, profile.min_units)

    @property
    def tpot_target_ns(self) -> int:
        """Twice the time per token of a stream that has the device to itself, at the workloads' usual context."""
        alone = BatchShape(num_decodes=1, num_decode_context=_CONTEXT_TOKENS, num_samples=1)
        return round(_TARGET_FACTOR * self.cost_model.duration_ns(alone, Lane.DECODE, self.table.whole, False))

    @property
    def conditions(self) -> str:
        provenance = self.profile.provenance.partition(":")[0]
        return f"simulated timing, {self.profile.description} ({provenance}), {self.model}"

    def driver(self, variant: Variant, workload: Workload) -> VirtualDriver:
        """A fresh engine. Raises ConfigError if the workload's window does not fit the memory."""
        config = EngineConfig(
            num_blocks=self.num_blocks,
            block_size=_BLOCK_SIZE,
            max_model_len=workload.num_context_tokens + 1,
            control=ControlConfig(tpot_target_ns=self.tpot_target_ns),
        )
        header = Header(
            config=variant.configure(config),
            compute_units=self.profile.compute_units,
            unit_granularity=self.profile.unit_granularity,
            min_units=self.profile.min_units,
            model=self.model,
            executor="simulated",
            device=self.profile,
            model_shape=self.cost_model.model,
        )
        executor = SimulatedExecutor(
            self.cost_model, num_blocks=self.num_blocks, block_size=_BLOCK_SIZE, vocabulary=range(100, 1000)
        )
        return VirtualDriver(build_core(header), executor)

    def run(self, key: str, workload: Workload) -> SimulatedRun:
        """Simulates a workload with one of `VARIANTS`."""
        return simulate(workload, self.driver(VARIANTS[key], workload))


def simulated_runs(
    device: Device,
    *,
    agents: Sequence[int],
    figures: Iterable[str],
    scale: float = 1.0,
    num_programs: int | None = None,
    seed: int = 0,
    report: Callable[[str], None] = lambda _: None,
) -> Source:
    """Runs what the figures need.

    Args:
        device: whose timing.
        agents: numbers of agents of figures 5 and 6.
        figures: names such as `fig5`.
        scale: factor on the prompts' lengths.
        num_programs: programs of each run but of those beside a victim; None as the workload has it.
        seed: of the workloads.
        report: called with a line before each run.

    Raises ConfigError if a run does not fit the device.
    """
    runs = []
    for name, num_agents, key in plan(frozenset(figures), agents):
        report(f"{device.model} on {device.profile.name}: {name}, {num_agents} agents, {key}")
        has_victim = name == "victim_attacker"
        workload = make_workload(
            name,
            num_agents=num_agents,
            num_programs=None if has_victim else num_programs,
            scale=scale * ATTACK_SCALE if has_victim else scale,
            seed=seed,
        )
        runs.append(Run(key, VARIANTS[key].label, name, num_agents, device.run(key, workload).records))
    programs = "" if num_programs is None else f", {num_programs} programs a run"
    details = f"prompts x {scale:g} (attackers' x {scale * ATTACK_SCALE:g}){programs}, seed {seed}"
    return Source("simulated", f"{device.conditions}; {details}", tuple(runs))


def plan(figures: frozenset[str], agents: Sequence[int]) -> list[tuple[str, int, str]]:
    """Workload, number of agents and variant of each run that the figures need, each once."""
    wanted: dict[tuple[str, int, str], None] = {}
    if "fig2" in figures:
        wanted.update(dict.fromkeys(("victim_attacker", TIMELINE_AGENTS, key) for key in TIMELINE))
    if figures & {"fig5", "fig6"}:
        wanted.update(dict.fromkeys((w, n, key) for w in WORKLOAD_NAMES for key in COMPARED for n in agents))
    if "fig6" in figures:
        # The targets come from a run with one agent.
        wanted.update(dict.fromkeys((w, 1, "predictive") for w in WORKLOAD_NAMES))
    if "fig7" in figures:
        wanted.update(dict.fromkeys((w, ABLATION_AGENTS, key) for w in WORKLOAD_NAMES for key in ABLATION))
    if "controllers" in figures:
        keys = ("predictive", *SIMPLE)
        wanted.update(dict.fromkeys((w, ABLATION_AGENTS, key) for w in WORKLOADS for key in keys))
    return list(wanted)
