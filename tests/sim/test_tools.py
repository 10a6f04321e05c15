"""Tool times: distributions, profiles, and gaps that depend on the seed, the program and the turn alone."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentserve.core.events import HUMAN
from agentserve.errors import WorkloadError
from agentserve.sim.programs import Program, Turn, Workload
from agentserve.sim.tools import (
    TOOL_PROFILES,
    Empirical,
    LogNormal,
    ToolProfile,
    fit_tools,
    load_tool_profile,
    with_tool_times,
)

SWE_BENCH = TOOL_PROFILES["swe-bench"]


def workload(num_programs: int, num_turns: int, tool_name: str | None = None) -> Workload:
    turns = (*(Turn(5, 2, 7.0, tool_name=tool_name) for _ in range(num_turns - 1)), Turn(5, 2))
    return Workload("w", tuple(Program(f"p{index}", turns) for index in range(num_programs)), 1, description="d")


def gaps(found: Workload) -> list[float]:
    return [turn.tool_gap_ms for program in found.programs for turn in program.turns[:-1]]


# ---- distributions ----


def test_a_log_normal_has_the_quantiles_it_was_made_from() -> None:
    times = LogNormal.of_quantiles(170.0, 3000.0)
    assert times.quantile_ms(0.5) == pytest.approx(170.0)
    assert times.quantile_ms(0.99) == pytest.approx(3000.0)
    assert LogNormal.of_quantiles(5.0, 5.0).quantile_ms(0.0) == pytest.approx(5.0)
    assert 0.0 <= times.quantile_ms(0.0) < 0.1


def test_a_log_normal_has_the_moments_it_was_made_from() -> None:
    times = LogNormal.of_moments(1161.0, 4125.0)
    assert times.mean_ms == pytest.approx(1161.0)
    # Deviation of a log-normal: mean * sqrt(exp(sigma ** 2) - 1).
    assert times.mean_ms * math.sqrt(math.expm1(times.sigma**2)) == pytest.approx(4125.0)


def test_a_fit_finds_the_log_normal_again() -> None:
    samples = [LogNormal(5.0, 1.2).quantile_ms((index + 0.5) / 4000) for index in range(4000)]
    found = LogNormal.fit(samples)
    assert (found.mu, found.sigma) == (pytest.approx(5.0, abs=1e-6), pytest.approx(1.2, rel=0.002))
    assert LogNormal.fit([0.0]).quantile_ms(0.9) == pytest.approx(1e-3)


def test_an_empirical_distribution_is_linear_between_its_points() -> None:
    times = Empirical(((0.0, 20.0), (0.5, 170.0), (1.0, 3000.0)))
    assert [times.quantile_ms(p) for p in (0.0, 0.25, 0.5, 0.75, 1.0)] == [20.0, 95.0, 170.0, 1585.0, 3000.0]
    assert times.mean_ms == 0.5 * 95.0 + 0.5 * 1585.0
    of_samples = Empirical.of_samples([30.0, 10.0, 20.0])
    assert [of_samples.quantile_ms(p) for p in (0.0, 0.25, 0.5, 1.0)] == [10.0, 15.0, 20.0, 30.0]
    assert Empirical.of_samples([4.0]).quantile_ms(0.7) == 4.0


@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=9).map(Empirical.of_samples)
    | st.tuples(st.floats(0.1, 1e4), st.floats(0.0, 1e6)).map(lambda pair: LogNormal.of_moments(*pair)),
    st.floats(0, 1, exclude_max=True),
    st.floats(0, 1, exclude_max=True),
)
def test_quantiles_rise(times: Empirical | LogNormal, low: float, high: float) -> None:
    first, second = sorted([low, high])
    assert 0.0 <= times.quantile_ms(first) <= times.quantile_ms(second) * (1 + 1e-12) < math.inf


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LogNormal(0.0, -1.0), "sigma of at least 0"),
        (lambda: LogNormal.of_quantiles(9.0, 3.0), "expected 0 < p50 <= p99, not 9.0 and 3.0"),
        (lambda: LogNormal.of_moments(0.0, 3.0), "expected more than 0 and at least 0, not 0.0 and 3.0"),
        (lambda: LogNormal.fit([]), "expected at least one"),
        (lambda: Empirical(((0.0, 1.0),)), "expected shares that rise from 0 to 1"),
        (lambda: Empirical(((0.0, 1.0), (0.9, 2.0))), "expected shares that rise from 0 to 1"),
        (lambda: Empirical(((0.0, 3.0), (1.0, 2.0))), "expected times that do not fall"),
        (lambda: Empirical.of_samples([1.0, math.nan]), "each in milliseconds, 0 or more"),
        (lambda: ToolProfile("x", {}, {"sed": 1.0}), "mix: there is no tool 'sed'"),
        (lambda: ToolProfile("x", SWE_BENCH.tools, {"sed": -1.0}), "mix: sed: expected a weight of at least 0"),
        (lambda: ToolProfile("x", SWE_BENCH.tools, {"sed": 0.0}), "mix: expected a tool with a weight above 0"),
    ],
)
def test_distributions_that_are_none(make: Any, message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        make()


# ---- the built-in profile ----


def test_swe_bench_has_the_published_numbers() -> None:
    def p50(tool: str) -> float:
        return SWE_BENCH.tools[tool].quantile_ms(0.5)

    def p99(tool: str) -> float:
        return SWE_BENCH.tools[tool].quantile_ms(0.99)

    assert list(SWE_BENCH.tools) == ["sed", "grep", "cat", "python", "git", "pip", "pytest"]
    assert p99("sed") == pytest.approx(300.0)
    assert all(160.0 <= p50(tool) <= 180.0 and p99(tool) == pytest.approx(3000.0) for tool in ("grep", "cat"))
    assert p50("python") == pytest.approx(600.0)
    assert p99("git") == pytest.approx(9000.0)
    assert SWE_BENCH.mean_ms == pytest.approx(1161.0, rel=0.03)
    # The mix's second moment: each tool's exp(2 mu + 2 sigma ** 2).
    second = 0.0
    for name, weight in SWE_BENCH.mix.items():
        times = SWE_BENCH.tools[name]
        assert isinstance(times, LogNormal)
        second += weight * math.exp(2 * times.mu + 2 * times.sigma**2)
    assert sum(SWE_BENCH.mix.values()) == pytest.approx(1.0)
    assert math.sqrt(second - SWE_BENCH.mean_ms**2) == pytest.approx(4125.0, rel=0.03)


def test_draws_follow_the_profile() -> None:
    found = with_tool_times(workload(400, 11), SWE_BENCH, seed=3)
    turns = [turn for program in found.programs for turn in program.turns[:-1]]
    assert statistics.fmean(gaps(found)) == pytest.approx(1161.0, rel=0.25)  # 4000 draws with a long tail
    share = sum(turn.tool_name == "sed" for turn in turns) / len(turns)
    assert share == pytest.approx(0.24, abs=0.03)
    sed = [turn.tool_gap_ms for turn in turns if turn.tool_name == "sed"]
    assert statistics.median(sed) == pytest.approx(60.0, rel=0.1)
    assert found.description == "d; tool times drawn from swe-bench, seed 3"


# ---- with_tool_times ----


def test_a_draw_depends_on_seed_program_and_turn_alone() -> None:
    one = with_tool_times(workload(5, 4), SWE_BENCH, seed=1)
    assert with_tool_times(workload(5, 4), SWE_BENCH, seed=1) == one
    assert with_tool_times(workload(5, 4), SWE_BENCH, seed=2).programs != one.programs
    # More programs, longer programs, or another order: those that were there keep theirs.
    assert with_tool_times(workload(9, 4), SWE_BENCH, seed=1).programs[:5] == one.programs
    longer = with_tool_times(workload(5, 7), SWE_BENCH, seed=1).programs
    assert [p.turns[:3] for p in longer] == [p.turns[:3] for p in one.programs]
    turned = Workload("w", tuple(reversed(workload(5, 4).programs)), 1)
    assert with_tool_times(turned, SWE_BENCH, seed=1).programs == tuple(reversed(one.programs))
    # And no two draws are the same.
    assert len(set(gaps(one))) == 15


def test_named_tools_keep_their_names() -> None:
    found = with_tool_times(workload(3, 3, "pip"), SWE_BENCH, seed=0)
    assert {turn.tool_name for program in found.programs for turn in program.turns[:-1]} == {"pip"}
    assert [program.turns[-1] for program in found.programs] == [Turn(5, 2)] * 3  # nothing waits behind the last
    with pytest.raises(WorkloadError, match="tool profile swe-bench: there is no tool 'awk'; there are sed, grep, "):
        with_tool_times(workload(1, 2, "awk"), SWE_BENCH, seed=0)
    default = ToolProfile("mine", {}, default=Empirical.of_samples([12.0]))
    assert gaps(with_tool_times(workload(1, 3, "awk"), default, seed=0)) == [12.0, 12.0]


def test_gaps_without_a_tool_stay_where_there_is_no_mix() -> None:
    found = with_tool_times(workload(2, 3), ToolProfile("mine", SWE_BENCH.tools), seed=0)
    assert gaps(found) == [7.0] * 4
    assert found.notes == ("4 turns name no tool, and the profile mine has no mix; their gaps stay",)


def test_a_profile_is_fitted_to_recorded_gaps() -> None:
    drawn = with_tool_times(workload(300, 11), SWE_BENCH, seed=5)
    fitted = fit_tools(drawn, log_normal=True)
    for name in ("sed", "python"):
        original, found = SWE_BENCH.tools[name], fitted.tools[name]
        assert isinstance(original, LogNormal)
        assert isinstance(found, LogNormal)
        assert (found.mu, found.sigma) == (pytest.approx(original.mu, rel=0.03), pytest.approx(original.sigma, rel=0.1))
    assert sum(fitted.mix.values()) == 3000
    assert fitted.provenance == "log-normal fitted to 3000 gaps of w"
    empirical = fit_tools(drawn)
    assert empirical.mean_ms == pytest.approx(statistics.fmean(gaps(drawn)), rel=0.05)
    with pytest.raises(WorkloadError, match="no turn names the tool"):
        fit_tools(workload(1, 2))


# ---- files ----


def write(path: Path, value: Any) -> str:
    path.write_text(json.dumps(value))
    return str(path)


def test_a_profile_is_read_from_json(tmp_path: Path) -> None:
    value = {
        "name": "mine",
        "provenance": "made up",
        "tools": {
            "sed": {"p50_ms": 60, "p99_ms": 300},
            "git": {"mean_ms": 760, "deviation_ms": 2900},
            "pip": {"samples_ms": [900, 4100]},
            "make": {"samples_ms": [1000, 4000], "fit": "log-normal"},
            "cat": {"quantiles": [[0, 20], [1, 3000]]},
        },
        "mix": {"sed": 3, "pip": 1},
        "default": {"samples_ms": [5]},
    }
    profile = load_tool_profile(write(tmp_path / "tools.json", value))
    assert profile == ToolProfile(
        "mine",
        {
            "sed": LogNormal.of_quantiles(60.0, 300.0),
            "git": LogNormal.of_moments(760.0, 2900.0),
            "pip": Empirical(((0.0, 900.0), (1.0, 4100.0))),
            "make": LogNormal.fit([1000.0, 4000.0]),
            "cat": Empirical(((0.0, 20.0), (1.0, 3000.0))),
        },
        {"sed": 3.0, "pip": 1.0},
        Empirical.of_samples([5.0]),
        "made up",
    )
    # (3 * mean of sed + (900 + 4100) / 2) / 4
    assert profile.mean_ms == pytest.approx((3 * profile.tools["sed"].mean_ms + 2500.0) / 4)
    assert load_tool_profile("swe-bench") is SWE_BENCH
    assert load_tool_profile(write(tmp_path / "bare.json", {"tools": {"a": {"samples_ms": [1]}}})).name == "bare"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], ": expected a JSON object, not []"),
        ({}, ": tools: expected a JSON object, but it is missing"),
        ({"tools": {}}, ": tools: expected at least one entry, not {}"),
        ({"tools": {"a": 4}}, ": tools.a: expected a JSON object, not 4"),
        ({"tools": {"a": {}}}, ": tools.a.p50_ms: expected p50_ms and p99_ms, mean_ms and deviation_ms, samples_ms"),
        ({"tools": {"a": {"p50_ms": 4}}}, ": tools.a.p99_ms: expected milliseconds, 0 or more, but it is missing"),
        ({"tools": {"a": {"p50_ms": 4, "p99_ms": 3}}}, ": tools.a.p50_ms, p99_ms: expected 0 < p50 <= p99"),
        ({"tools": {"a": {"samples_ms": [-1]}}}, ": tools.a.samples_ms: expected a list of numbers, each 0 or more"),
        ({"tools": {"a": {"samples_ms": [1], "fit": "x"}}}, ": tools.a.fit: expected 'empirical' or 'log-normal'"),
        ({"tools": {"a": {"quantiles": [[0]]}}}, ": tools.a.quantiles: expected a list of pairs of numbers"),
        ({"tools": {"a": {"samples_ms": [1], "x": 1}}}, ": tools.a.x: expected no such field"),
        ({"tools": {"a": {"samples_ms": [1]}}, "mixx": 1}, ": mixx: expected no such field"),
        ({"tools": {"a": {"samples_ms": [1]}}, "mix": {"b": 1}}, ": mix: there is no tool 'b'; there are a"),
    ],
)
def test_a_bad_profile_is_named(tmp_path: Path, value: Any, message: str) -> None:
    path = write(tmp_path / "tools.json", value)
    with pytest.raises(WorkloadError) as caught:
        load_tool_profile(path)
    assert str(caught.value).startswith(path + message)


def test_profiles_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="none is neither a file nor a tool profile; there are swe-bench"):
        load_tool_profile("none")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(WorkloadError, match=r"x\.json: expected a JSON object: "):
        load_tool_profile(str(tmp_path / "x.json"))


def test_a_tool_profile_leaves_what_people_take_alone() -> None:
    turns = (Turn(8, 2, 500.0, "grep"), Turn(8, 2, 9000.0, HUMAN), Turn(8, 2))
    workload = Workload("w", (Program("a", turns),), None)
    assert set(fit_tools(workload).tools) == {"grep"}
    gaps = [turn.tool_gap_ms for turn in with_tool_times(workload, TOOL_PROFILES["swe-bench"], 1).programs[0].turns]
    assert gaps[0] != 500.0 and gaps[1] == 9000.0
