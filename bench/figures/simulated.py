"""Simulated timing for figures: the daemon's control plane on a virtual clock over the cost model of a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from agentserve.build.simulation import build_driver, load_hardware
from agentserve.config import ControlConfig, EngineConfig
from agentserve.core.costmodel import CostModel, DeviceProfile
from agentserve.core.slots import PartitionTable
from agentserve.runtime.virtual import VirtualDriver
from agentserve.sim.hardware import Hardware
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
_CONTEXT_TOKENS = 3000
"""The usual context of the paper's workloads: the target is set there."""
_TARGET_FACTOR = 2.0
ATTACK_SCALE = 3.0
"""On a GPU attackers need prompts of 3k tokens, as the paper has, to be noticed."""
WORKLOAD_NAMES = ("react", "plan_execute")


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU and a model on it, as the figures use them."""

    hardware: Hardware
    cost_model: CostModel
    num_blocks: int

    @classmethod
    def load(cls, gpu: str, model: str) -> Device:
        """Raises ConfigError or ModelError if either is not known or the model does not fit."""
        hardware = load_hardware(gpu, model)
        return cls(hardware, hardware.cost_model, hardware.num_blocks(_BLOCK_SIZE))

    @property
    def profile(self) -> DeviceProfile:
        return self.hardware.profile

    @property
    def model(self) -> str:
        return self.hardware.model

    @property
    def table(self) -> PartitionTable:
        return self.hardware.table

    @property
    def tpot_target_ns(self) -> int:
        """Twice the time per token of a stream that has the device to itself, at the workloads' usual context."""
        return round(_TARGET_FACTOR * self.hardware.isolated_tpot_ns(_CONTEXT_TOKENS))

    @property
    def conditions(self) -> str:
        return self.hardware.conditions

    def driver(self, variant: Variant, workload: Workload) -> VirtualDriver:
        """A fresh engine. Raises ConfigError if the workload's window does not fit the memory."""
        config = EngineConfig(
            num_blocks=self.num_blocks,
            block_size=_BLOCK_SIZE,
            max_model_len=workload.num_context_tokens + 1,
            control=ControlConfig(tpot_target_ns=self.tpot_target_ns),
        )
        return build_driver(self.hardware.header(variant.configure(config)))

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
