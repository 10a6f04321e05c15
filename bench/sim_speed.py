"""How fast the simulator is: against real time, with many programs, and against the number of events.

`python -m bench.sim_speed --out DIR`. Wall times are the fastest of some rounds, since whatever else the machine does
can only make them longer; the process should have a core to itself. The same runs are made without booking decode steps
in one go (`simulate(fast_forward=False)`), side by side, and must give the same records.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from rich.console import Console
from rich.table import Table

from agentserve.build.simulation import build_instance
from agentserve.config import ControlConfig, EngineConfig
from agentserve.runtime.virtual import VirtualDriver
from agentserve.sim.cluster import Cluster
from agentserve.sim.orchestrator import SimulatedRun, simulate
from agentserve.sim.programs import Workload
from agentserve.sim.router import build_router
from agentserve.sim.tools import load_tool_profile, with_tool_times
from agentserve.sim.workloads import make_workload
from bench.figures.simulated import Device
from bench.figures.variants import VARIANTS
from bench.load.results import conditions

DEVICES = (("rtx-5090", "qwen2.5-7b"), ("rtx-a5000", "qwen2.5-7b"), ("rtx-pro-6000", "qwen3-32b"))
"""GPU and model of the runs with six agents. The slower the device, the less happens in a second."""
WORKLOADS = ("react", "plan_execute", "coding_agent")
TOOL_PROFILE = "swe-bench"
"""Whose tool times `coding_agent` has in the runs named after it: agents that mostly wait."""
SIZES = (125, 250, 500, 1000, 2000)
"""Programs of the runs that cost is plotted for: all at the same rate, so that the load is the same."""
_BLOCK_SIZE = 16
_ARRIVALS_PER_S = 1.0
"""Programs a second and instance where they arrive by themselves."""


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast one workload is simulated."""

    gpu: str
    model: str
    workload: str
    variant: str
    num_instances: int
    num_programs: int
    simulated_s: float
    wall_s: float
    times_real_time: float
    single_steps_wall_s: float | None
    """Without booking decode steps in one go; None: not measured."""
    num_steps: int
    num_tokens: int
    num_events: int
    """Batches, tokens, admissions and ends of calls."""
    us_per_event: float
    events_per_simulated_s: float
    """1,000,000 / (this * `us_per_event`) is `times_real_time`: what a device does in a second bounds it."""
    num_calls: int


def timed(
    make: Callable[[], VirtualDriver | Cluster], workload: Workload, rounds: int, fast: bool
) -> tuple[SimulatedRun, float]:
    """A run and the seconds of the fastest of `rounds`."""
    walls = []
    for _ in range(rounds):
        driver = make()
        started = time.perf_counter_ns()
        run = simulate(workload, driver, max_batches=0, fast_forward=fast)
        walls.append((time.perf_counter_ns() - started) / 1e9)
    return run, min(walls)


def measure(
    device: Device,
    workload: Workload,
    variant: str,
    make: Callable[[], VirtualDriver | Cluster],
    *,
    rounds: int,
    compare: bool,
) -> Speed:
    """Times one workload. Raises RuntimeError if single steps give anything else."""
    run, wall_s = timed(make, workload, rounds, True)
    single_s = None
    if compare:
        single, single_s = timed(make, workload, rounds, False)
        if single != run:
            raise RuntimeError(f"{device.profile.name}, {workload.name}: booking steps in one go changes the run")
    num_steps = sum(stats.num_steps for stats in run.stats)
    num_tokens = sum(stats.num_generated_tokens for stats in run.stats)
    num_batches = sum(stats.num_batches_prefill + stats.num_batches_decode for stats in run.stats)
    num_events = num_batches + num_tokens + 2 * len(run.records)
    simulated_s = max(record.finished_ns for record in run.records) / 1e9
    return Speed(
        gpu=device.profile.name,
        model=device.model,
        workload=workload.name,
        variant=variant,
        num_instances=len(run.stats),
        num_programs=len(workload.programs),
        simulated_s=round(simulated_s, 3),
        wall_s=round(wall_s, 4),
        times_real_time=round(simulated_s / wall_s, 1),
        single_steps_wall_s=None if single_s is None else round(single_s, 4),
        num_steps=num_steps,
        num_tokens=num_tokens,
        num_events=num_events,
        us_per_event=round(wall_s * 1e6 / num_events, 2),
        events_per_simulated_s=round(num_events / simulated_s, 1),
        num_calls=len(run.records),
    )


def six_agents(device: Device, name: str, variant: str, rounds: int, tools: str | None = None) -> Speed:
    """Six agents on one instance; `tools`: a profile that tool times are drawn from."""
    workload = make_workload(name, num_agents=6, seed=0)
    if tools is not None:
        workload = with_tool_times(workload, load_tool_profile(tools), 0)
        workload = dataclasses.replace(workload, name=f"{name}, tools={tools}")
    return measure(
        device, workload, variant, lambda: device.driver(VARIANTS[variant], workload), rounds=rounds, compare=True
    )


