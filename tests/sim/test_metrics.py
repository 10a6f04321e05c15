"""Metrics against hand-made records and a naive second definition."""

from __future__ import annotations

import dataclasses
import json
import statistics
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentserve.errors import WorkloadError
from agentserve.sim.metrics import Distribution, Slo, TurnRecord, isolated_slo, percentile, summarize

MS = 1_000_000


def record(
    program: str = "a", turn: int = 0, *, sent: int = 0, tokens: tuple[int, ...] = (), **values: Any
) -> TurnRecord:
    """Times in milliseconds."""
    defaults: dict[str, Any] = {
        "program_id": program,
        "turn_index": turn,
        "role": "agent",
        "num_turns": 2,
        "num_prompt_tokens": 10,
        "num_cached_tokens": 4,
        "num_output_tokens": len(tokens),
        "sent_ns": sent * MS,
        "token_ns": tuple(at * MS for at in tokens),
        "finished_ns": (tokens[-1] if tokens else sent) * MS,
    }
    return TurnRecord(**{**defaults, **values})


def test_one_call() -> None:
    one = record(sent=100, tokens=(150, 160, 160, 200))
    assert one.ttft_ns == 50 * MS
    assert one.tpot_ns == pytest.approx(50 * MS / 3)  # (200 - 150) / (4 - 1)
    assert one.gaps_ns == (10 * MS, 40 * MS)  # the third token came with the second
    assert one.e2e_ns == 100 * MS
    assert record(tokens=(5,)).tpot_ns is None
    assert record().ttft_ns is None


def test_a_run() -> None:
    records = [
        record("a", 0, sent=0, tokens=(100, 110, 120)),
        record("a", 1, sent=200, tokens=(220, 230)),
        record("b", 0, sent=50, tokens=(150, 250), role="other", num_turns=1),
        record("c", 0, sent=0, error="boom", finished_ns=10**12),
    ]
    summary = summarize(records, slo=Slo(100 * MS, 10 * MS))
    assert (summary.all.num_turns, summary.all.num_errors) == (3, 1)
    assert summary.cold.ttft_ns == Distribution(2, 100 * MS, 100 * MS, 100 * MS, 100 * MS, 100 * MS)
    assert summary.resumed.ttft_ns is not None
    assert summary.resumed.ttft_ns.p50 == 20 * MS
    assert summary.all.itl_ns is not None
    assert summary.all.itl_ns.mean == 32.5 * MS  # 10, 10, 10 and 100
    assert summary.all.worst_stall_ns is not None
    assert summary.all.worst_stall_ns.mean == 40 * MS  # 10, 10 and 100
    assert set(summary.by_role) == {"agent", "other"}
    assert (summary.by_role["agent"].num_turns, summary.by_role["agent"].num_errors) == (2, 1)
    assert summary.time_to_tool_call_ns == Distribution(1, 120 * MS, 120 * MS, 120 * MS, 120 * MS, 120 * MS)
    assert summary.job_completion_ns is not None
    assert summary.job_completion_ns.mean == (230 + 200) / 2 * MS
    assert summary.makespan_ns == 250 * MS
    assert summary.output_tokens_per_s == pytest.approx(7 / 0.25)
    assert summary.turns_per_s == pytest.approx(3 / 0.25)
    assert (summary.num_prompt_tokens, summary.num_cached_tokens) == (30, 12)
    # b's only gap is 100 ms, and c failed.
    assert summary.slo_attainment == pytest.approx(1 / 3)
    assert summary.goodput_turns_per_s == pytest.approx(2 / 0.25)
    assert summary.under_attack is None
    assert json.loads(json.dumps(summary.to_json()))["cold"]["ttft_ns"]["p95"] == 100 * MS


def test_nothing_to_measure() -> None:
    for records in ([], [record(error="boom")]):
        summary = summarize(records, slo=Slo(1, 1))
        assert summary.all.ttft_ns is None
        assert summary.job_completion_ns is None
        assert (summary.makespan_ns, summary.output_tokens_per_s, summary.goodput_turns_per_s) == (0, 0.0, 0.0)
        assert summary.slo_attainment == (0.0 if records else None)


def test_a_session_meets_its_targets_as_a_whole() -> None:
    # 20 gaps of 10 ms and one of 100: position 0.95 * 20 = 19 is the last 10.
    tokens = (*range(100, 310, 10), 400)
    turns = [record("a", 0, tokens=tokens), record("a", 1, sent=500, tokens=(900,))]
    assert summarize(turns, slo=Slo(100 * MS, 10 * MS)).slo_attainment == 1.0  # only the cold TTFT counts
    assert summarize(turns, slo=Slo(99 * MS, 10 * MS)).slo_attainment == 0.0
    assert summarize(turns, slo=Slo(100 * MS, 9 * MS)).slo_attainment == 0.0
    failed = dataclasses.replace(turns[1], error="boom")
    assert summarize([turns[0], failed], slo=Slo(100 * MS, 10 * MS)).slo_attainment == 0.0


