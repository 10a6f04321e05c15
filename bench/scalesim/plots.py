"""The counterparts of the paper's figures 8 to 13, in this order: speed-up, TTFT, time per step, density, models,
breakdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from bench.load.style import add_caption, plain_numbers, plt, save_figure
from bench.scalesim.report import CONDITIONS, Result, by_system, speedups, ttft_changes
from bench.scalesim.runs import SYSTEMS, Setting

_COLORS = {"lru": "#c17817", "hierarchical": "#d1495b", "scalesim": "#30638e"}
_MARKERS = {"lru": "s", "hierarchical": "D", "scalesim": "o"}
_PARTS = {"wait_ms": "load and wait", "prefill_ms": "prefill", "decode_ms": "decode"}
_PART_COLORS = {"wait_ms": "#d1495b", "prefill_ms": "#edae49", "decode_ms": "#30638e"}


def draw_all(by_part: Mapping[str, Sequence[Result]], out: Path) -> list[Path]:
    """Draws what there are results for; returns the files."""
    paths = []
    if "main" in by_part:
        main = by_part["main"]
        paths += [_speedups(main, out), _ttfts(main, out), _steps(main, out), _breakdown(main, out)]
    if "density" in by_part:
        paths.append(_density(by_part["density"], out))
    if "models" in by_part:
        paths.append(_models(by_part["models"], out))
    return paths


def _panels(results: Sequence[Result], draw: Callable[[Axes, dict[str, list[Result]]], None], title: str) -> Any:
    """A panel for each workload, with a common legend."""
    workloads = list(dict.fromkeys(result["setting"]["workload"] for result in results))
    figure, axes = plt.subplots(1, len(workloads), figsize=(4.2 * len(workloads), 4.2), squeeze=False, sharey=True)
    figure.set_layout_engine("constrained")
    for axis, workload in zip(axes[0], workloads, strict=True):
        draw(axis, by_system(results, workload=workload))
        axis.set_title(workload)
        axis.set_xlabel("agents")
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.suptitle(title)
    add_caption(figure, CONDITIONS)
    return figure, axes[0]


def _agents(results: Sequence[Result]) -> list[int]:
    return [result["setting"]["num_agents"] for result in results]


def _lines(axis: Axes, systems: Mapping[str, Sequence[Result]], value: str) -> None:
    for system, results in systems.items():
        numbers = [result[value] for result in results]
        axis.plot(
            _agents(results), numbers, color=_COLORS[system], marker=_MARKERS[system], label=SYSTEMS[system], ms=5
        )
    axis.set_xscale("log")
    axis.set_yscale("log")
    plain_numbers(axis.xaxis, (1.0, 2.5, 5.0))
    plain_numbers(axis.yaxis)


def _speedups(results: Sequence[Result], out: Path) -> Path:
    def draw(axis: Axes, systems: dict[str, list[Result]]) -> None:
        for shift, system in ((-0.2, "hierarchical"), (0.2, "scalesim")):
            runs = [speedups(lru, ours) for lru, ours in zip(systems["lru"], systems[system], strict=True)]
            values = [statistics.fmean(found) for found in runs]
            ranges = [
                [mean - min(found) for mean, found in zip(values, runs, strict=True)],
                [max(found) - mean for mean, found in zip(values, runs, strict=True)],
            ]
            places = [index + shift for index in range(len(values))]
            bars = axis.bar(places, values, 0.38, color=_COLORS[system], label=SYSTEMS[system])
            axis.errorbar(places, values, ranges, fmt="none", ecolor="0.2", elinewidth=0.8, capsize=2)
            axis.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
        axis.axhline(1.0, color="0.4", lw=0.8)
        axis.set_xticks(range(len(systems["lru"])), [f"{count:,}" for count in _agents(systems["lru"])])

    figure, axes = _panels(results, draw, "Speed-up of a step of the world over LRU without host tier (Fig. 8)")
    axes[0].set_ylabel("times faster, gap between steps included")
    return save_figure(figure, out / "fig08_speedup.png")


def _ttfts(results: Sequence[Result], out: Path) -> Path:
    def draw(axis: Axes, systems: dict[str, list[Result]]) -> None:
        _lines(axis, systems, "ttft_ms")
        axis.margins(y=0.12)
        for before, ours in zip(systems["hierarchical"], systems["scalesim"], strict=True):
            axis.annotate(
                f"{statistics.fmean(ttft_changes(before, ours)):+.0%}",
                (ours["setting"]["num_agents"], ours["ttft_ms"]),
                textcoords="offset points", xytext=(0, -13), ha="center", fontsize=7, color=_COLORS["scalesim"],
            )  # fmt: skip

    title = "Mean time to the first token; numbers: against reactive hierarchical caching (Fig. 9)"
    figure, axes = _panels(results, draw, title)
    axes[0].set_ylabel("TTFT, ms")
    return save_figure(figure, out / "fig09_ttft.png")


def _steps(results: Sequence[Result], out: Path) -> Path:
    figure, axes = _panels(results, lambda a, s: _lines(a, s, "world_ms"), "Time of a step of the world (Fig. 10)")
    axes[0].set_ylabel("ms, the gap of 100 ms included")
    return save_figure(figure, out / "fig10_time_per_step.png")


def _density(results: Sequence[Result], out: Path) -> Path:
    counts = sorted(set(_agents(results)))
    figure, axes = plt.subplots(1, 2 * len(counts), figsize=(4.4 * 2 * len(counts), 4.2), squeeze=False)
    figure.set_layout_engine("constrained")
    for index, count in enumerate(counts):
        systems = by_system(results, num_agents=count)
        for axis, value, label in zip(
            axes[0][2 * index :], ("world_ms", "ttft_ms"), ("ms a step, gap included", "TTFT, ms"), strict=False
        ):
            for system, found in systems.items():
                shares = [100 * result["active_share"] for result in found]
                axis.plot(
                    shares, [r[value] for r in found], color=_COLORS[system], marker=_MARKERS[system],
                    label=SYSTEMS[system],
                )  # fmt: skip
            axis.axvline(100 * Setting("independent", "lru", count).residents / count, color="0.5", lw=0.8, ls="--")
            axis.set_xlabel("active agents, %; dashed: as many as fit")
            axis.set_ylabel(label)
            axis.set_title(f"{count} agents")
            axis.set_yscale("log")
            plain_numbers(axis.yaxis)
            axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.suptitle("Share of the agents that call in a step: independent (Fig. 11)")
    add_caption(figure, CONDITIONS)
    return save_figure(figure, out / "fig11_density.png")


def _models(results: Sequence[Result], out: Path) -> Path:
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 4.2))
    figure.set_layout_engine("constrained")
    systems = by_system(results)
    names = [result["setting"]["model"] for result in systems["scalesim"]]
    for index, (system, found) in enumerate(systems.items()):
        places = [place + 0.27 * (index - 1) for place in range(len(names))]
        for axis, value in ((axes[0], "world_ms"), (axes[1], "ttft_ms")):
            bars = axis.bar(places, [r[value] for r in found], 0.25, color=_COLORS[system], label=SYSTEMS[system])
            axis.bar_label(bars, fmt="%.0f", fontsize=7, padding=2)
    for axis, label in ((axes[0], "ms a step, gap included"), (axes[1], "TTFT, ms")):
        axis.set_xticks(range(len(names)), names)
        axis.set_ylabel(label)
        axis.set_yscale("log")
        plain_numbers(axis.yaxis)
    axes[0].legend(fontsize=8)
    count = results[0]["setting"]["num_agents"]
    figure.suptitle(f"Models, on one GPU: independent, {count} agents (Fig. 12)")
    add_caption(figure, CONDITIONS.replace("Qwen2.5-7B", "four models"))
    return save_figure(figure, out / "fig12_models.png")


def _breakdown(results: Sequence[Result], out: Path) -> Path:
    workloads = list(dict.fromkeys(result["setting"]["workload"] for result in results))
    counts = sorted({count for count in _agents(results) if count >= 100})
    figure, axes = plt.subplots(1, len(workloads), figsize=(4.2 * len(workloads), 4.2), squeeze=False, sharey=True)
    figure.set_layout_engine("constrained")
    for axis, workload in zip(axes[0], workloads, strict=True):
        labels = []
        for place, (count, system) in enumerate((c, s) for c in counts for s in ("hierarchical", "scalesim")):
            (result,) = by_system(results, workload=workload, num_agents=count)[system]
            bottom = 0.0
            for part, label in _PARTS.items():
                axis.bar(
                    place, result[part], 0.8, bottom=bottom, color=_PART_COLORS[part],
                    label=label if place == 0 else None,
                )  # fmt: skip
                bottom += result[part]
            labels.append(f"{count:,} {'HC' if system == 'hierarchical' else 'ID'}")
        axis.set_xticks(range(len(labels)), labels, rotation=60, fontsize=8)
        axis.set_title(workload)
    axes[0][0].set_ylabel("mean time of a call, ms")
    axes[0][0].legend(fontsize=8)
    figure.suptitle("Where the time of a call goes; HC: LRU + host tier, reactive, ID: invocation distance (Fig. 13)")
    add_caption(figure, CONDITIONS)
    return save_figure(figure, out / "fig13_breakdown.png")