def many_programs(gpu: str, num_programs: int, num_instances: int, rounds: int, compare: bool) -> Speed:
    """Programs that arrive by themselves, behind a router with session affinity."""
    device = Device.load(gpu, "qwen2.5-7b")
    workload = make_workload(
        "react", num_agents=6, num_programs=num_programs, seed=0, rate=_ARRIVALS_PER_S * num_instances
    )
    config = EngineConfig(
        num_blocks=device.num_blocks,
        block_size=_BLOCK_SIZE,
        max_model_len=workload.num_context_tokens + 1,
        control=ControlConfig(tpot_target_ns=device.tpot_target_ns),
    )
    header = device.hardware.header(config)

    def make() -> Cluster:
        router = build_router("session_affinity", overload="wait", overload_calls=16)
        return Cluster([build_instance(header) for _ in range(num_instances)], router)

    return measure(device, workload, "predictive", make, rounds=rounds, compare=compare)


def fit(speeds: Sequence[Speed]) -> tuple[float, float, float]:
    """Microseconds an event, milliseconds besides, and the share of the variance that a line explains."""
    events = np.array([speed.num_events for speed in speeds], dtype=float)
    walls = np.array([speed.wall_s for speed in speeds])
    slope, rest = np.polyfit(events, walls, 1)
    residuals = walls - (slope * events + rest)
    explained = 1.0 - float(residuals @ residuals) / float(((walls - walls.mean()) ** 2).sum())
    return float(slope) * 1e6, float(rest) * 1e3, explained


def draw(speeds: Sequence[Speed], path: Path) -> None:
    """Cost against events, with the fitted line."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415 - behind the choice of a backend

    slope_us, rest_ms, explained = fit(speeds)
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    events = np.array([speed.num_events for speed in speeds])
    axes.plot(events, [speed.wall_s for speed in speeds], "o", color="#1f5f8b", label="measured")
    ends = np.array([0, events.max()])
    label = f"{slope_us:.1f} us an event {rest_ms:+.0f} ms, R² = {explained:.4f}"
    axes.plot(ends, ends * slope_us / 1e6 + rest_ms / 1e3, "--", color="#c25b2a", label=label)
    axes.set_xlabel("events (batches, tokens, admissions and ends of calls)")
    axes.set_ylabel("wall time, s")
    axes.set_title(f"react on 8 x {speeds[0].gpu}, {speeds[0].num_programs} to {speeds[-1].num_programs} programs")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str]) -> int:
    """Measures, prints tables, writes `sim_speed.json` and `sim_speed.png`."""
    parser = argparse.ArgumentParser(prog="python -m bench.sim_speed", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--programs", type=int, default=1000, help="of the large run; 0 leaves it out")
    parser.add_argument("--instances", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True, help="directory for sim_speed.json and sim_speed.png")
    arguments = parser.parse_args(argv)
    console = Console()
    alone = [
        six_agents(device, name, variant, arguments.rounds, tools)
        for device in itertools.starmap(Device.load, DEVICES)
        for name, tools in (*((name, None) for name in WORKLOADS), ("coding_agent", TOOL_PROFILE))
        for variant in ("predictive", "static", "chunked")
    ]
    _print("six agents on one instance", alone, console)
    growing = [many_programs(DEVICES[0][0], size, arguments.instances, 1, False) for size in SIZES]
    _print("cost against events", growing, console)
    slope_us, rest_ms, explained = fit(growing)
    console.print(f"{slope_us:.2f} us an event, {rest_ms:+.1f} ms besides, R² = {explained:.4f}")
    large = []
    if arguments.programs:
        large = [many_programs(DEVICES[1][0], arguments.programs, arguments.instances, 1, True)]
        _print("many programs", large, console)
    arguments.out.mkdir(parents=True, exist_ok=True)
    draw(growing, arguments.out / "sim_speed.png")
    record = {
        "conditions": {**conditions(), "command": "python -m bench.sim_speed " + shlex.join(argv)},
        "six_agents": [dataclasses.asdict(speed) for speed in alone],
        "growing": [dataclasses.asdict(speed) for speed in growing],
        "line": {"us_per_event": slope_us, "rest_ms": rest_ms, "r_squared": explained},
        "many_programs": [dataclasses.asdict(speed) for speed in large],
    }
    (arguments.out / "sim_speed.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


def _print(title: str, speeds: Sequence[Speed], console: Console) -> None:
    table = Table(title=title)
    for name in ("gpu", "model", "workload", "variant"):
        table.add_column(name)
    for name in ("instances", "programs", "simulated, s", "wall, s", "x real time", "single steps, s"):
        table.add_column(name, justify="right")
    for name in ("events a simulated s", "us an event"):
        table.add_column(name, justify="right")
    for s in speeds:
        single = "" if s.single_steps_wall_s is None else str(s.single_steps_wall_s)
        numbers = (s.num_instances, s.num_programs, s.simulated_s, s.wall_s, s.times_real_time, single)
        bounds = (s.events_per_simulated_s, s.us_per_event)
        table.add_row(s.gpu, s.model, s.workload, s.variant, *map(str, (*numbers, *bounds)))
    console.print(table)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