def test_gaps_under_attack_are_those_that_overlap_it() -> None:
    records = [
        record("v", role="victim", tokens=(10, 20, 30, 70, 120, 130)),
        record("x", role="attacker", sent=25, tokens=(60, 65)),
        record("y", role="attacker", sent=66, tokens=(110,), finished_ns=115 * MS),
    ]
    attack = summarize(records).under_attack
    assert attack is not None
    assert attack.itl_ns is not None
    # From 25 to 115 ms: the gaps 20-30, 30-70 and 70-120, whole.
    assert attack.itl_ns.num_values == 3
    assert attack.itl_ns.mean == pytest.approx(100 / 3 * MS)
    assert attack.worst_stall_ns == 50 * MS
    assert attack.covered == 1.0
    short = [record("v", role="victim", tokens=(10, 20, 30, 70)), *records[1:]]
    attack = summarize(short).under_attack
    assert attack is not None
    assert attack.covered == 0.5  # 25 to 70 of 25 to 115


def test_isolated_targets_are_a_multiple() -> None:
    slo = isolated_slo([record(sent=0, tokens=(100, 110, 120))], factor=2.0)
    assert slo == Slo(200 * MS, 20 * MS)
    with pytest.raises(WorkloadError, match="no first turn"):
        isolated_slo([record(error="boom")])
    with pytest.raises(WorkloadError, match="positive"):
        Slo(0, 1)


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=60))
def test_distribution_against_the_standard_library(values: list[int]) -> None:
    found = Distribution.of(values)
    assert found is not None
    assert (found.num_values, found.max) == (len(values), max(values))
    assert found.mean == pytest.approx(statistics.fmean(values))
    if len(values) > 1:
        # `inclusive` is the same linear interpolation; its 99 cut points are the percentiles 1 to 99.
        cuts = statistics.quantiles(values, n=100, method="inclusive")
        assert [found.p50, found.p95, found.p99] == pytest.approx([cuts[49], cuts[94], cuts[98]])
    assert percentile(values, 0.0) == min(values)
    assert percentile(values, 1.0) == max(values)


def test_percentiles_of_nothing() -> None:
    assert Distribution.of([]) is None
    with pytest.raises(ValueError, match=r"no percentile 0\.5 of 0 values"):
        percentile([], 0.5)


@st.composite
def records(draw: st.DrawFn) -> TurnRecord:
    sent = draw(st.integers(0, 1000))
    arrivals = sorted(draw(st.lists(st.integers(sent, 3000), min_size=1, max_size=6)))
    return record(
        draw(st.sampled_from("abc")),
        draw(st.integers(0, 1)),
        sent=sent,
        tokens=tuple(arrivals),
        role=draw(st.sampled_from(["agent", "victim", "attacker"])),
        num_cached_tokens=draw(st.none() | st.integers(0, 10)),
        error=draw(st.none() | st.just("boom")),
    )


@given(st.lists(records(), max_size=12))
def test_a_summary_counts_every_call_once(items: list[TurnRecord]) -> None:
    summary = summarize(items, slo=Slo(500 * MS, 100 * MS))
    good = [item for item in items if item.error is None]
    for parts in ((summary.cold, summary.resumed), tuple(summary.by_role.values())):
        assert sum(part.num_turns for part in parts) == summary.all.num_turns == len(good)
        assert sum(part.num_errors for part in parts) == summary.all.num_errors == len(items) - len(good)
    assert summary.num_output_tokens == sum(len(item.token_ns) for item in good)
    naive_good = sum(
        item.token_ns[0] - item.sent_ns <= 500 * MS
        and (len(item.token_ns) == 1 or (item.token_ns[-1] - item.token_ns[0]) / (len(item.token_ns) - 1) <= 100 * MS)
        for item in good
    )
    assert summary.goodput_turns_per_s is not None
    assert summary.goodput_turns_per_s * summary.makespan_ns / 1e9 == pytest.approx(
        naive_good if summary.makespan_ns else 0
    )
    num_gaps = sum(len(set(item.token_ns)) - 1 for item in good)
    assert (summary.all.itl_ns.num_values if summary.all.itl_ns else 0) == num_gaps


@given(records())
def test_records_survive_json(item: TurnRecord) -> None:
    assert TurnRecord.from_json(json.loads(json.dumps(item.to_json()))) == item


def test_a_bad_record_is_refused() -> None:
    with pytest.raises(WorkloadError, match="not the record of a turn"):
        TurnRecord.from_json({"token_ns": [], "colour": "red"})
