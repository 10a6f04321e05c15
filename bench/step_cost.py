"""What the control plane itself costs: microseconds of Python a decode step, and the speed of a simulated run.

`python -m bench.step_cost`. A step is one call of `EngineCore.step` that takes a finished decode batch and makes the
next one; the executor's part is not in it. Batches last as long as the cost model says, so controllers see what they
see on the device; nothing but Python's own time is measured. The process should have a core to itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from agentserve.build.simulation import build_instance
from agentserve.config import ControlConfig, EngineConfig
from agentserve.core.batch import Lane
from agentserve.core.events import RequestFinished, SubmitRequest
from agentserve.core.request import SamplingParams
from agentserve.sim.orchestrator import simulate
from agentserve.sim.workloads import make_workload
from bench.figures.simulated import Device
from bench.figures.variants import VARIANTS
from bench.load.results import conditions

WAYS: Mapping[str, dict[str, Any]] = {
    "predictive": {},
    "predictive, look-ahead": {"decode_lookahead": 2},
    "reactive": {"control": "reactive"},
    "static": {"control": "static"},
    "chunked": {"scheduler": "chunked", "max_num_batched_tokens": 512},
}
"""Fields of EngineConfig; `control` is the name of a controller."""
NUM_DECODES = (1, 8, 64)
_CONTEXT, _PROMPT = 1024, 8192
_NUM_PROMPTS = 3
_WARM_UP = 50
_BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class StepCost:
    """Python's time for steps of one kind."""

    controller: str
    num_decodes: int
    num_prompts: int
    """Prompts of 8,192 tokens that are waiting or being read all the time."""
    num_steps: int
    median_us: float
    mean_us: float
    p95_us: float


class _Load:
    """An engine with a constant number of decodes, and of prompts beside them."""

    def __init__(self, device: Device, way: Mapping[str, Any], num_decodes: int, num_prompts: int, steps: int) -> None:
        values = dict(way)
        control = ControlConfig(controller=values.pop("control", "predictive"), tpot_target_ns=device.tpot_target_ns)
        output = 4 * (_WARM_UP + steps) + 10_000
        tokens = num_decodes * (_CONTEXT + output) + (num_prompts + 1) * _PROMPT
        config = EngineConfig(
            num_blocks=tokens // _BLOCK_SIZE + 1000,
            max_model_len=_PROMPT + output,
            block_size=_BLOCK_SIZE,
            max_num_seqs=num_decodes + num_prompts,
            control=control,
            **values,
        )
        self._core, self._executor = build_instance(device.hardware.header(config))
        self._num_submitted = 0
        self._now_ns = 0
        self._commands = [self._submit(_CONTEXT, output) for _ in range(num_decodes)]
        while self._core.stats().num_computed_prefill_tokens < num_decodes * _CONTEXT:
            self.step()
        self._commands = [self._submit(_PROMPT, 1) for _ in range(num_prompts)]

    def _submit(self, num_tokens: int, max_tokens: int) -> SubmitRequest:
        self._num_submitted += 1
        first = 1_000_000 * self._num_submitted  # no two prompts begin alike
        prompt = tuple(range(first, first + num_tokens))
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, seed=self._num_submitted)
        return SubmitRequest(f"request-{self._num_submitted}", prompt, sampling)

    def step(self) -> float | None:
        """One step. Microseconds if it was one that counts: a decode batch ended, and nothing came or went."""
        due = self._executor.next_completion_ns()
        self._now_ns = self._now_ns if due is None else max(due, self._now_ns)
        completions, commands = self._executor.poll(self._now_ns), self._commands
        started = time.perf_counter_ns()
        result = self._core.step(self._now_ns, completions, commands)
        took_us = (time.perf_counter_ns() - started) / 1e3
        for batch in result.batches:
            self._executor.submit(batch, self._now_ns)
        # A prompt ends with its first token, and another one takes its place.
        ended = sum(isinstance(event, RequestFinished) for event in result.events)
        self._commands = [self._submit(_PROMPT, 1) for _ in range(ended)]
        counts = not commands and not ended and {output.lane for output in completions} == {Lane.DECODE}
        return took_us if counts else None


def measure(device: Device, controller: str, num_decodes: int, num_prompts: int, steps: int) -> StepCost:
    """Times `steps` steps of one kind, after some that are not counted."""
    load = _Load(device, WAYS[controller], num_decodes, num_prompts, steps)
    for _ in range(_WARM_UP):
        load.step()
    took: list[float] = []
    while len(took) < steps:
        took_us = load.step()
        if took_us is not None:
            took.append(took_us)
    took.sort()
    return StepCost(
        controller=controller,
        num_decodes=num_decodes,
        num_prompts=num_prompts,
        num_steps=steps,
        median_us=round(statistics.median(took), 1),
        mean_us=round(statistics.fmean(took), 1),
        p95_us=round(took[int(0.95 * steps)], 1),
    )


