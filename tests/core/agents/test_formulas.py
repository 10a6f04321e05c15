"""The numbers that policies decide by, against sums done by hand."""

from __future__ import annotations

import pytest

from agentserve.core.agents.costs import ForwardCosts
from agentserve.core.agents.policies.min_waste import discard_waste, preserve_waste
from agentserve.core.agents.policies.ttl import Memoryfulness
from agentserve.core.agents.registry import GapSamples, GapStatistics
from agentserve.core.slots import build_partition_table
from tests.core.builders import cost_model


def samples(*gaps_ns: int) -> GapSamples:
    made = GapSamples()
    for gap_ns in gaps_ns:
        made.add(gap_ns)
    return made


@pytest.mark.parametrize(
    ("benefit_ns", "expected_ns"),
    [
        (4, 0),  # 1/4 * 4 - 1 = 0, which is not more than nothing
        (8, 3),  # 1: 2 - 1 = 1; 2: 4 - 2 = 2; 3: 6 - 3 = 3; 100 is more than it can bring
        (1000, 100),  # 100: 1000 - 100 = 900 is more than 3/4 * 1000 - 3 = 747
        (300, 3),  # 3: 225 - 3 = 222; 100: 300 - 100 = 200
    ],
)
def test_the_ttl_pays_best(benefit_ns: int, expected_ns: int) -> None:
    assert samples(3, 1, 100, 2).best_wait_ns(benefit_ns) == expected_ns


def test_of_many_gaps_every_fourth_is_tried_and_the_longest() -> None:
    many = samples(*range(1, 129))
    # P(gap <= t) * 256 - t = 2t - t grows with t up to the longest gap, 128.
    assert many.best_wait_ns(256) == 128
    # 127 short gaps and a very long one: 127/128 of 1,280 are 1,270, for 10. Of 128 gaps ranks 4, 8, ... 128 are tried.
    assert samples(*[10] * 127, 10**9).best_wait_ns(1280) == 10
    # Ranks 1 to 3 are passed over: rank 4 is the first time that is tried, and 4/128 * 128 is no more than it costs.
    assert many.best_wait_ns(128) == 0


def test_gaps_are_those_of_the_tool_once_there_are_enough() -> None:
    gaps = GapStatistics()
    assert gaps.of("sed", 1) is None
    gaps.add(None, 7)
    gaps.add("sed", 5)
    found = gaps.of("sed", 1)
    assert found is not None and found.ascending == [5]
    overall = gaps.of("sed", 2)
    assert overall is not None and overall.ascending == [5, 7]
    assert gaps.of("sed", 3) is None


def test_old_gaps_are_forgotten() -> None:
    kept = samples(*range(200))
    assert kept.ascending == list(range(72, 200))  # the latest 128
    assert kept.mean_ns == 135.5  # (72 + 199) / 2


def test_memoryfulness() -> None:
    equal, mixed = Memoryfulness(), Memoryfulness()
    assert equal.value == 1.0
    for _ in range(3):
        equal.add(4)
    assert equal.value == pytest.approx(1.0)
    # Programs of 2 and 4 turns: points (1, 1), (1, 3), (2, 2), (3, 1). Means 7/4; sum of xy = 1 + 3 + 4 + 3 = 11,
    # 11 - 49/4 = -5/4; sum of xx = 15, 15 - 49/4 = 11/4. So the correlation is -5/11.
    mixed.add(2)
    mixed.add(4)
    assert mixed.value == pytest.approx(5 / 11)
    mixed.add(1)  # no turn is left after the first one: no point
    assert mixed.value == pytest.approx(5 / 11)


def test_wastes_of_infercept() -> None:
    costs = ForwardCosts(base_ns=100.0, token_ns=2.0, knee_tokens=50)
    assert preserve_waste(30.0, 120) == 3600.0
    # Room 50 - 10 = 40; n = ceil(120 / 40) - 1 = 2; a step takes 100 + 2 * 50 = 200.
    # own = 200 * 3 * 2 / 2 * 40 = 24,000; others = (80 * 2 + 2 * 40) * 1000 = 240,000.
    assert discard_waste(costs, 120, running_tokens=1000, num_running_in_batch=10) == 264_000.0
    # More run than the knee has room for: chunks of one token.
    assert discard_waste(costs, 2, running_tokens=10, num_running_in_batch=60) == 200.0 + (2 + 2) * 10


def test_costs_are_a_line_through_the_cost_model() -> None:
    # The device reads its weights in 8 ms and computes a token in 1 ms: 8 tokens keep it busy. The line goes from
    # T(1) to T(1009).
    costs = ForwardCosts.of(cost_model(), build_partition_table(8, 1, 1), 1009)
    assert costs.base_ns == pytest.approx(8e6, rel=1e-3)
    assert costs.token_ns == pytest.approx((1009 - 8) / 1008 * 1e6, rel=1e-2)
    assert costs.knee_tokens == 8
    assert costs.prefill_ns(1) == costs.base_ns
    assert costs.prefill_ns(80) == pytest.approx(80e6, rel=1e-2)
