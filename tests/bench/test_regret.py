"""What no controller can beat."""

from __future__ import annotations

import pytest

from agentserve.build.simulation import load_hardware
from bench.regret import Point, least_regret, main, points


def test_the_least_regret_of_two_ways_lies_where_both_regrets_are_equal() -> None:
    # Half of the time each: 75 of 100 prompt tokens and 7.5 of 10 tokens; both take 4/3 of the best.
    prompts, tokens = Point("turns", 100.0, 5.0), Point("split", 50.0, 10.0)
    regret = least_regret([prompts, tokens], [prompts, tokens])
    assert regret.least == pytest.approx(4 / 3)
    assert regret.share == 0.5
    # 100 / 1.1 prompt tokens need 82.5 % of the time for the first way: 5.875 tokens.
    assert regret.tokens_near_best_prompts == pytest.approx(10 / (0.825 * 5 + 0.175 * 10))


def test_a_way_that_is_best_in_both_has_no_regret_and_one_that_is_no_baseline_may_have_less_than_none() -> None:
    slow, fast = Point("slow", 50.0, 5.0), Point("fast", 100.0, 10.0)
    assert least_regret([slow, fast], [slow, fast]).least == 1.0
    assert least_regret([slow, fast], [slow]).least == 0.5


def test_every_partition_of_a_device_is_looked_at() -> None:
    hardware = load_hardware("rtx-5090", "qwen2.5-7b")
    labels = {point.label.split()[0] for point in points(hardware, 2, 500)}
    assert labels == {entry.label for entry in (*hardware.table.entries, hardware.table.whole)}


def test_the_table_names_the_device_and_an_unknown_one_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--gpu", "h100"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "H100" in printed[0]
    assert len(printed) == 6
    assert main(["--gpu", "rtx-4091"]) == 2
