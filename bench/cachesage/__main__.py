"""`python -m bench.cachesage --out DIR`: five multi-agent workloads in tight memory, recorded once, replayed by policy.

Each workload is recorded from clients that wait for answers, under lru; then the same calls come at the same times
under each policy. So prompts and arrivals do not depend on what is compared: live closed loops would diverge.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import shlex
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.table import Table

from agentserve.errors import AgentServeError
from agentserve.sim.multi_agent import ROUTINGS
from bench.cachesage.cases import Case, run_case
from bench.cachesage.plots import draw
from bench.cachesage.traffic import POLICY_CHANGES, Replayed
from bench.load.results import conditions

SIZES = (900, 1100, 1300, 1600)
"""KV blocks of 16 tokens: two to four times what the anchors of an application need."""
HIT_GOAL_POINTS, TTFT_GOAL = 13.0, -0.12


def rows_of(cases: Sequence[Case], results: Sequence[Sequence[Replayed]]) -> list[dict[str, object]]:
    """One row for each case and policy, with what it gains against lru."""
    rows: list[dict[str, object]] = []
    for case, replayed in zip(cases, results, strict=True):
        base = replayed[0]
        for each in replayed:
            rows.append(
                {
                    "workload": case.workload,
                    "seed": case.seed,
                    **dataclasses.asdict(each),
                    "hit_gain_points": 100.0 * (each.hit_rate - base.hit_rate),
                    "ttft_change": each.mean_ttft_ms / base.mean_ttft_ms - 1.0,
                }
            )
    return rows


def reached(rows: Sequence[dict[str, object]], policy: str) -> dict[int, list[str]]:
    """By size of the memory, the workloads on which a policy reaches both goals, as the mean of the seeds."""
    found: dict[int, list[str]] = {}
    for num_blocks in sorted({int(str(row["num_blocks"])) for row in rows}):
        here = [row for row in rows if row["num_blocks"] == num_blocks and row["policy"] == policy]
        found[num_blocks] = [
            name
            for name in dict.fromkeys(str(row["workload"]) for row in here)
            if _mean(here, name, "hit_gain_points") >= HIT_GOAL_POINTS and _mean(here, name, "ttft_change") <= TTFT_GOAL
        ]
    return found


def _mean(rows: Sequence[dict[str, object]], workload: str, name: str) -> float:
    values = [float(str(row[name])) for row in rows if row["workload"] == workload]
    return sum(values) / len(values)


def table_of(rows: Sequence[dict[str, object]]) -> Table:
    table = Table("workload", "blocks", "policy", "hits %", "points", "TTFT ms", "change %", "p99 ms")
    for row in rows:
        table.add_row(
            f"{row['workload']} ({row['seed']})",
            str(row["num_blocks"]),
            str(row["policy"]),
            f"{100.0 * float(str(row['hit_rate'])):.1f}",
            f"{row['hit_gain_points']:+.1f}",
            f"{row['mean_ttft_ms']:.0f}",
            f"{100.0 * float(str(row['ttft_change'])):+.1f}",
            f"{row['p99_ttft_ms']:.0f}",
        )
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs everything and writes `cachesage.json`, `cachesage.txt` and `cachesage.png`."""
    parser = argparse.ArgumentParser(prog="python -m bench.cachesage", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workloads", default=",".join(ROUTINGS))
    parser.add_argument("--recording", type=Path, help="calls of a daemon (serve --record) instead of the workloads")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="KV blocks")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--agents", type=int, default=6, help="tasks that run at once")
    parser.add_argument("--tasks", type=int, default=24)
    parser.add_argument("--max-num-seqs", type=int, default=4)
    parser.add_argument("--gpu", default="rtx-5090")
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args(arguments)
    console = Console(width=120)
    names = [options.recording.stem] if options.recording else options.workloads.split(",")
    cases = [
        Case(name, int(size), seed, options.agents, options.tasks, options.max_num_seqs, options.gpu, options.recording)
        for name in names
        for size in options.sizes.split(",")
        for seed in range(options.seeds)
    ]
    try:
        with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            rows = rows_of(cases, list(pool.map(run_case, cases)))
    except AgentServeError as error:
        console.print(str(error), style="red")
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    goals = {policy: reached(rows, policy) for policy in POLICY_CHANGES if policy != "lru"}
    command = shlex.join(["python", "-m", "bench.cachesage", *(sys.argv[1:] if arguments is None else arguments)])
    document = {"command": command, "conditions": conditions(), "rows": rows, "goals_reached": goals}
    (options.out / "cachesage.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    console.print(table_of(rows))
    console.print(goals)
    with (options.out / "cachesage.txt").open("w", encoding="utf-8") as file:
        Console(width=120, file=file).print(table_of(rows), goals)
    draw(rows, options.out / "cachesage.png", options.gpu)
    return 0


if __name__ == "__main__":
    sys.exit(main())
