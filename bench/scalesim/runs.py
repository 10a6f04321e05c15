"""One simulation of the evaluation: a workload, a system, a number of agents; and what is measured of it."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agentserve.build.adapters import simulated_lora
from agentserve.build.simulation import build_instance, load_hardware
from agentserve.config import ControlConfig, EngineConfig
from agentserve.core.engine import EngineCore, StepResult
from agentserve.core.events import RequestAdmitted
from agentserve.core.executor import Executor
from agentserve.models.registry import resolve_model
from agentserve.profiles.links import TierSizes, make_tiering
from agentserve.runtime.recording import Header
from agentserve.runtime.virtual import VirtualDriver
from agentserve.sim.metrics import TurnRecord
from agentserve.sim.orchestrator import SimulatedRun, simulate
from agentserve.sim.programs import Workload
from agentserve.sim.worlds import MEAN_ACTION, make_world

BLOCK_SIZE = 16
RESIDENT_SHARE, MAX_RESIDENTS = 0.25, 125
"""Of the agents, whose memory is on the device at once (ScaleSim, section 4.5 of the papers)."""
LORA_RANK = 16
MEASURED_STEPS = 10
SYSTEMS = {"lru": "LRU, no host tier", "hierarchical": "LRU + host tier, reactive", "scalesim": "invocation distance"}


@dataclass(frozen=True, slots=True)
class Setting:
    """What one simulation is about."""

    workload: str
    system: str
    """One of `SYSTEMS`."""
    num_agents: int
    mean_action: int = MEAN_ACTION
    """Of independent agents: steps that an action takes besides that of its call."""
    model: str = "qwen2.5-7b"
    gpu: str = "h100"
    scale: float = 1.0
    seed: int = 0
    prefetch_distance: float = 2.0
    answer_scale: float = 1.0
    """Factor on the length of answers."""
    time_slice_ms: float = 0.0
    """How long a call may run before it gives way to others; 0: until it ends."""

    @property
    def residents(self) -> int:
        return max(2, min(MAX_RESIDENTS, round(RESIDENT_SHARE * self.num_agents)))

    @property
    def warm_steps(self) -> int:
        """Steps that are not measured: everybody has his first call in one of them."""
        return self.mean_action + 2


def run(setting: Setting) -> dict[str, Any]:
    """Simulates; the same setting gives the same numbers."""
    workload = world(setting)
    driver = _WatchedDriver(*build_instance(engine_header(setting, workload)))
    finished = simulate(workload, driver, max_batches=0)
    measured = _measure(finished, workload, driver.admitted_ns, setting.warm_steps)
    return {"setting": dataclasses.asdict(setting), **measured}


def world(setting: Setting) -> Workload:
    """Who calls when, and what is said of it."""
    programs, steps = make_world(
        setting.workload,
        setting.num_agents,
        setting.warm_steps + MEASURED_STEPS,
        lambda num_tokens: max(1, round(num_tokens * setting.scale)),
        setting.seed,
        mean_action=None if setting.mean_action == MEAN_ACTION else setting.mean_action,
        answer_scale=setting.answer_scale,
    )
    return Workload(setting.workload, programs, None, setting.seed, steps=steps)


class _WatchedDriver(VirtualDriver):
    """Notes when each call had its memory: its adapter and what was loaded of its KV."""

    def __init__(self, core: EngineCore, executor: Executor) -> None:
        super().__init__(core, executor)
        self.admitted_ns: dict[str, int] = {}

    def step(self) -> StepResult | None:
        return self._noted(super().step())

    def advance(self) -> StepResult | None:
        return self._noted(super().advance())

    def _noted(self, result: StepResult | None) -> StepResult | None:
        for event in () if result is None else result.events:
            if isinstance(event, RequestAdmitted):
                self.admitted_ns.setdefault(event.request_id, event.at_ns)
        return result


def engine_header(setting: Setting, workload: Workload) -> Header:
    """The engine of a setting: residents as memory for so many agents, and as many slots for adapters."""
    hardware = load_hardware(setting.gpu, setting.model)
    model = resolve_model(setting.model).config
    assert model is not None
    blocks_each = -(-workload.num_context_tokens // BLOCK_SIZE) + 1
    tiering = None
    if setting.system != "lru":
        block_bytes = hardware.shape.kv_bytes_per_token * BLOCK_SIZE
        gib = (setting.num_agents + 2) * blocks_each * block_bytes / 2**30
        # Adapters come over the same link, one copy after the other: see `core.memory.load_queue`.
        tiering, _ = make_tiering(TierSizes(host_gib=gib), setting.gpu, block_bytes)
    names = [program.program_id for program in workload.programs]
    lora = simulated_lora(
        names, model, rank=LORA_RANK, max_loras=setting.residents, element_size=2, profile_name=setting.gpu
    )
    assert lora is not None
    config = EngineConfig(
        num_blocks=setting.residents * blocks_each,
        max_model_len=workload.num_context_tokens + 1,
        block_size=BLOCK_SIZE,
        max_num_seqs=setting.residents,
        max_num_batched_tokens=8192,
        scheduler="chunked",
        control=ControlConfig(),
        policy="invocation_distance" if setting.system == "scalesim" else "lru",
        prefetch_distance=setting.prefetch_distance,
        time_slice_ns=round(setting.time_slice_ms * 1e6) or None,
        tiering=tiering,
        lora=lora,
    )
    return hardware.header(config)


def _steps(run: SimulatedRun, workload: Workload, warm_steps: int) -> list[list[TurnRecord]]:
    """The calls of each step behind the warm-up."""
    step_of: dict[tuple[str, int], int] = {}
    seen: dict[str, int] = {}
    for index, step in enumerate(workload.steps):
        for program_id in step.calls:
            step_of[program_id, seen.get(program_id, 0)] = index
            seen[program_id] = seen.get(program_id, 0) + 1
    by_step: dict[int, list[TurnRecord]] = {}
    for record in run.records:
        assert record.error is None, f"{record.program_id}/{record.turn_index}: {record.error}"
        by_step.setdefault(step_of[record.program_id, record.turn_index], []).append(record)
    return [by_step[index] for index in range(warm_steps, len(workload.steps))]


def _measure(run: SimulatedRun, workload: Workload, admitted_ns: Mapping[str, int], warm_steps: int) -> dict[str, Any]:
    """Means over the steps behind the warm-up and their calls; times in milliseconds.

    `step_ms` is from the first call of a step to the end of its last one, `world_ms` with the gap behind it.
    """
    steps = _steps(run, workload, warm_steps)
    calls = [record for records in steps for record in records]
    steps_ms = [(max(r.finished_ns for r in records) - min(r.sent_ns for r in records)) / 1e6 for records in steps]
    gap_ms = statistics.fmean(step.gap_ms for step in workload.steps[warm_steps:])
    ttfts_ms = sorted((r.token_ns[0] - r.sent_ns) / 1e6 for r in calls)
    waits_ms = [(admitted_ns[f"{r.program_id}/{r.turn_index}"] - r.sent_ns) / 1e6 for r in calls]
    stats = run.stats[0]
    return {
        "num_steps": len(steps_ms),
        "num_calls": len(calls),
        "active_share": len(calls) / len(steps_ms) / len(workload.programs),
        "step_ms": statistics.fmean(steps_ms),
        "world_ms": statistics.fmean(steps_ms) + gap_ms,
        "ttft_ms": statistics.fmean(ttfts_ms),
        "ttft_p99_ms": ttfts_ms[int(0.99 * (len(ttfts_ms) - 1))],
        "wait_ms": statistics.fmean(waits_ms),
        "prefill_ms": statistics.fmean(ttfts_ms) - statistics.fmean(waits_ms),
        "decode_ms": statistics.fmean((r.finished_ns - r.token_ns[0]) / 1e6 for r in calls),
        "gap_ms": gap_ms,
        "hit_rate": sum(r.num_cached_tokens or 0 for r in calls) / sum(r.num_prompt_tokens for r in calls),
        "adapter_loads": stats.adapters.num_loads if stats.adapters else 0,
        "policies": None if stats.policies is None else dict(stats.policies.counts),
        "loaded_gb": sum(tier.loaded_bytes for tier in stats.tiers) / 1e9,
    }
