"""Tables of a comparison. A number over several rounds is the median of the rounds' numbers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from agentserve.sim.metrics import Distribution, Summary
from bench.load.headline import Point, frontier_points
from bench.load.results import Results, RunResult, ServerInfo

Value = float | None


@dataclass(frozen=True, slots=True)
class Row:
    """What a column is computed from: one run, or one role's calls in it."""

    summary: Summary
    gaps: Distribution | None
    """Between arrivals; of a victim only those during the attack."""


@dataclass(frozen=True, slots=True)
class Column:
    title: str
    value: Callable[[Row], Value]
    digits: int = 0
    combine: Callable[[Sequence[float]], float] = statistics.median


def _ms(distribution: Distribution | None, field: str) -> Value:
    return None if distribution is None else getattr(distribution, field) / 1e6


def _percent(value: Value) -> Value:
    return None if value is None else 100.0 * value


def _prompt_rate(summary: Summary) -> Value:
    return 1e9 * summary.num_prompt_tokens / summary.makespan_ns if summary.makespan_ns else None


def _cached(summary: Summary) -> Value:
    if summary.num_cached_tokens is None or not summary.num_prompt_tokens:
        return None
    return summary.num_cached_tokens / summary.num_prompt_tokens


COLUMNS = (
    Column("calls", lambda row: row.summary.all.num_turns, combine=sum),
    Column("err", lambda row: row.summary.all.num_errors, combine=sum),
    Column("TTFT cold\np50 ms", lambda row: _ms(row.summary.cold.ttft_ns, "p50")),
    Column("\np95", lambda row: _ms(row.summary.cold.ttft_ns, "p95")),
    Column("TTFT res.\np50 ms", lambda row: _ms(row.summary.resumed.ttft_ns, "p50")),
    Column("\np95", lambda row: _ms(row.summary.resumed.ttft_ns, "p95")),
    Column("TPOT\np50 ms", lambda row: _ms(row.summary.all.tpot_ns, "p50"), 1),
    Column("\np95", lambda row: _ms(row.summary.all.tpot_ns, "p95"), 1),
    Column("gap\np50 ms", lambda row: _ms(row.gaps, "p50"), 1),
    Column("\np95", lambda row: _ms(row.gaps, "p95")),
    Column("\np99", lambda row: _ms(row.gaps, "p99")),
    Column("worst\nstall ms", lambda row: _ms(row.gaps, "max"), combine=max),
    Column("tool call\np50 ms", lambda row: _ms(row.summary.time_to_tool_call_ns, "p50")),
    Column("JCT\nmean s", lambda row: _seconds(row.summary.job_completion_ns), 1),
    Column("output\ntok/s", lambda row: row.summary.output_tokens_per_s, 1),
    Column("prompt\ntok/s", lambda row: _prompt_rate(row.summary)),
    Column("cached\n%", lambda row: _percent(_cached(row.summary))),
    Column("SLO\n%", lambda row: _percent(row.summary.slo_attainment)),
    Column("goodput\ncalls/s", lambda row: row.summary.goodput_turns_per_s, 2),
)


def _seconds(distribution: Distribution | None) -> Value:
    return None if distribution is None else distribution.mean / 1e9


def make_console() -> Console:
    """A pipe has no width; the table needs this much."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(width=210, highlight=False)


def print_tables(results: Results, console: Console) -> None:
    """A table for each workload, with a row for each server and role, and what is doubtful about the runs."""
    for workload in results.workloads:
        runs = results.of(workload)
        console.print(_table(workload, runs, results.servers))
        rounds = len({run.round for run in runs})
        notes = [f"Median of {rounds} rounds; worst stall: of all rounds."] if rounds > 1 else []
        if any(run.summary.under_attack for run in runs):
            notes.append("Gaps of a victim: those during the attack.")
        slo = next((run.slo for run in runs if run.slo), None)
        if slo:
            notes.append(f"SLO: cold TTFT within {slo.ttft_ns / 1e6:.0f} ms, gaps within {slo.tpot_ns / 1e6:.0f} ms.")
        console.print(" ".join(notes), style="dim")
        for run in runs:
            for doubt in run.doubts:
                console.print(f"  ! {run.server.title}, round {run.round}: {doubt}", style="yellow", markup=False)


def _table(workload: str, runs: Sequence[RunResult], servers: Iterable[ServerInfo]) -> Table:
    table = Table(title=workload, title_justify="left")
    table.add_column("server", no_wrap=True)
    table.add_column("role", no_wrap=True)
    for column in COLUMNS:
        table.add_column(column.title, justify="right", no_wrap=True)
    for server in servers:
        of_server = [run for run in runs if run.server.name == server.name]
        roles = sorted({role for run in of_server for role in run.roles})
        for position, role in enumerate(roles):
            rows = [_row(run, role) for run in of_server]
            cells = [_cell(column, [column.value(row) for row in rows]) for column in COLUMNS]
            table.add_row(server.title if position == 0 else "", role, *cells, end_section=role == roles[-1])
    return table


def _row(run: RunResult, role: str) -> Row:
    summary = run.of_role(role)
    attack = run.summary.under_attack
    return Row(summary, attack.itl_ns if attack and role == "victim" else summary.all.itl_ns)


def _cell(column: Column, values: Sequence[Value]) -> str:
    known = [value for value in values if value is not None]
    return f"{column.combine(known):.{column.digits}f}" if known else "-"


def print_dominance(results: Results, workload: str, console: Console, *, ours: str = "agentserve") -> None:
    """For each setting of a peer: is there one of ours that is better in gap and TTFT? And by how much."""
    points = frontier_points(results, workload)
    mine = [point for point in points if point.server.kind == ours]
    table = Table(title=f"Dominance on {workload}: p95 gap and median cold TTFT, ms", title_justify="left")
    for title in ("peer", "gap", "TTFT", "worst stall", "better in both", "gap", "TTFT", "worst stall", "ratios"):
        table.add_column(title, justify="left" if title in {"peer", "better in both"} else "right", no_wrap=True)
    for peer in (point for point in points if point.server.kind != ours):
        better = [point for point in mine if point.beats(peer)]
        numbers = [peer.server.title, *_numbers(peer)]
        if not better:
            table.add_row(*numbers, "none", "-", "-", "-", "-", style="red")
            continue
        # The one that is better in both by the largest product of the ratios.
        best = min(better, key=lambda point: point.gap_p95_ms * point.cold_ttft_ms)
        ratios = f"{peer.gap_p95_ms / best.gap_p95_ms:.1f}x, {peer.cold_ttft_ms / best.cold_ttft_ms:.1f}x"
        table.add_row(*numbers, best.server.title, *_numbers(best), ratios)
    if table.row_count:
        console.print(table)


def _numbers(point: Point) -> tuple[str, str, str]:
    return f"{point.gap_p95_ms:.0f}", f"{point.cold_ttft_ms:.0f}", f"{point.worst_stall_ms:.0f}"
