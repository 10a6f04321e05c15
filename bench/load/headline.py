"""The few numbers that a comparison is about, the same for every workload."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from bench.load.results import Results, RunResult, ServerInfo


@dataclass(frozen=True, slots=True)
class Headline:
    """One run in numbers. Where there are victims and attackers: gaps of the victims during the attack, TTFT of the
    attackers. None where the run has no such value."""

    gap_p50_ms: float | None
    gap_p95_ms: float | None
    worst_stall_ms: float | None
    cold_ttft_ms: float | None
    """Median."""
    resumed_ttft_ms: float | None
    """Median."""
    output_tokens_per_s: float

    @classmethod
    def of(cls, run: RunResult) -> Headline:
        summary = run.summary
        gaps, cold = summary.all.itl_ns, summary.cold.ttft_ns
        if summary.under_attack is not None:
            gaps, cold = summary.under_attack.itl_ns, summary.by_role["attacker"].ttft_ns
        resumed = summary.resumed.ttft_ns
        return cls(
            gap_p50_ms=gaps.p50 / 1e6 if gaps else None,
            gap_p95_ms=gaps.p95 / 1e6 if gaps else None,
            worst_stall_ms=gaps.max / 1e6 if gaps else None,
            cold_ttft_ms=cold.p50 / 1e6 if cold else None,
            resumed_ttft_ms=resumed.p50 / 1e6 if resumed else None,
            output_tokens_per_s=summary.output_tokens_per_s,
        )


def headlines(results: Results, workload: str, server: str) -> list[Headline]:
    """One for each round."""
    return [Headline.of(run) for run in results.of(workload, server)]


def median_of(values: Iterable[float]) -> float:
    """A number over several rounds is the median of the rounds' numbers."""
    return float(statistics.median(values))


@dataclass(frozen=True, slots=True)
class Point:
    """A setting of a server in the plane of the two things that are traded: lower is better in both."""

    server: ServerInfo
    gap_p95_ms: float
    cold_ttft_ms: float
    worst_stall_ms: float
    """The worst of all rounds."""

    def beats(self, other: Point) -> bool:
        return self.gap_p95_ms < other.gap_p95_ms and self.cold_ttft_ms < other.cold_ttft_ms


def frontier_points(results: Results, workload: str) -> list[Point]:
    """One point for each server that has both numbers, medians over the rounds."""
    points = []
    for server in results.servers:
        of_server = headlines(results, workload, server.name)
        gaps = [h.gap_p95_ms for h in of_server if h.gap_p95_ms is not None]
        ttfts = [h.cold_ttft_ms for h in of_server if h.cold_ttft_ms is not None]
        stalls = [h.worst_stall_ms for h in of_server if h.worst_stall_ms is not None]
        if gaps and ttfts:
            points.append(Point(server, median_of(gaps), median_of(ttfts), max(stalls)))
    return points


def attack_gaps(run: RunResult) -> list[int]:
    """The victims' gaps during the attack, in nanoseconds; empty without an attack."""
    attackers = [r for r in run.records if r.role == "attacker" and r.error is None]
    if not attackers:
        return []
    start_ns, end_ns = min(r.sent_ns for r in attackers), max(r.finished_ns for r in attackers)
    return [
        after - before
        for record in run.records
        if record.role == "victim" and record.error is None
        for before, after in zip(record.token_ns, record.token_ns[1:], strict=False)
        if before < end_ns and after > start_ns and after > before
    ]
