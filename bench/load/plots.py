"""Figures of a comparison: distribution of gaps, bars, and the frontier of gap against cold TTFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.load.headline import Headline, Point, attack_gaps, frontier_points, headlines, median_of
from bench.load.results import Results
from bench.load.style import Styles, add_caption, file_name, plain_numbers, save_figure
from bench.load.timeline import draw_timeline

_OURS = "agentserve"


def draw_all(results: Results, directory: Path, *, frontier: bool) -> list[Path]:
    """Writes the figures of these results as PNG files, those that there are numbers for; returns their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for workload in results.workloads:
        name = file_name(workload)
        for server in results.servers:
            runs = results.of(workload, server.name)
            if runs and any(record.token_ns for record in runs[0].records):
                path = directory / f"timeline-{name}-{file_name(server.name)}.png"
                written.append(save_figure(draw_timeline(runs[0], results.caption(workload)), path))
        numbers = [h for server in results.servers for h in headlines(results, workload, server.name)]
        if any(h.gap_p95_ms is not None for h in numbers):
            written.append(save_figure(draw_gaps(results, workload), directory / f"gaps-{name}.png"))
        if any(h.cold_ttft_ms is not None for h in numbers):
            written.append(save_figure(draw_bars(results, workload), directory / f"bars-{name}.png"))
        if frontier and frontier_points(results, workload):
            written.append(save_figure(draw_frontier(results, workload), directory / f"frontier-{name}.png"))
    return written


