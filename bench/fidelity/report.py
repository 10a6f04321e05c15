"""Tables and the figure of a fidelity campaign."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from bench.fidelity.score import CLASSES, GOAL_CELL, GOAL_MEAN, METRICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_KEYS = {metric.key: metric.title for metric in (*METRICS, *CLASSES)}


def print_report(result: Mapping[str, Any], console: Console) -> None:
    """Conditions, a table of all cells, one of all batches, and the summary."""
    conditions = result["conditions"]
    for line in (conditions["machine"], f"profile: {conditions['profile']}", *_outside_lines(result)):
        console.print(line, highlight=False, markup=False)
    console.print(_cells_table(result["cells"]))
    if result["kinds"]:
        console.print(_kinds_table(result["kinds"]))
    for line in _summary_lines(result):
        console.print(line, highlight=False, markup=False)
    if "calibration" in result:
        console.print(_sets_table(result["calibration"]["overall"]))
    for note in result["notes"]:
        console.print(f"note: {note}", highlight=False, markup=False)


def _outside_lines(result: Mapping[str, Any]) -> list[str]:
    outside = result["outside_ns"]
    if not any(outside.values()):
        return ["times are those of the engine: nothing outside it is compared or added"]
    send, receive, tail, turnaround = (
        (outside[f"{name}_ns"] or 0) / 1e6 for name in ("send", "receive", "tail", "turnaround")
    )
    return [
        f"outside the engine (medians over all calls, measured here; the client's clock against the recording's): "
        f"{send:.2f} ms until it takes a call up, {receive:.2f} ms from its first token to the client, {tail:.2f} ms "
        f"from its last token to the end of the call, {turnaround:.2f} ms from its last token to the next turn beside "
        f"the tool. The simulator has none of this: these constants are added to every simulated call."
    ]


def _cells_table(cells: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(
        title="predicted against measured; spread: largest minus smallest round, of the mean", title_justify="left"
    )
    table.add_column("cell")
    table.add_column("number")
    for title in ("measured", "spread", "predicted", "error", "without constants", "at the run's speed"):
        table.add_column(title, justify="right")
    for cell in cells:
        factors = ", ".join("?" if factor is None else f"{factor:.2f}" for factor in cell["speed_factors"])
        blocks = f"{cell['num_kv_blocks']} KV blocks of {cell['block_size']}; batches took {factors} x the profile"
        heads = [cell["title"], blocks]
        for key, numbers in cell["metrics"].items():
            table.add_row(
                heads.pop(0) if heads else "",
                _KEYS[key],
                f"{numbers['live_mean']:,.1f}",
                _percent(numbers["live_spread"], signed=False),
                _number(numbers["predicted"]["value"]),
                _percent(numbers["predicted"]["error"]),
                _percent(numbers["engine_only"]["error"]),
                _percent(numbers["at_speed"]["error"]),
            )
        table.add_section()
    return table


def _kinds_table(kinds: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="batches: recorded against the cost model, shape by shape", title_justify="left")
    table.add_column("kind")
    for title in (
        "batches", "share of time", "measured, ms", "predicted, ms", "error", "spread of one", "really beside",
        "lane idle before, ms",
    ):  # fmt: skip
        table.add_column(title, justify="right")
    for row in kinds:
        table.add_row(
            row["kind"],
            f"{row['num_batches']}",
            _percent(row["share"], signed=False),
            f"{row['measured_ms']:.1f}",
            f"{row['predicted_ms']:.1f}",
            _percent(row["error"]),
            _percent(row["spread"], signed=False),
            _percent(row["beside"], signed=False),
            "-" if row["idle_before_ms"] is None else f"{row['idle_before_ms']:.2f}",
        )
    return table


def _sets_table(overall: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(title="a profile fitted to the live runs of the calibration set", title_justify="left")
    table.add_column("set")
    for title in ("mean absolute error", "largest", "within goal"):
        table.add_column(title, justify="right")
    for name, numbers in overall.items():
        table.add_row(
            name,
            _percent(numbers["mean_absolute_error"], signed=False),
            _percent(numbers["largest_error"], signed=False),
            f"{numbers['num_within_goal']} of {numbers['num_numbers']}",
        )
    return table


def _summary_lines(result: Mapping[str, Any]) -> list[str]:
    lines = []
    for variant, what in result["variants"].items():
        overall = result["overall"][variant]
        if overall["mean_absolute_error"] is None:
            continue
        lines.append(
            f"{variant}: mean absolute error {overall['mean_absolute_error']:.1%}, largest "
            f"{overall['largest_error']:.1%}, {overall['num_within_goal']} of {overall['num_numbers']} numbers within "
            f"{GOAL_CELL:.0%} ({what})"
        )
    spread = result["live_spread"]
    if spread["mean"] is None:
        lines.append("live-to-live spread: unknown, because every cell ran once")
    else:
        lines.append(f"live-to-live spread: mean {spread['mean']:.1%}, largest {spread['largest']:.1%}")
    overall = result["overall"]["predicted"]
    is_met = overall["num_within_goal"] == overall["num_numbers"] and overall["mean_absolute_error"] < GOAL_MEAN
    lines.append(
        f"goal (every number within {GOAL_CELL:.0%}, mean under {GOAL_MEAN:.0%}): {'met' if is_met else 'not met'}"
    )
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"


def _percent(value: float | None, *, signed: bool = True) -> str:
    if value is None:
        return "-"
    return f"{value:+.1%}" if signed else f"{value:.1%}"


def draw(result: Mapping[str, Any], path: Path) -> Path:
    """Writes a PNG: for each of four numbers predicted against measured, with the range of the live rounds."""
    import matplotlib.pyplot as plt  # noqa: PLC0415 - must not be loaded while tokens are stamped

    from bench.load.style import add_caption, save_figure  # noqa: PLC0415 - the same

    figure, grid = plt.subplots(2, 2, figsize=(10, 9), layout="constrained")
    for axes, key in zip(grid.flat, ("ttft_mean_ms", "tpot_mean_ms", "jct_mean_ms", "tokens_per_s"), strict=True):
        _draw_metric(axes, key, result["cells"])
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", frameon=False, fontsize=8, ncols=2)
    conditions = result["conditions"]
    add_caption(
        figure,
        f"Filled: predicted from the profile. Open: with the speed that the machine had in each run. Grey: within "
        f"{GOAL_CELL:.0%}. {conditions['machine']}, commit {conditions['commit']}, {conditions['date']}.",
    )
    return save_figure(figure, path)


def _draw_metric(axes: Axes, key: str, cells: Sequence[Mapping[str, Any]]) -> None:
    from bench.load.style import plain_numbers  # noqa: PLC0415 - it loads matplotlib

    axes.set_title(_KEYS[key], fontsize=11)
    values = []
    for index, cell in enumerate(cells):
        n = cell["metrics"].get(key)
        if n is None or n["predicted"]["value"] is None:
            continue
        color, mean, live = f"C{index % 10}", n["live_mean"], n["live"]
        values += [*live, n["predicted"]["value"]]
        ranges = [[mean - min(live)], [max(live) - mean]]
        axes.errorbar(mean, n["predicted"]["value"], xerr=ranges, fmt="o", color=color, capsize=3, label=cell["title"])
        if n["at_speed"]["value"] is not None:
            axes.plot(mean, n["at_speed"]["value"], "o", markerfacecolor="none", color=color)
    if not values:
        axes.set_axis_off()
        return
    low, high = min(values) * 0.85, max(values) * 1.15
    axes.plot([low, high], [low, high], color="0.5", linewidth=0.8, zorder=0)
    lower, upper = ([low * factor, high * factor] for factor in (1.0 - GOAL_CELL, 1.0 + GOAL_CELL))
    axes.fill_between([low, high], lower, upper, color="0.92", linewidth=0, zorder=-1)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    for axis in (axes.xaxis, axes.yaxis):
        plain_numbers(axis, (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0))
    axes.set_xlabel("measured (bar: the live rounds)")
    axes.set_ylabel("predicted")
    axes.grid(color="0.93", which="major")
