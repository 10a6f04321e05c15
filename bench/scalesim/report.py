"""The results as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.scalesim.runs import SYSTEMS

Result = Mapping[str, Any]

CONDITIONS = (
    "Simulated: H100 80 GB (profile of agentserve), Qwen2.5-7B in bfloat16, one LoRA adapter of rank 16 for each "
    "agent, adapters and KV over one PCIe 5.0 x16 link (50.4 GB/s), half of it each where both come over it; residents "
    "25 % of the agents, at most 125; persona of 1,400 to 1,800 tokens, observations of 24 to 72, decisions of 24 to "
    "40; the world takes 100 ms between two steps; steps 7 to 16 of a run, mean over calls."
)


def by_system(results: Sequence[Result], **fixed: Any) -> dict[str, list[Result]]:
    """For each system its results with these values in their settings, in the order of the results."""
    chosen = [r for r in results if all(r["setting"][name] == value for name, value in fixed.items())]
    return {system: [r for r in chosen if r["setting"]["system"] == system] for system in SYSTEMS}


def speedup(other: Result, ours: Result) -> float:
    """How much less time a step of the world takes, the gap between steps included."""
    return float(other["world_ms"] / ours["world_ms"])


def ttft_cut(other: Result, ours: Result) -> float:
    """By what share the mean time to the first token is shorter."""
    return float(1.0 - ours["ttft_ms"] / other["ttft_ms"])


def table(by_part: Mapping[str, Sequence[Result]]) -> str:
    """A line for each setting, with the comparisons; parts one after the other."""
    lines = [CONDITIONS, ""]
    for part, results in by_part.items():
        lines.append(part)
        lines.append(
            f"{'workload':12} {'agents':>6} {'on device':>9} {'model':12} {'len':>4} {'thr':>4} {'system':13} "
            f"{'active':>6} "
            f"{'step ms':>8} {'TTFT ms':>8} {'p99 ms':>7} {'wait ms':>8} {'hits':>5} {'speed-up':>8} {'TTFT':>6}"
        )
        baselines: dict[tuple[Any, ...], dict[str, Result]] = {}
        for result in results:
            baselines.setdefault(_key(result), {})[result["setting"]["system"]] = result
        for result in results:
            found = baselines[_key(result)]
            lines.append(_line(result, found))
        lines.append("")
    return "\n".join(lines) + "\n"


def _key(result: Result) -> tuple[Any, ...]:
    names = ("workload", "num_agents", "num_residents", "model", "scale")
    return tuple(result["setting"][name] for name in names)


def residents_of(result: Result) -> int:
    """Agents whose memory fits the device."""
    setting = result["setting"]
    return int(setting["num_residents"] or max(2, min(125, round(0.25 * setting["num_agents"]))))


def _line(result: Result, found: Mapping[str, Result]) -> str:
    setting = result["setting"]
    faster = f"{speedup(found['lru'], result):8.2f}" if "lru" in found else " " * 8
    sooner = f"{-ttft_cut(found['hierarchical'], result):+6.0%}" if "hierarchical" in found else " " * 6
    return (
        f"{setting['workload']:12} {setting['num_agents']:6} {residents_of(result):9} {setting['model']:12} "
        f"{setting['scale']:4.2g} {setting['prefetch_distance']:4.2g} {setting['system']:13} "
        f"{result['active_share']:6.0%} {result['step_ms']:8.0f} {result['ttft_ms']:8.1f} {result['ttft_p99_ms']:7.0f} "
        f"{result['wait_ms']:8.1f} {result['hit_rate']:5.0%} {faster} {sooner}"
    )
