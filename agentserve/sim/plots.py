"""Pictures of simulations. Needs matplotlib, which is imported only when this module is."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # no display is needed or looked for
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from agentserve.sim.cells import flag
from agentserve.sim.report import COLUMNS, Column, hit_rate, number
from agentserve.sim.sweep import Result

_COLORS = ("#30638e", "#d1495b", "#5c8001", "#8d5a97", "#c17817", "#3a7d7c", "#6c757d", "#003049")
_LINES = ("-", "--", ":", "-.")
_COLD, _RESUME, _DECODE, _MIXED = "#d1495b", "#edae49", "#30638e", "#8d5a97"
_MAX_CURVES = 12
"""More cannot be told apart: the rest is left to the tables."""
_MAX_DETAILED = 4
"""Simulations for which KV use and lanes are drawn."""
_MAX_INSTANCES = 8
_SWEPT = ("ttft_p95_ms", "gap_p95_ms", "jct_mean_s", "tokens_per_s")


def draw_all(results: Sequence[Result], names: Sequence[str], directory: Path) -> list[Path]:
    """Writes PNG files and returns their paths: the same results give the same bytes.

    Args:
        results: of all simulations.
        names: the options in which they differ.
        directory: exists.
    """
    written = [_save(draw_distributions(results[:_MAX_CURVES], names), directory / "cdf.png")]
    for index, result in enumerate(results[:_MAX_DETAILED]):
        suffix = f"-{index + 1}" if len(results) > 1 else ""
        written.append(_save(draw_residency(result, names), directory / f"kv{suffix}.png"))
        if result["lanes"]:
            written.append(_save(draw_lanes(result, names), directory / f"lanes{suffix}.png"))
    written += [_save(draw_sweep(results, names, name), directory / f"sweep-{flag(name)[2:]}.png") for name in names]
    return written


def draw_distributions(results: Sequence[Result], names: Sequence[str]) -> Figure:
    """Shares of calls (TTFT, TPOT) and of programs (JCT) that took at most x."""
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    parts: tuple[tuple[str, Callable[[Mapping[str, Any]], list[float]]], ...] = (
        ("TTFT, ms", _ttfts_ms),
        ("TPOT, ms", _tpots_ms),
        ("job completion time, s", _completions_s),
    )
    for axes, (title, values_of) in zip(panels, parts, strict=True):
        for index, result in enumerate(results):
            values = sorted(values_of(result["calls"]))
            if values:
                shares = [rank / len(values) for rank in range(len(values) + 1)]
                axes.step([values[0], *values], shares, where="post", label=_label(result, names), **_style(index))
        axes.set_xlabel(title)
        axes.set_ylim(0.0, 1.02)
        axes.grid(color="0.92")
    panels[0].set_ylabel("share at most that")
    if len(results) > 1:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
    _caption(figure, results[0], names)
    return figure


def draw_residency(result: Result, names: Sequence[str]) -> Figure:
    """KV blocks of each instance over time: held by requests, cached, free."""
    shown = list(zip(result["residency"], result["instances"], strict=True))[:_MAX_INSTANCES]
    size = (10, 1.4 + 1.6 * len(shown))
    figure, panels = plt.subplots(len(shown), 1, figsize=size, layout="constrained", sharex=True, squeeze=False)
    for index, (axes, (samples, instance)) in enumerate(zip(panels[:, 0], shown, strict=True)):
        total = instance["kv"]["num_blocks"]
        seconds = [at_ns / 1e9 for at_ns, *_ in samples]
        held = [100.0 * blocks / total for _, blocks, *_ in samples]
        full = [100.0 * (blocks + cached) / total for _, blocks, cached, *_ in samples]
        axes.fill_between(seconds, 0.0, held, step="post", color=_DECODE, label="held", linewidth=0)
        axes.fill_between(seconds, held, full, step="post", color="#a9c6de", label="cached", linewidth=0)
        for place, tier in enumerate(instance["kv"]["tiers"], start=3):
            used = [100.0 * sample[place] / tier["num_blocks"] for sample in samples]
            axes.step(seconds, used, where="post", label=f"{tier['tier']} tier", **_style(place - 2))
        axes.set_ylim(0.0, 100.0)
        axes.set_ylabel(f"instance {index}\n% of blocks" if len(shown) > 1 else "% of KV blocks")
        axes.margins(x=0.0)
    panels[0, 0].legend(loc="upper left", frameon=False, fontsize=8, ncols=2)
    panels[-1, 0].set_xlabel("s")
    _caption(figure, result, names, one=True)
    return figure


def draw_lanes(result: Result, names: Sequence[str]) -> Figure:
    """The first batches of each lane on a time line, by the kind of work."""
    spans = result["lanes"]
    keys = sorted({(instance, lane) for instance, lane, *_ in spans})[: 2 * _MAX_INSTANCES]
    figure, axes = plt.subplots(figsize=(12, 1.6 + 0.5 * len(keys)), layout="constrained")
    for (instance, lane), place in zip(keys, range(len(keys)), strict=True):
        bars: dict[str, list[tuple[float, float]]] = {}
        for span in spans:
            if span[0] == instance and span[1] == lane:
                bars.setdefault(_work_color(*span[4:]), []).append((span[2] / 1e9, (span[3] - span[2]) / 1e9))
        for color, ranges in bars.items():
            axes.broken_barh(ranges, (place - 0.4, 0.8), color=color, linewidth=0)
    for color, label in ((_DECODE, "decode"), (_COLD, "cold"), (_RESUME, "resume"), (_MIXED, "prefill and decode")):
        axes.bar(0.0, 0.0, color=color, label=label)
    axes.set_yticks(range(len(keys)), [f"{instance}: {lane}" for instance, lane in keys])
    axes.set_xlim(0.0, max(span[3] for span in spans) / 1e9)
    axes.set_ylim(len(keys) - 0.5, -0.5)
    axes.set_xlabel(f"s (the first {len(spans)} batches)")
    figure.legend(loc="outside upper right", frameon=False, fontsize=8, ncols=4)
    _caption(figure, result, names, one=True)
    return figure


def draw_sweep(results: Sequence[Result], names: Sequence[str], name: str) -> Figure:
    """Metrics against one option, with a line for each combination of the others."""
    others = [other for other in names if other != name]
    values = list(dict.fromkeys(result["parameters"][name] for result in results))
    is_number = all(isinstance(value, int | float) for value in values)
    lines: dict[tuple[Any, ...], list[Result]] = {}
    for result in results:
        lines.setdefault(tuple(result["parameters"][other] for other in others), []).append(result)
    columns = [column for column in COLUMNS if column.key in _SWEPT]
    figure, panels = plt.subplots(1, len(columns) + 1, figsize=(15, 3.8), layout="constrained")
    for index, members in enumerate(list(lines.values())[:_MAX_CURVES]):
        for axes, points in zip(panels, _swept_points(members, name, values, columns), strict=True):
            if points:
                xs, ys = zip(*points, strict=True)
                axes.plot(xs, ys, marker="o", label=_label(members[0], others), **_style(index))
    titles = [f"{column.title}, {column.unit}" for column in columns] + ["prefix hits, %"]
    for axes, title in zip(panels, titles, strict=True):
        _swept_axis(axes, flag(name)[2:], title, None if is_number else [str(value) for value in values])
    if others:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
    _caption(figure, results[0], names)
    return figure


def _swept_points(
    members: Sequence[Result], name: str, values: Sequence[Any], columns: Sequence[Column]
) -> list[list[tuple[float, float]]]:
    """For each column, and the hit rate behind them, the points of a line; a value that is no number has its place."""
    is_number = all(isinstance(value, int | float) for value in values)
    keyed = [(result["parameters"][name], result["summary"]) for result in members]
    placed = [(value if is_number else values.index(value), summary) for value, summary in keyed]
    placed.sort(key=lambda item: item[0])
    series = [[(x, number(summary, column)) for x, summary in placed] for column in columns]
    series.append([(x, None if (rate := hit_rate(summary)) is None else 100.0 * rate) for x, summary in placed])
    return [[(x, y) for x, y in points if y is not None] for points in series]


def _swept_axis(axes: Axes, name: str, title: str, labels: Sequence[str] | None) -> None:
    axes.set_xlabel(name)
    axes.set_title(title, fontsize=10)
    axes.set_ylim(bottom=0.0)
    axes.grid(color="0.92")
    if labels is not None:
        axes.set_xticks(range(len(labels)), labels, rotation=20, fontsize=8)


# ---- numbers ----


def _ttfts_ms(calls: Mapping[str, Any]) -> list[float]:
    pairs = zip(calls["sent_ns"], calls["first_token_ns"], calls["error"], strict=True)
    return [(first - sent) / 1e6 for sent, first, error in pairs if first is not None and error is None]


def _tpots_ms(calls: Mapping[str, Any]) -> list[float]:
    columns = (calls[name] for name in ("first_token_ns", "last_token_ns", "num_output_tokens", "error"))
    rows = zip(*columns, strict=True)
    return [(last - first) / (count - 1) / 1e6 for first, last, count, error in rows if count > 1 and error is None]


def _completions_s(calls: Mapping[str, Any]) -> list[float]:
    spans: dict[str, tuple[int, int]] = {}
    failed = set()
    columns = (calls[name] for name in ("program_id", "sent_ns", "finished_ns", "error"))
    for program_id, sent, finished, error in zip(*columns, strict=True):
        first, last = spans.get(program_id, (sent, finished))
        spans[program_id] = (min(first, sent), max(last, finished))
        if error is not None:
            failed.add(program_id)
    return [(last - first) / 1e9 for program_id, (first, last) in spans.items() if program_id not in failed]


# ---- looks ----


def _work_color(num_decodes: int, num_cold: int, num_resume: int) -> str:
    if num_decodes and (num_cold or num_resume):
        return _MIXED
    if num_decodes:
        return _DECODE
    return _COLD if num_cold else _RESUME


def _style(index: int) -> dict[str, Any]:
    return {
        "color": _COLORS[index % len(_COLORS)],
        "linestyle": _LINES[index // len(_COLORS) % len(_LINES)],
        "linewidth": 1.5,
    }


def _label(result: Result, names: Sequence[str]) -> str:
    return ", ".join(f"{flag(name)[2:]} {result['parameters'][name]}" for name in names)


def _caption(figure: Figure, result: Result, names: Sequence[str], *, one: bool = False) -> None:
    """What was simulated, below the figure, in lines that fit its width.

    `one`: it is about this simulation only, so that what differs between simulations is said; else it is left out.
    """
    parts = [_label(result, names)] if one and names else []
    if one or "workload" not in names:
        parts.append(result["workload"]["title"])
    if one or not {"gpu", "profile", "model"} & set(names):
        parts.append(result["conditions"])
    width = int(figure.get_figwidth() * 16)
    figure.supxlabel("\n".join(textwrap.wrap("; ".join(dict.fromkeys(parts)), width)), fontsize=8, color="0.35")


def _save(figure: Figure, path: Path) -> Path:
    """Through a temporary name; without the version of the program that drew it."""
    part = path.with_name(path.name + ".part")
    figure.savefig(part, dpi=120, format="png", metadata={"Software": None})
    plt.close(figure)
    part.replace(path)
    return path
