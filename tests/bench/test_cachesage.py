"""CacheSage's evaluation: a replay repeats what was recorded, and the policies come in their order."""

from __future__ import annotations

import pytest

from bench.cachesage.__main__ import gains_of, reached, rows_of
from bench.cachesage.cases import Case, run_case, traffic_of
from bench.cachesage.losses import LossMeter
from bench.cachesage.traffic import POLICY_CHANGES, replay

CASE = Case("selector", num_blocks=1100, seed=0, num_agents=6, num_tasks=6, max_num_seqs=4, gpu="rtx-5090")


def test_anchors_prediction_and_the_oracle_come_in_this_order() -> None:
    results = run_case(CASE)
    hits = {result.policy: result.hit_rate for result in results}
    assert list(hits) == list(POLICY_CHANGES) and len({result.num_calls for result in results}) == 1
    assert hits["lru"] + 0.05 < hits["anchor"]
    assert hits["lru"] + 0.05 < hits["transition, no prediction"]
    assert hits["anchor"] <= hits["transition"] < hits["oracle"]
    ttft_ms = {result.policy: result.mean_ttft_ms for result in results}
    assert ttft_ms["oracle"] < ttft_ms["transition"] < 0.88 * ttft_ms["lru"]


def test_the_same_policy_repeats_the_recorded_run() -> None:
    case = Case("pipeline", num_blocks=900, seed=1, num_agents=2, num_tasks=2, max_num_seqs=2, gpu="rtx-5090")
    first = replay(traffic_of(case), "lru", 900)
    assert first == replay(traffic_of(case), "lru", 900) and 0 < first.hit_rate < 1


def test_both_goals_count() -> None:
    def row(name: str, points: float, change: float) -> dict[str, object]:
        gains = {"hit_rate": 0.5, "hit_gain_points": points, "ttft_change": change}
        return {"workload": name, "num_blocks": 9, "policy": "p", **gains}

    gains = gains_of([row("a", 20.0, -0.2), row("b", 12.0, -0.2), row("c", 20.0, -0.1), row("a", 8.0, -0.4)])
    assert reached(gains, "p") == {9: ["a"]}  # (20 + 8) / 2 = 14 points
    assert gains[0].hit_points == (14.0, 8.0, 20.0)
    assert gains[0].ttft_change == (pytest.approx(-0.3), -0.4, -0.2)
    assert rows_of([], []) == gains_of([]) == []


def test_what_is_lost_is_counted_by_class() -> None:
    case = Case("pipeline", num_blocks=900, seed=1, num_agents=2, num_tasks=2, max_num_seqs=2, gpu="rtx-5090")
    traffic = traffic_of(case)
    found = {}
    for policy in ("lru", "oracle"):
        meter = LossMeter([command for _, command in traffic.calls], traffic.header.config.block_size)
        result = replay(traffic, policy, case.num_blocks, meter)
        losses = found[policy] = meter.result(case.num_blocks)
        # Every block of a prompt is found or missed; the last token of a prompt is always computed, so the last block.
        assert 1.0 - sum(losses.missed.values()) == pytest.approx(result.hit_rate, abs=0.02)
        assert 0.5 < sum(losses.resident.values()) <= 1.0
    assert found["lru"].missed["new"] == pytest.approx(found["oracle"].missed["new"], abs=0.01)
    assert found["oracle"].missed["history"] < found["lru"].missed["history"]
