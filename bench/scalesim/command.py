"""`python -m bench.scalesim`: runs what is not done yet, draws the figures, writes the table."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from agentserve.sim.sweep import code_version
from bench.scalesim.plots import draw_all
from bench.scalesim.report import merged, table
from bench.scalesim.runs import SYSTEMS, Setting, run

WORKLOADS = ("independent", "interaction", "diffusion")
AGENTS = (25, 50, 100, 250, 500, 1000)
_MEAN_ACTIONS = (19, 9, 6, 4, 3, 2)
"""Of the figure of densities: one in 20 to one in 3 agents is active."""
_MODELS = ("qwen2.5-3b", "qwen2.5-7b", "qwen3-14b", "qwen3-32b")


def plan(agents: Sequence[int]) -> dict[str, list[Setting]]:
    """The settings of each part of the evaluation, with one seed. A setting that two parts have is simulated once."""
    middle = min(agents, key=lambda count: abs(count - 250))
    return {
        "main": [Setting(w, s, count) for count in agents for w in WORKLOADS for s in SYSTEMS],
        "density": [
            Setting("independent", s, count, steps)
            for count in dict.fromkeys((middle, min(agents, key=lambda count: abs(count - 500))))
            for steps in _MEAN_ACTIONS
            for s in SYSTEMS
        ],
        "models": [Setting("independent", s, min(middle, 100), model=m) for m in _MODELS for s in SYSTEMS],
        "lengths": [Setting("independent", s, middle, scale=x) for x in (0.25, 0.5, 1.0, 2.0) for s in SYSTEMS],
        "answers": [
            Setting(w, s, max(agents), answer_scale=x)
            for w in WORKLOADS
            for x in (0.25, 0.5, 1.0, 2.0, 4.0)
            for s in SYSTEMS
            if s != "lru"
        ],
        "slices": [
            Setting(w, s, count, time_slice_ms=x)
            for count in dict.fromkeys((min(agents, key=lambda count: abs(count - 500)), max(agents)))
            for w in WORKLOADS
            for s, x in (("lru", 0.0), ("hierarchical", 0.0), *(("scalesim", x) for x in (0.0, 100.0, 150.0, 200.0)))
        ],
        "threshold": [
            Setting(w, "scalesim", middle, prefetch_distance=x) for w in WORKLOADS for x in (0.0, 1.5, 2.0, 3.0, 5.0)
        ],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.scalesim", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory of results, table and figures")
    parser.add_argument("--agents", default=",".join(map(str, AGENTS)), help="numbers of agents")
    parser.add_argument("--parts", default=",".join(plan(AGENTS)), help="parts of the evaluation")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each setting, with other workloads")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    arguments = parser.parse_args(argv)
    parts = plan([int(count) for count in arguments.agents.split(",")])
    wanted = arguments.parts.split(",")
    unknown = [name for name in wanted if name not in parts]
    if unknown:
        parser.error(f"--parts: there is no {unknown[0]!r}; there are {', '.join(parts)}")
    if arguments.seeds < 1:
        parser.error(f"--seeds: expected at least 1, not {arguments.seeds}")
    seeds = range(arguments.seeds)
    chosen = {name: [dataclasses.replace(s, seed=seed) for s in parts[name] for seed in seeds] for name in wanted}
    out: Path = arguments.out
    results = simulated([s for settings in chosen.values() for s in settings], out / "cells", arguments.jobs)
    by_part = {name: [results[setting] for setting in settings] for name, settings in chosen.items()}
    (out / "results.json").write_text(json.dumps(by_part, indent=1) + "\n", encoding="utf-8")
    means = {name: merged(found) for name, found in by_part.items()}
    text = table(means)
    (out / "table.txt").write_text(text, encoding="utf-8")
    draw_all(means, out)
    print(text, end="")
    return 0


def simulated(settings: Iterable[Setting], directory: Path, num_jobs: int) -> dict[Setting, dict[str, Any]]:
    """The results of all settings; those that `directory` holds, made by this code, are not simulated again."""
    directory.mkdir(parents=True, exist_ok=True)
    results: dict[Setting, dict[str, Any]] = {}
    missing = []
    for setting in dict.fromkeys(settings):
        path = _path(directory, setting)
        if path.is_file():
            results[setting] = json.loads(path.read_text(encoding="utf-8"))
        else:
            missing.append(setting)
    # The largest last: what is there after an interruption is then the most.
    missing.sort(key=lambda setting: (setting.seed, setting.num_agents))
    with ProcessPoolExecutor(max(1, num_jobs)) as pool:
        futures = {pool.submit(run, setting): setting for setting in missing}
        for future in as_completed(futures):
            setting = futures[future]
            results[setting] = future.result()
            part = _path(directory, setting).with_suffix(".part")
            part.write_text(json.dumps(results[setting]) + "\n", encoding="utf-8")
            part.replace(_path(directory, setting))
            print(f"{setting.workload}, {setting.num_agents} agents, {setting.system}: done", flush=True)
    return results


def _path(directory: Path, setting: Setting) -> Path:
    text = json.dumps([dataclasses.asdict(setting), _VERSION], sort_keys=True)
    return directory / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


_VERSION = code_version()
