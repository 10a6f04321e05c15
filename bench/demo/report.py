"""The demo's table and pictures."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.demo.agents import TurnResult

mpl.use("Agg")  # no display is needed or looked for
import matplotlib.pyplot as plt

COLORS = {"cold_prefill": "#d1495b", "resume_prefill": "#edae49", "decode": "#30638e"}


def print_table(results: Sequence[TurnResult], console: Console) -> None:
    """One row a turn, in the order in which the agents' turns follow each other."""
    table = Table(title="Every model call, measured by the client")
    for name in ("agent", "turn", "class", "tool that ran"):
        table.add_column(name, no_wrap=True)
    for name in ("prompt", "cached", "new", "output", "TTFT ms", "TPOT ms", "worst gap ms"):
        table.add_column(name, justify="right", no_wrap=True)
    previous = None
    for result in sorted(results, key=lambda r: (r.agent, r.turn)):
        if previous not in (None, result.agent):
            table.add_section()
        previous = result.agent
        table.add_row(
            result.agent,
            str(result.turn),
            result.work_class.removesuffix("_prefill"),
            escape(_short_action(result)),
            str(result.num_prompt_tokens),
            str(result.num_cached_tokens),
            str(result.num_new_tokens),
            str(result.num_output_tokens),
            f"{result.ttft_s * 1e3:.0f}",
            _ms(result.tpot_s),
            _ms(result.worst_gap_s),
        )
    console.print(table)


def summary(results: Sequence[TurnResult]) -> str:
    """What the table shows, in words."""
    first = [r.ttft_s for r in results if r.turn == 1]
    later = [r.ttft_s for r in results if r.turn > 1]
    prompt = sum(r.num_prompt_tokens for r in results)
    cached = sum(r.num_cached_tokens for r in results)
    lines = [f"{cached} of {prompt} prompt tokens ({cached / prompt:.0%}) came from the prefix cache."]
    if later:
        ratio = statistics.median(first) / statistics.median(later)
        lines.append(
            f"Median time to first token: first turns {statistics.median(first) * 1e3:.0f} ms, later turns "
            f"{statistics.median(later) * 1e3:.0f} ms ({ratio:.1f} times faster)."
        )
    if sum(r.work_class == "cold_prefill" for r in results) < len(first):
        lines.append("The shared system prompt was read once: agents that came while it was read waited for it.")
    own = sum(r.by_model for r in results)
    lines.append(f"The model named the tool itself in {own} of {len(results)} turns; else a plan's tool ran (*).")
    return "\n".join(lines)


def plot_timeline(results: Sequence[TurnResult], path: Path, caption: str) -> None:
    """A lane for each agent: waiting for the first token, then the stream, a tick a chunk."""
    start_s = min(result.sent_s for result in results)
    agents = sorted({result.agent for result in results})
    figure, axes = plt.subplots(figsize=(11, 1.2 + 0.9 * len(agents)), layout="constrained")
    for result in results:
        row = agents.index(result.agent)
        sent, first, last = (t - start_s for t in (result.sent_s, result.chunk_times_s[0], result.chunk_times_s[-1]))
        axes.barh(row, first - sent, left=sent, height=0.5, color=COLORS.get(result.work_class, "0.6"))
        axes.barh(row, last - first, left=first, height=0.5, color=COLORS["decode"], alpha=0.35)
        ticks = [t - start_s for t in result.chunk_times_s]
        axes.vlines(ticks, row - 0.25, row + 0.25, color=COLORS["decode"], linewidth=0.5)
    for name, color in COLORS.items():
        label = {"decode": "streaming, a line for each chunk"}.get(name, f"waiting: {name.replace('_', ' ')}")
        axes.barh([0], [0], color=color, label=label)
    axes.set_yticks(range(len(agents)), agents)
    axes.invert_yaxis()
    axes.set_xlabel("time since the first request, s")
    axes.set_xlim(left=0)
    axes.set_title(f"Three agents on one daemon\n{caption}", fontsize=10)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_turns(results: Sequence[TurnResult], path: Path, caption: str) -> None:
    """Per turn: prompt tokens from the cache and computed, and the time to the first token."""
    agents = sorted({result.agent for result in results})
    figure, (above, below) = plt.subplots(
        2, len(agents), figsize=(11, 5.6), sharex=True, sharey="row", layout="constrained", squeeze=False
    )
    for column, agent in enumerate(agents):
        turns = sorted((r for r in results if r.agent == agent), key=lambda r: r.turn)
        x = [r.turn for r in turns]
        cached = [r.num_cached_tokens for r in turns]
        above[column].bar(x, cached, color="#9ab87a", label="from the prefix cache")
        above[column].bar(x, [r.num_new_tokens for r in turns], bottom=cached, color="#8d99ae", label="computed")
        above[column].set_title(agent, fontsize=10)
        colors = [COLORS.get(r.work_class, "0.6") for r in turns]
        bars = below[column].bar(x, [r.ttft_s * 1e3 for r in turns], color=colors)
        below[column].bar_label(bars, fmt="%.0f", fontsize=8)
        below[column].set_xlabel("turn")
        below[column].set_xticks(x)
    above[0].set_ylabel("prompt tokens")
    below[0].set_ylabel("time to first token, ms")
    for name in ("cold_prefill", "resume_prefill"):
        below[-1].bar([1], [0], color=COLORS[name], label=f"after a {name.replace('_', ' ')}")
    below[0].margins(y=0.12)
    handles = [*above[-1].get_legend_handles_labels()[0], *below[-1].get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(f"Prefix reuse over the turns of three agents\n{caption}", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _short_action(result: TurnResult) -> str:
    text = "{}[{}]".format(*result.action)
    text = text if len(text) <= 40 else text[:37] + "..."
    return text if result.by_model else text + " *"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.0f}"
