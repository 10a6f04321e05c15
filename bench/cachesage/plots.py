"""Hits and times to the first token by size of the memory, one column a workload."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

STYLES = {
    "lru": ("0.45", "o", "-"),
    "anchor": ("tab:blue", "s", "-"),
    "transition, no prediction": ("tab:cyan", "v", "--"),
    "transition": ("tab:red", "D", "-"),
    "oracle": ("black", "x", ":"),
}


def draw(rows: Sequence[dict[str, object]], path: Path, gpu: str) -> None:
    """Writes a PNG. Several seeds are averaged."""
    names = list(dict.fromkeys(str(row["workload"]) for row in rows))
    figure, axes = plt.subplots(2, len(names), figsize=(3.1 * len(names) + 0.6, 6.0), squeeze=False, sharex=True)
    for column, name in enumerate(names):
        for policy, (color, marker, line) in STYLES.items():
            here = [row for row in rows if row["workload"] == name and row["policy"] == policy]
            sizes = sorted({int(str(row["num_blocks"])) for row in here})
            for axis, field, factor in ((axes[0][column], "hit_rate", 100.0), (axes[1][column], "mean_ttft_ms", 1.0)):
                means = []
                for size in sizes:
                    values = [float(str(row[field])) for row in here if row["num_blocks"] == size]
                    means.append(factor * sum(values) / len(values))
                axis.plot(sizes, means, color=color, marker=marker, linestyle=line, label=policy, markersize=4)
        axes[0][column].set_title(name.replace("_", " "))
        axes[1][column].set_xlabel("KV blocks of 16 tokens")
        for axis in (axes[0][column], axes[1][column]):
            axis.grid(alpha=0.3)
        axes[0][column].set_ylim(20, 85)
        axes[1][column].set_ylim(bottom=0)
    axes[0][0].set_ylabel("prompt tokens cached, %")
    axes[1][0].set_ylabel("mean time to first token, ms")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False)
    figure.suptitle(f"The same recorded calls under each policy, simulated {gpu}, Qwen2.5-7B")
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)
