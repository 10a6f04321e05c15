"""The results as text, and what seeds have in common."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.scalesim.runs import SYSTEMS, Setting

Result = Mapping[str, Any]

CONDITIONS = (
    "Simulated: H100 80 GB (profile of agentserve), Qwen2.5-7B in bfloat16, one LoRA adapter of rank 16 for each "
    "agent, adapters and KV over one PCIe 5.0 x16 link (50.4 GB/s), one copy at a time; residents 25 % of the agents, "
    "at most 125; persona of 1,400 to 1,800 tokens, observations of 24 to 72, decisions of 24 to 40; the world takes "
    "100 ms between two steps; the last 10 steps of a run, mean over calls."
)


def merged(results: Sequence[Result]) -> list[Result]:
    """One result for each setting: means over its seeds, and the results themselves as `runs`."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        setting = {name: value for name, value in result["setting"].items() if name != "seed"}
        groups.setdefault(json.dumps(setting, sort_keys=True), []).append(result)
    return [_mean_of(runs) for runs in groups.values()]


def _mean_of(runs: list[Result]) -> Result:
    numbers = [name for name, value in runs[0].items() if isinstance(value, int | float)]
    means = {name: statistics.fmean(run[name] for run in runs) for name in numbers}
    return {**means, "setting": runs[0]["setting"], "runs": runs}


def by_system(results: Sequence[Result], **fixed: Any) -> dict[str, list[Result]]:
    """For each system its results with these values in their settings, in the order of the results."""
    chosen = [r for r in results if all(r["setting"][name] == value for name, value in fixed.items())]
    return {system: [r for r in chosen if r["setting"]["system"] == system] for system in SYSTEMS}


def speedups(other: Result, ours: Result) -> list[float]:
    """For each seed, how much less time a step of the world takes, the gap between steps included."""
    return _compared(other, ours, lambda a, b: float(a["world_ms"] / b["world_ms"]))


def ttft_changes(other: Result, ours: Result) -> list[float]:
    """For each seed, by what share the mean time to the first token is longer."""
    return _compared(other, ours, lambda a, b: float(b["ttft_ms"] / a["ttft_ms"] - 1.0))


def _compared(other: Result, ours: Result, compare: Callable[[Result, Result], float]) -> list[float]:
    seeds = [run["setting"]["seed"] for run in ours["runs"]]
    assert seeds == [run["setting"]["seed"] for run in other["runs"]], "other seeds"
    return [compare(a, b) for a, b in zip(other["runs"], ours["runs"], strict=True)]


def table(by_part: Mapping[str, Sequence[Result]]) -> str:
    """A line for each setting of merged results, with the comparisons; parts one after the other."""
    lines = [CONDITIONS, "Speed-up against LRU without host tier, TTFT against the reactive host tier: mean [range]."]
    for part, results in by_part.items():
        num_seeds = len(results[0]["runs"])
        lines.append("")
        lines.append(f"{part} ({num_seeds} seed{'s' if num_seeds > 1 else ''})")
        lines.append(
            f"{'workload':12} {'agents':>6} {'fit':>4} {'model':12} {'len':>4} {'ans':>4} {'thr':>4} {'turn':>4} "
            f"{'system':13} {'active':>6} {'step ms':>8} {'TTFT ms':>8} {'p99 ms':>7} {'wait ms':>8} {'hits':>5} "
            f"{'speed-up':>18} {'TTFT':>18}"
        )
        baselines: dict[tuple[Any, ...], dict[str, Result]] = {}
        for result in results:
            baselines.setdefault(_key(result), {})[result["setting"]["system"]] = result
        lines += [_line(result, baselines[_key(result)]) for result in results]
    return "\n".join(lines) + "\n"


def _key(result: Result) -> tuple[Any, ...]:
    names = ("workload", "num_agents", "mean_action", "model", "scale", "answer_scale")
    return tuple(result["setting"][name] for name in names)


def _line(result: Result, found: Mapping[str, Result]) -> str:
    setting = result["setting"]
    faster = _spread(speedups(found["lru"], result), "{:.2f}") if "lru" in found else ""
    sooner = _spread(ttft_changes(found["hierarchical"], result), "{:+.0%}") if "hierarchical" in found else ""
    return (
        f"{setting['workload']:12} {setting['num_agents']:6} {Setting(**setting).residents:4} {setting['model']:12} "
        f"{setting['scale']:4.2g} {setting['answer_scale']:4.2g} {setting['prefetch_distance']:4.2g} "
        f"{setting['time_slice_ms']:4.4g} {setting['system']:13} "
        f"{result['active_share']:6.0%} {result['step_ms']:8.0f} {result['ttft_ms']:8.1f} {result['ttft_p99_ms']:7.0f} "
        f"{result['wait_ms']:8.1f} {result['hit_rate']:5.0%} {faster:>18} {sooner:>18}"
    )


def _spread(values: Sequence[float], form: str) -> str:
    mean = form.format(statistics.fmean(values))
    if len(values) == 1:
        return mean
    return f"{mean} [{form.format(min(values))}, {form.format(max(values))}]"
