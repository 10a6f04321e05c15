"""Draws figures from the data of `bench.figures.data`; knows nothing of runs."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

from bench.figures.data import ABLATION_MEASURES, MEASURES, Figure
from bench.figures.variants import VARIANTS

mpl.use("Agg")  # no display is needed or looked for
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure as MplFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter, ScalarFormatter

_OTHER_COLORS = ("#1d3557", "#2a9d8f", "#8338ec", "#bc6c25", "#d62976", "#118ab2", "#606c38", "#3d405b")
_OTHER_MARKERS = ("h", "*", "<", ">", "p", "d", "H", "8")
_WORKLOAD_TITLES = {"react": "ReAct", "plan_execute": "Plan-and-Execute", "victim_attacker": "victim and attackers"}
_LOG_FROM = 8.0
"""An axis is logarithmic when its largest value is this many times the smallest."""
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "figure.dpi": 100,
}


def draw(figure: Figure, path: Path) -> None:
    """Draws any figure of `bench.figures.data` as a PNG."""
    draws: Mapping[str, Callable[[Figure], MplFigure]] = {
        "fig2": _timeline,
        "fig3": _shares,
        "fig5": _scaling,
        "fig6": _attainment,
        "fig7": _ablation,
    }
    with plt.style.context(_STYLE):
        drawn = draws[figure["figure"]](figure)
        drawn.savefig(path, dpi=150)
        plt.close(drawn)


def _timeline(figure: Figure) -> MplFigure:
    panels = figure["panels"]
    drawn, all_axes = plt.subplots(
        len(panels), 1, figsize=(8.5, 1.1 + 1.75 * len(panels)), sharex=True, sharey=True, layout="constrained",
        squeeze=False,
    )  # fmt: skip
    highest = max(gap for panel in panels for _, gap in panel["gaps"])
    lowest = min(gap for panel in panels for _, gap in panel["gaps"])
    for axes, panel in zip(all_axes[:, 0], panels, strict=True):
        # Time starts with the attack, so that panels of different lengths can be compared.
        start = min(first for first, _, _ in panel["cold"])
        for first, last, _ in panel["cold"]:
            axes.axvspan(first - start, last - start, color="#edae49", alpha=0.25, linewidth=0)
        times = [at - start for at, _ in panel["gaps"]]
        axes.plot(
            times, [gap for _, gap in panel["gaps"]], color="#30638e", linewidth=0.8, marker=".", markersize=2.5,
            drawstyle="steps-pre",  # a gap lasts from the token before it to its own
        )  # fmt: skip
        title = f"{panel['label']}: p95 {_short(panel['p95_ms'])} ms, worst {_short(panel['worst_ms'])} ms beside the"
        title += f" prompts ({_short(panel['quiet_ms'])} ms without); first token of prompts after"
        axes.set_title(f"{title} {_short(panel['ttft_p50_ms'])} ms", loc="left", fontsize=9)
        if highest > _LOG_FROM * lowest:
            _log_scale(axes, lowest, highest)
        else:
            axes.set_ylim(0, highest * 1.1)
    starts = [min(first for first, _, _ in panel["cold"]) for panel in panels]
    windows = [(a - start, b - start) for start, (a, b) in zip(starts, (p["window_s"] for p in panels), strict=True)]
    all_axes[0, 0].set_xlim(min(a for a, _ in windows), max(b for _, b in windows))
    all_axes[-1, 0].set_xlabel("time since the first cold prompt, s")
    drawn.supylabel("time between tokens of one stream, ms", fontsize=9)
    band = Rectangle((0, 0), 1, 1, color="#edae49", alpha=0.4)
    line = Line2D([], [], color="#30638e", marker=".", linewidth=0.8)
    _finish(
        drawn, figure, "A stream beside cold prompts (counterpart of Fig. 2)", [line, band],
        ["a token of the stream", "a cold prompt: sent to first token (darker: several)"],
    )  # fmt: skip
    return drawn


def _shares(figure: Figure) -> MplFigure:
    drawn, axes = plt.subplots(figsize=(7.2, 4.8), layout="constrained")
    styles = {"decode": ("#30638e", "o"), "cold": ("#c1121f", "s"), "resume": ("#edae49", "D")}
    lines = ("-", "--", ":", "-.")
    seen = dict.fromkeys(styles, 0)
    for curve in figure["panels"][0]["curves"]:
        color, marker = styles[curve["work"]]
        xs, ys = zip(*curve["points"], strict=True)
        axes.plot(
            xs, ys, color=color, marker=marker, markersize=4, linestyle=lines[seen[curve["work"]] % len(lines)],
            label=f"{curve['label']} ({curve['tokens_per_s']:,.0f} tokens/s)",
        )  # fmt: skip
        seen[curve["work"]] += 1
    axes.plot((0, 1), (0, 1), color="0.6", linewidth=0.8, linestyle="-", zorder=0, label="proportional")
    axes.set_xlim(0, 1.02)
    highest = max(value for curve in figure["panels"][0]["curves"] for _, value in curve["points"])
    axes.set_ylim(0, 1.05 * highest)  # on a machine that others use, a part may be faster than the whole
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("share of the device's compute units")
    axes.set_ylabel("throughput, as a fraction of the whole device's")
    handles, labels = axes.get_legend_handles_labels()
    _finish(
        drawn, figure, "Throughput against the share of the device (counterpart of Fig. 3)", handles, labels, columns=2
    )
    return drawn


def _scaling(figure: Figure) -> MplFigure:
    panels = figure["panels"]
    drawn, all_axes = plt.subplots(
        len(panels), len(MEASURES), figsize=(2.6 * len(MEASURES), 1.3 + 2.6 * len(panels)), layout="constrained",
        squeeze=False, sharex="row",
    )  # fmt: skip
    handles: dict[str, Any] = {}
    for row, panel in zip(all_axes, panels, strict=True):
        for axes, (name, label) in zip(row, MEASURES, strict=True):
            handles |= _lines(axes, panel["series"], name)
            axes.set_title(label, fontsize=9)
            _value_axis(axes, panel["series"], name)
        row[0].set_ylabel(_workload_title(panel["workload"]), fontsize=11)
    for axes in all_axes[-1]:
        axes.set_xlabel("number of agents")
    title = "Latency and throughput against the number of agents (counterpart of Fig. 5)"
    _finish(drawn, figure, title, list(handles.values()), list(handles), columns=8)
    return drawn


def _attainment(figure: Figure) -> MplFigure:
    panels = figure["panels"]
    drawn, all_axes = plt.subplots(
        1, len(panels), figsize=(1.0 + 4.0 * len(panels), 4.2), layout="constrained", squeeze=False, sharey=True
    )
    handles: dict[str, Any] = {}
    for axes, panel in zip(all_axes[0], panels, strict=True):
        handles |= _lines(axes, panel["series"], "slo_attainment")
        axes.set_ylim(-0.03, 1.05)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel("number of agents")
        targets = f"cold TTFT <= {panel['ttft_target_ms']:.0f} ms, p95 gap <= {panel['tpot_target_ms']:.1f} ms"
        axes.set_title(f"{_workload_title(panel['workload'])}\n{targets}", fontsize=9)
    all_axes[0, 0].set_ylabel("sessions that meet both targets")
    title = f"SLO attainment, targets {panels[0]['factor']:g} times the isolated values (counterpart of Fig. 6)"
    _finish(drawn, figure, title, list(handles.values()), list(handles), columns=4)
    return drawn


def _ablation(figure: Figure) -> MplFigure:
    panels = figure["panels"]
    drawn, all_axes = plt.subplots(
        1, len(panels), figsize=(1.0 + 4.2 * len(panels), 4.0), layout="constrained", squeeze=False, sharey=True
    )
    for axes, panel in zip(all_axes[0], panels, strict=True):
        width = 0.8 / len(panel["bars"])
        for index, bar in enumerate(panel["bars"]):
            variant = VARIANTS[bar["key"]]
            heights = [bar["values"][name] or 0.0 for name, _ in ABLATION_MEASURES]
            xs = [position + (index - (len(panel["bars"]) - 1) / 2) * width for position in range(len(heights))]
            drawn_bars = axes.bar(xs, heights, width * 0.92, color=variant.color, label=bar["label"])
            axes.bar_label(drawn_bars, fmt="%.2f", fontsize=8, padding=2, bbox={"color": "white", "pad": 0.6})
        axes.axhline(1.0, color="0.4", linewidth=0.8, zorder=1.5)
        labels = [textwrap.fill(label, 14) for _, label in ABLATION_MEASURES]
        axes.set_xticks(range(len(labels)), labels)
        axes.grid(visible=False, axis="x")
        axes.margins(y=0.12)
        axes.set_title(f"{_workload_title(panel['workload'])}, {panel['num_agents']} agents")
    all_axes[0, 0].set_ylabel("relative to the full system")
    handles, labels = all_axes[0, 0].get_legend_handles_labels()
    _finish(
        drawn, figure, "Ablation (counterpart of Fig. 7; lower is better but for tokens/s)", handles, labels, columns=3
    )
    return drawn


# ---- shared parts ----


def _lines(axes: Axes, series: Sequence[Figure], name: str) -> dict[str, Any]:
    """Draws a line for each series; returns the handles by label."""
    handles = {}
    for index, one in enumerate(series):
        points = [(point["num_agents"], point[name]) for point in one["points"] if point[name] is not None]
        if not points:
            continue
        variant = VARIANTS.get(one["key"])
        color = variant.color if variant else _OTHER_COLORS[index % len(_OTHER_COLORS)]
        marker = variant.marker if variant else _OTHER_MARKERS[index % len(_OTHER_MARKERS)]
        xs, ys = zip(*points, strict=True)
        is_ours = one["key"] == "predictive"
        (line,) = axes.plot(
            xs, ys, color=color, marker=marker, markersize=4, linewidth=2.0 if is_ours else 1.1,
            zorder=3 if is_ours else 2, label=one["label"],
        )  # fmt: skip
        handles[one["label"]] = line
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return handles


def _value_axis(axes: Axes, series: Sequence[Figure], name: str) -> None:
    """From zero, or logarithmic where one curve would flatten the others."""
    values = [point[name] for one in series for point in one["points"] if point[name]]
    if values and max(values) > _LOG_FROM * min(values):
        _log_scale(axes, min(values), max(values))
    elif values:
        axes.set_ylim(0, 1.08 * max(values))


def _log_scale(axes: Axes, lowest: float, highest: float) -> None:
    """Logarithmic, with plain numbers at the ticks."""
    axes.set_yscale("log")
    axes.set_ylim(lowest * 0.8, highest * 1.25)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(ScalarFormatter())


def _finish(
    drawn: MplFigure, figure: Figure, title: str, handles: Sequence[Any], labels: Sequence[str], *, columns: int = 3
) -> None:
    """Title, caption with the conditions, and one legend below."""
    width = round(drawn.get_size_inches()[0] * 13)
    drawn.suptitle(f"{title}\n{textwrap.fill(figure['conditions'], width)}", fontsize=9.5)
    drawn.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(labels)))


def _workload_title(name: str) -> str:
    return _WORKLOAD_TITLES.get(name, name)


def _short(value: float | None) -> str:
    """Three digits; a dash for nothing."""
    return "-" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"
