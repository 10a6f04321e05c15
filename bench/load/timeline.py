"""A run as it went: tokens of each agent over time, and the gaps between them (the paper's Fig. 2)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from agentserve.sim.metrics import TurnRecord
from bench.load.results import RunResult
from bench.load.style import COLD, DECODE, RESUMED, add_caption, plain_numbers


def draw_timeline(run: RunResult, caption: str) -> Figure:
    """A lane for each agent: waiting for a first token, then a line for each token. Below: gaps of the streams."""
    lanes = _lanes(run.records)
    figure, (above, below) = plt.subplots(
        2,
        1,
        figsize=(10, 2.9 + 0.34 * len(lanes) + 0.6),
        height_ratios=[max(1.2, 0.34 * len(lanes)), 1.6],
        sharex=True,
        layout="constrained",
    )
    for row, (_, records) in enumerate(lanes):
        for record in records:
            _draw_call(above, row, record)
    above.set_yticks(range(len(lanes)), [name for name, _ in lanes], fontsize=8)
    above.set_ylim(len(lanes) - 0.4, -0.6)
    _draw_gaps_over_time(below, run)
    handles = [
        Patch(color=COLD, label="waiting for the first token of a cold prompt"),
        Patch(color=RESUMED, label="of a resumed prompt"),
        Patch(color=DECODE, label="a token"),
    ]
    above.legend(handles=handles, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, frameon=False, fontsize=8)
    figure.suptitle(f"{run.server.title}: tokens of each agent over time", fontsize=11)
    add_caption(figure, f"{caption}. Shown: round {run.round + 1}.")
    return figure


def _lanes(records: Sequence[TurnRecord]) -> list[tuple[str, list[TurnRecord]]]:
    """Calls by lane: programs that do not overlap share one, as the turns of an agent do. Victims come first."""
    programs: dict[str, list[TurnRecord]] = {}
    for record in sorted(records, key=lambda r: r.sent_ns):
        programs.setdefault(record.program_id, []).append(record)
    ordered = sorted(programs.values(), key=lambda turns: (turns[0].role != "victim", turns[0].sent_ns))
    lanes: list[tuple[str, list[TurnRecord]]] = []
    counts: dict[str, int] = {}
    for turns in ordered:
        role = turns[0].role
        lane = _free_lane(lanes, turns[0])
        if lane is None:
            counts[role] = counts.get(role, 0) + 1
            lane = (f"{role} {counts[role]}", [])
            lanes.append(lane)
        lane[1].extend(turns)
    return lanes


def _free_lane(lanes: Sequence[tuple[str, list[TurnRecord]]], first: TurnRecord) -> tuple[str, list[TurnRecord]] | None:
    """A lane of the same role whose last call had ended when this one was sent."""
    for lane in lanes:
        last = lane[1][-1]
        if last.role == first.role and last.finished_ns <= first.sent_ns:
            return lane
    return None


def _draw_call(axes: Axes, row: int, record: TurnRecord) -> None:
    sent_s, finished_s = record.sent_ns / 1e9, record.finished_ns / 1e9
    color = COLD if record.is_cold else RESUMED
    if not record.token_ns:
        axes.barh(row, finished_s - sent_s, left=sent_s, height=0.7, color=color, hatch="xx", edgecolor="white")
        return
    tokens_s = [at_ns / 1e9 for at_ns in record.token_ns]
    axes.barh(row, tokens_s[0] - sent_s, left=sent_s, height=0.7, color=color, linewidth=0)
    axes.vlines(tokens_s, row - 0.35, row + 0.35, color=DECODE, linewidth=0.6)


def _draw_gaps_over_time(axes: Axes, run: RunResult) -> None:
    """Each gap at its end; the time in which a cold prompt waits is shaded."""
    victims = [record for record in run.records if record.role == "victim"]
    shown = victims or list(run.records)
    times, gaps = [], []
    for record in shown:
        arrivals = sorted(set(record.token_ns))
        times += [at_ns / 1e9 for at_ns in arrivals[1:]]
        gaps += [(after - before) / 1e6 for before, after in itertools.pairwise(arrivals)]
    for record in run.records:
        if record.is_cold and record.role != "victim":
            end_ns = record.token_ns[0] if record.token_ns else record.finished_ns
            axes.axvspan(record.sent_ns / 1e9, end_ns / 1e9, color=COLD, alpha=0.12, linewidth=0)
    axes.scatter(times, gaps, s=5, color=DECODE, linewidths=0)
    axes.set_yscale("log")
    plain_numbers(axes.yaxis)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.set_ylabel("gap between\ntokens, ms" + ("\n(victim)" if victims else ""), fontsize=9)
    axes.set_xlabel("time since the start of the run, s   (shaded: a cold prompt waits)", fontsize=9)
    axes.set_xlim(left=0)