@dataclass(frozen=True, slots=True)
class RunSpeed:
    """How fast a workload is simulated."""

    variant: str
    num_agents: int
    simulated_s: float
    wall_s: float
    """The fastest of some runs: whatever else the machine does can only make it longer."""
    times_real_time: float
    events_per_s: float
    """Batches and tokens."""
    us_per_step: float
    num_steps: int
    num_batches: int
    num_generated_tokens: int


def measure_run(device: Device, variant: str, num_agents: int, rounds: int) -> RunSpeed:
    """Simulates `react` with the bench's own orchestrator."""
    walls: list[float] = []
    for _ in range(rounds):
        workload = make_workload("react", num_agents=num_agents, seed=0)
        driver = device.driver(VARIANTS[variant], workload)
        started = time.perf_counter_ns()
        run = simulate(workload, driver)
        walls.append((time.perf_counter_ns() - started) / 1e9)
    simulated_s, wall_s = max(record.finished_ns for record in run.records) / 1e9, min(walls)
    stats = driver.core.stats()
    num_batches = stats.num_batches_prefill + stats.num_batches_decode
    return RunSpeed(
        variant=variant,
        num_agents=num_agents,
        simulated_s=round(simulated_s, 2),
        wall_s=round(wall_s, 4),
        times_real_time=round(simulated_s / wall_s, 1),
        events_per_s=round((num_batches + stats.num_generated_tokens) / wall_s),
        us_per_step=round(wall_s / stats.num_steps * 1e6, 1),
        num_steps=stats.num_steps,
        num_batches=num_batches,
        num_generated_tokens=stats.num_generated_tokens,
    )


def main(argv: Sequence[str]) -> int:
    """Measures, prints tables, writes JSON if `--out` is given."""
    parser = argparse.ArgumentParser(prog="python -m bench.step_cost", description=__doc__)
    parser.add_argument("--gpu", default="rtx-5090", help="profile whose timing is simulated")
    parser.add_argument("--model", default="qwen2.5-7b")
    parser.add_argument("--steps", type=int, default=1000, help="that are timed of each kind")
    parser.add_argument("--only", choices=list(WAYS), nargs="*", default=list(WAYS))
    parser.add_argument("--agents", type=int, default=6, help="of the simulated run; 0 leaves it out")
    parser.add_argument("--rounds", type=int, default=3, help="of the simulated run")
    parser.add_argument("--out", type=Path, help="directory for step_cost.json")
    arguments = parser.parse_args(argv)
    device = Device.load(arguments.gpu, arguments.model)
    costs = [
        measure(device, controller, num_decodes, num_prompts, arguments.steps)
        for controller in arguments.only
        for num_prompts in (0, _NUM_PROMPTS)
        for num_decodes in NUM_DECODES
    ]
    variants = ("predictive", "static", "chunked") if arguments.agents else ()
    runs = [measure_run(device, variant, arguments.agents, arguments.rounds) for variant in variants]
    title = f"timing of {device.conditions}"
    console = Console()
    _print_costs(costs, title, console)
    _print_runs(runs, title, console)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        command = "python -m bench.step_cost " + shlex.join(argv)
        record = {
            "conditions": {**conditions(), "command": command, "what": title},
            "steps": [dataclasses.asdict(cost) for cost in costs],
            "runs": [dataclasses.asdict(run) for run in runs],
        }
        (arguments.out / "step_cost.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


def _print_costs(costs: list[StepCost], title: str, console: Console) -> None:
    table = Table(title=f"a decode step of the control plane, microseconds; {title}")
    for name in ("controller", "decodes", "prompts", "median", "mean", "p95"):
        table.add_column(name, justify="left" if name == "controller" else "right")
    for cost in costs:
        numbers = (cost.num_decodes, cost.num_prompts, cost.median_us, cost.mean_us, cost.p95_us)
        table.add_row(cost.controller, *map(str, numbers))
    console.print(table)


def _print_runs(runs: list[RunSpeed], title: str, console: Console) -> None:
    table = Table(title=f"a simulated run of react; {title}")
    for name in ("variant", "agents", "simulated, s", "wall, s", "times real time", "events/s", "us a step", "steps"):
        table.add_column(name, justify="left" if name == "variant" else "right")
    for run in runs:
        numbers = (run.num_agents, run.simulated_s, run.wall_s, run.times_real_time, run.events_per_s, run.us_per_step)
        table.add_row(run.variant, *map(str, numbers), str(run.num_steps))
    console.print(table)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
