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
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Gain:
    """What a policy gains against lru on a workload in one size of memory, over the seeds: mean, least and most."""

    workload: str
    num_blocks: int
    policy: str
    hit_rate: float
    """Mean."""
    hit_points: tuple[float, float, float]
    ttft_change: tuple[float, float, float]

    @property
    def reaches_goals(self) -> bool:
        """In the mean."""
        return self.hit_points[0] >= HIT_GOAL_POINTS and self.ttft_change[0] <= TTFT_GOAL


def gains_of(rows: Sequence[dict[str, object]]) -> list[Gain]:
    """Over the seeds, in the order of the rows."""
    by_case: dict[tuple[str, int, str], list[dict[str, object]]] = {}
    for row in rows:
        key = (str(row["workload"]), int(str(row["num_blocks"])), str(row["policy"]))
        by_case.setdefault(key, []).append(row)
    return [
        Gain(*key, _spread(each, "hit_rate")[0], _spread(each, "hit_gain_points"), _spread(each, "ttft_change"))
        for key, each in by_case.items()
    ]


def _spread(rows: Sequence[dict[str, object]], name: str) -> tuple[float, float, float]:
    values = [float(str(row[name])) for row in rows]
    return sum(values) / len(values), min(values), max(values)


def reached(gains: Sequence[Gain], policy: str) -> dict[int, list[str]]:
    """By size of the memory, the workloads on which a policy reaches both goals."""
    mine = [gain for gain in gains if gain.policy == policy]
    return {
        num_blocks: [gain.workload for gain in mine if gain.num_blocks == num_blocks and gain.reaches_goals]
        for num_blocks in sorted({gain.num_blocks for gain in mine})
    }


def summary_of(gains: Sequence[Gain]) -> Table:
    table = Table("workload", "blocks", "policy", "hits %", "points (range)", "TTFT change % (range)", "goals")
    for gain in gains:
        mean, least, most = gain.hit_points
        change, best, worst = (100.0 * value for value in gain.ttft_change)
        if gain.policy != "lru":
            points = f"{mean:+.1f} ({least:+.1f} to {most:+.1f})"
            times = f"{change:+.0f} ({best:+.0f} to {worst:+.0f})"
        else:
            points = times = ""
        hits = f"{100.0 * gain.hit_rate:.1f}"
        table.add_row(
            gain.workload, str(gain.num_blocks), gain.policy, hits, points, times, "yes" if gain.reaches_goals else ""
        )
    return table


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
    parser.add_argument("--seeds", default="0", help="such as 2,3,4,5")
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
        for seed in map(int, options.seeds.split(","))
    ]
    try:
        with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            rows = rows_of(cases, list(pool.map(run_case, cases)))
    except AgentServeError as error:
        console.print(str(error), style="red")
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    gains = gains_of(rows)
    goals = {policy: reached(gains, policy) for policy in POLICY_CHANGES if policy != "lru"}
    words = sys.argv[1:] if arguments is None else arguments
    # Paths of this machine say nothing to others.
    command = shlex.join(
        ["python", "-m", "bench.cachesage", *(Path(w).name if w.startswith("/") else w for w in words)]
    )
    document = {
        "command": command,
        "conditions": conditions(),
        "rows": rows,
        "gains": [dataclasses.asdict(gain) for gain in gains],
        "goals_reached": goals,
    }
    (options.out / "cachesage.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    console.print(summary_of(gains), goals)
    with (options.out / "cachesage.txt").open("w", encoding="utf-8") as file:
        Console(width=120, file=file).print(summary_of(gains), goals, table_of(rows))
    draw(rows, options.out / "cachesage.png", options.gpu)
    return 0


if __name__ == "__main__":
    sys.exit(main())
