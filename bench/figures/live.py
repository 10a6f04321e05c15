"""Live runs for figures: read from what `bench/run.py` has written, or measured here on our own daemon."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from agentserve.sim.metrics import TurnRecord
from agentserve.sim.workloads import make_workload
from bench.figures.runs import Run, Source
from bench.figures.simulated import plan
from bench.figures.variants import TIMELINE_AGENTS, VARIANTS
from bench.load.compare import Comparison
from bench.load.endpoint import NamedWorkload
from bench.load.errors import BenchError
from bench.load.results import Results, RunResult, load
from bench.load.servers import ServerSpec

_DETAILS = re.compile(r"(scale [\d.]+)")
"""What the captions say of titles such as `react (4 agents, 12 programs, scale 0.33)`."""
_SERVER_PREFIX = "agentserve"
_PROMPT_SEEDS = 1000
"""Seeds of prompts that belong to one seed of a workload."""
"""Servers of scenarios are named `agentserve` (our default) and `agentserve-VARIANT`."""


def live_runs(directory: Path) -> Source | None:
    """Runs from all `results.json` in a directory and below it; None if there are none.

    Raises BenchError for files that cannot be read and for a directory that is not there.
    """
    if not directory.is_dir():
        raise BenchError(f"there is no directory {directory}")
    paths = sorted(directory.rglob("results.json"))
    return to_source(load(paths)) if paths else None


async def measure(
    *,
    figures: Iterable[str],
    agents: Sequence[int],
    out: Path,
    scale: float,
    num_programs: int | None,
    seed: int,
    options: Sequence[str] = (),
) -> None:
    """Starts our daemon with each configuration that the figures need and runs the workloads on it.

    Args:
        figures: names such as `fig5`.
        agents: numbers of agents of figures 5 and 6.
        out: for `results.json` and the daemons' logs.
        scale: factor on the prompts of `react` and `plan_execute`; those of the attackers have 1,000 tokens.
        num_programs: programs of each of these runs; None as the workload has it.
        seed: of the workloads.
        options: of `agentserve serve`, for every configuration.

    Raises BenchError if no daemon gave a result.
    """
    named: dict[str, list[NamedWorkload]] = {}
    for name, num_agents, key in plan(frozenset(figures), agents):
        has_victim = name == "victim_attacker"
        workload = make_workload(
            name,
            num_agents=num_agents,
            num_programs=None if has_victim else num_programs,
            scale=1.0 if has_victim else scale,
            seed=seed,
        )
        # The same work for any number of agents, but in words of its own: the daemon still knows those of the last run.
        workload = dataclasses.replace(workload, seed=_PROMPT_SEEDS * seed + num_agents)
        detail = f"{num_agents} agents, {len(workload.programs)} programs" + (
            "" if has_victim else f", scale {scale:g}"
        )
        named.setdefault(key, []).append(NamedWorkload(f"{name} ({detail})", workload))
    for key, workloads in named.items():
        await _run_variant(key, workloads, out / key, seed, options)


async def _run_variant(
    key: str, workloads: Sequence[NamedWorkload], out: Path, seed: int, options: Sequence[str]
) -> None:
    comparison = Comparison(
        servers=[server_of(key, options)], values={}, workloads=lambda _: workloads, rounds=1, out=out, seed=seed
    )
    await comparison.run()


def server_of(key: str, options: Sequence[str] = ()) -> ServerSpec:
    """Our daemon in one of `VARIANTS`."""
    variant = VARIANTS[key]
    name = _SERVER_PREFIX if key == "predictive" else f"{_SERVER_PREFIX}-{key}"
    return ServerSpec(
        name=name,
        kind=_SERVER_PREFIX,
        label=variant.label,
        setting="default",
        base_url="http://127.0.0.1:{port}/v1",
        command=("{python}", "-m", "agentserve", "serve", "--port", "{port}", *options, *variant.options),
        ready="http://127.0.0.1:{port}/ready",
    )


def to_source(results: Results) -> Source:
    """Rounds of the same server and workload become one run. `records` of a victim's stream are the first round's."""
    groups: dict[tuple[str, str, int], list[RunResult]] = {}
    for run in results.runs:
        workload = _workload_name(run.workload)
        num_agents = TIMELINE_AGENTS if workload == "victim_attacker" else run.num_agents
        if num_agents is not None:
            groups.setdefault((run.server.name, workload, num_agents), []).append(run)
    runs = []
    for (name, workload, num_agents), rounds in groups.items():
        key = _variant_key(name)
        label = VARIANTS[key].label if key in VARIANTS else rounds[0].server.title
        records = rounds[0].records if workload == "victim_attacker" else _pooled(rounds)
        each = tuple(tuple(run.records) for run in rounds)
        runs.append(Run(key, label, workload, num_agents, records, rounds[0].server.setting, each))
    conditions = results.conditions
    models = sorted({run.server.model for run in results.runs} - {""})
    details = sorted({found[1] for run in results.runs if (found := _DETAILS.search(run.workload))})
    parts = (
        f"measured: {', '.join(models)} on {conditions['machine']}, commit {conditions['commit']}",
        ", ".join(details),
    )
    return Source("live", "; ".join(part for part in parts if part), tuple(runs))


def _variant_key(server: str) -> str:
    if server == _SERVER_PREFIX:
        return "predictive"
    return server.removeprefix(f"{_SERVER_PREFIX}-")


def _workload_name(title: str) -> str:
    """Titles of workloads begin with their names."""
    found = re.match(r"\w+", title)
    return found[0] if found else title


def _pooled(rounds: Sequence[RunResult]) -> tuple[TurnRecord, ...]:
    """The rounds one after the other, as if they were one run: so the throughput is that of all of them."""
    records: list[TurnRecord] = []
    offset_ns = 0
    for run in sorted(rounds, key=lambda run: run.round):
        if not run.records:
            continue
        start_ns = offset_ns - min(record.sent_ns for record in run.records)
        records += [_shifted(record, start_ns, f"{run.round}/") for record in run.records]
        offset_ns = max(record.finished_ns for record in records)
    return tuple(records)


def _shifted(record: TurnRecord, by_ns: int, prefix: str) -> TurnRecord:
    return dataclasses.replace(
        record,
        program_id=prefix + record.program_id,
        sent_ns=record.sent_ns + by_ns,
        token_ns=tuple(at_ns + by_ns for at_ns in record.token_ns),
        finished_ns=record.finished_ns + by_ns,
    )
