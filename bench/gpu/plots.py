"""Pictures of what `bench.gpu` measures, beside those of `bench.figures`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # no display is needed or looked for
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

_COLORS = ("#c1121f", "#30638e", "#588157", "#edae49", "#7b6d8d")
_TARGETS = ((8, 1.15), (32, 1.25))
"""Largest batch and how many times the floor a decode step may take up to it."""


def draw_steps(result: Mapping[str, Any], path: Path) -> None:
    """Decode steps over their floor by batch, a line for each context, and the rates of prefills."""
    decode = [row for row in result.get("decode", ()) if "over_floor" in row]
    prefill = [row for row in result.get("prefill", ()) if "tokens_per_s" in row]
    drawn, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for color, context in zip(_COLORS, sorted({row["context"] for row in decode}), strict=False):
        rows = [row for row in decode if row["context"] == context]
        left.plot(
            [row["batch"] for row in rows], [row["over_floor"] for row in rows], "o-", color=color,
            label=f"context {context}",
        )  # fmt: skip
    first = 1
    for last, limit in _TARGETS:
        left.plot([first, last], [limit, limit], "--", color="gray", linewidth=1)
        first = last
    left.set(xlabel="sequences", ylabel="decode step / floor", xscale="log")
    left.set_xticks(sorted({row["batch"] for row in decode}), sorted({str(row["batch"]) for row in decode}, key=int))
    left.legend(frameon=False)
    _bars(
        right,
        [f"{row['chunk']}\nat {row['start']}" for row in prefill],
        [100.0 * row["share_of_matrix_rate"] for row in prefill],
    )
    right.set(ylabel="% of the rate of a matrix product", xlabel="prompt tokens in a batch")
    model = result.get("model", {})
    drawn.suptitle(
        f"{model.get('name')} ({model.get('dtype')}), random weights; {result['ceilings']['how']}", fontsize=9
    )
    drawn.savefig(path, dpi=120)
    plt.close(drawn)


def draw_attention(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Milliseconds of each backend, a group of bars for each shape."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    backends = list(dict.fromkeys(row["backend"] for row in rows if "ms" in row))
    drawn, axes = plt.subplots(figsize=(10, 4), layout="constrained")
    width = 0.8 / max(1, len(backends))
    for index, backend in enumerate(backends):
        found = {row["case"]: row["ms"]["median"] for row in rows if row["backend"] == backend and "ms" in row}
        places = [place + (index - (len(backends) - 1) / 2) * width for place in range(len(cases))]
        axes.bar(places, [found.get(case, 0.0) for case in cases], width, label=backend, color=_COLORS[index])
    axes.set_xticks(range(len(cases)), [case.replace(", ", "\n") for case in cases], fontsize=7)
    axes.set(ylabel="ms a layer", yscale="log")
    axes.legend(frameon=False)
    drawn.savefig(path, dpi=120)
    plt.close(drawn)


def _bars(axes: Axes, names: Sequence[str], values: Sequence[float]) -> None:
    axes.bar(range(len(names)), values, color=_COLORS[1])
    axes.set_xticks(range(len(names)), names, fontsize=7)
    for place, value in enumerate(values):
        axes.annotate(f"{value:.0f}", (place, value), ha="center", va="bottom", fontsize=7)