def draw_gaps(results: Results, workload: str) -> Figure:
    """Share of gaps that are longer than x, both axes logarithmic: the tail is what a reader of a stream sees."""
    figure, axes = plt.subplots(figsize=(9, 4.6), layout="constrained")
    styles = Styles(results.servers)
    attacked = False
    for server in results.servers:
        gaps: list[float] = []
        for run in results.of(workload, server.name):
            under_attack = [gap / 1e6 for gap in attack_gaps(run)]
            attacked |= bool(under_attack)
            gaps += under_attack or [gap / 1e6 for record in run.records if not record.error for gap in record.gaps_ns]
        if not gaps:
            continue
        ordered = sorted(gaps)
        longer = [1.0 - index / len(ordered) for index in range(len(ordered))]
        axes.step(
            ordered,
            longer,
            where="post",
            color=styles.color(server),
            linestyle=styles.line(server),
            alpha=styles.alpha(server),
            label=server.title,
            linewidth=1.6,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    plain_numbers(axes.xaxis)
    plain_numbers(axes.yaxis)
    axes.axhline(0.05, color="0.6", linewidth=0.8)
    axes.annotate("p95", (1.0, 0.05), xycoords=("axes fraction", "data"), xytext=(-4, 3), textcoords="offset points",
                  ha="right", fontsize=8, color="0.4")  # fmt: skip
    axes.grid(color="0.92")
    axes.set_xlabel("gap between two tokens of a stream, ms" + (" (victim, during the attack)" if attacked else ""))
    axes.set_ylabel("share of gaps at least as long")
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    axes.set_title("How long do streams stall?", fontsize=11)
    add_caption(figure, results.caption(workload) + ".")
    return figure


_PANELS: tuple[tuple[str, Callable[[Headline], float | None], bool], ...] = (
    ("p95 gap, ms\n(log; lower is better)", lambda h: h.gap_p95_ms, True),
    ("worst stall, ms\n(log; lower is better)", lambda h: h.worst_stall_ms, True),
    ("median cold TTFT, ms\n(lower is better)", lambda h: h.cold_ttft_ms, False),
    ("median TTFT of resumed\nturns, ms (lower is better)", lambda h: h.resumed_ttft_ms, False),
    ("output tokens/s\n(higher is better)", lambda h: h.output_tokens_per_s, False),
)
"""Title, value, and whether the axis is logarithmic."""


def draw_bars(results: Results, workload: str) -> Figure:
    """A panel for each measure, a row for each server: the median of the rounds, and a dot for each round."""
    servers = [server for server in results.servers if results.of(workload, server.name)]
    found = {server.name: headlines(results, workload, server.name) for server in servers}
    panels = [panel for panel in _PANELS if any(panel[1](h) is not None for hs in found.values() for h in hs)]
    size = (2.0 + 2.5 * len(panels), 1.6 + 0.3 * len(servers))
    figure, grid = plt.subplots(1, len(panels), figsize=size, sharey=True, layout="constrained", squeeze=False)
    styles = Styles(results.servers)
    for axes, (title, value, is_log) in zip(grid[0], panels, strict=True):
        for row, server in enumerate(servers):
            values = [number for h in found[server.name] if (number := value(h)) is not None]
            if values:
                _draw_value(axes, row, values, styles.color(server), is_log=is_log)
        _finish_panel(axes, title, is_log=is_log)
    grid[0][0].set_yticks(range(len(servers)), [server.title for server in servers], fontsize=8)
    grid[0][0].set_ylim(len(servers) - 0.5, -0.5)
    if any(run.summary.under_attack for run in results.of(workload)):
        figure.suptitle("Gaps of the victim during the attack, TTFT of the attackers", fontsize=10)
    rounds = len({run.round for run in results.of(workload)})
    add_caption(
        figure, results.caption(workload) + (". Median and number: of the rounds (dots)." * (rounds > 1) or ".")
    )
    return figure


def _draw_value(axes: Axes, row: int, values: list[float], color: str, *, is_log: bool) -> None:
    middle = median_of(values)
    if is_log:  # no bar: it would begin nowhere
        axes.scatter([middle], [row], s=46, marker="D", color=color, zorder=3, linewidths=0)
    else:
        axes.barh(row, middle, color=color, height=0.66)
    if len(values) > 1:
        axes.scatter(values, [row] * len(values), s=8, color="black", zorder=4, linewidths=0)
    text = f"{middle:.0f}" if middle >= 10 else f"{middle:.1f}"
    axes.annotate(text, (max(values), row), xytext=(6, 0), textcoords="offset points", va="center", fontsize=8)


def _finish_panel(axes: Axes, title: str, *, is_log: bool) -> None:
    axes.set_title(title, fontsize=8.5)
    if is_log:
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        axes.set_xlim(low / 1.3, high * (high / low) ** 0.3)  # room for the numbers
        plain_numbers(axes.xaxis, (1.0, 3.0))
    else:
        axes.margins(x=0.28)
        axes.set_xlim(left=0)
    axes.tick_params(labelsize=8)
    axes.grid(axis="x", color="0.92")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def draw_frontier(results: Results, workload: str) -> Figure:
    """Every setting of every server as a numbered point; those of ours that no other of ours beats are connected."""
    points = frontier_points(results, workload)
    figure, axes = plt.subplots(figsize=(9.5, 5.2), layout="constrained")
    styles = Styles(results.servers)
    for number, point in enumerate(points, start=1):
        color = styles.color(point.server)
        axes.scatter(
            point.gap_p95_ms, point.cold_ttft_ms, s=120, color=color, marker=styles.marker(point.server), zorder=3,
            edgecolors="white", linewidths=0.8, label=f"{number}  {point.server.title}",
        )  # fmt: skip
        axes.annotate(str(number), (point.gap_p95_ms, point.cold_ttft_ms), ha="center", va="center", fontsize=6.5,
                      color="white", fontweight="bold", zorder=4)  # fmt: skip
    ours = best_of([point for point in points if point.server.kind == _OURS])
    if len(ours) > 1:
        axes.plot(
            [point.gap_p95_ms for point in ours],
            [point.cold_ttft_ms for point in ours],
            color=styles.color(ours[0].server),
            linewidth=1.4,
            zorder=2,
            label="our frontier",
        )
    axes.set_xscale("log")
    axes.margins(x=0.08)
    plain_numbers(axes.xaxis)
    axes.grid(which="both", color="0.93")
    axes.set_axisbelow(True)
    axes.set_ylim(0, 1.12 * max(point.cold_ttft_ms for point in points))
    axes.set_xlabel("p95 gap between tokens of a running stream, ms (log)")
    axes.set_ylabel("median time to first token of a cold prompt, ms")
    axes.set_title("What a stream waits for, against what a new prompt waits for: lower left is better", fontsize=10.5)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8, markerscale=0.7)
    add_caption(figure, results.caption(workload) + ".")
    return figure


def best_of(points: list[Point]) -> list[Point]:
    """Points that no other one beats in both, by gap."""
    return sorted(
        (point for point in points if not any(other.beats(point) for other in points)),
        key=lambda point: point.gap_p95_ms,
    )
