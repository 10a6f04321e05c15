"""Named workloads: the published distributions, the same for the same seed."""

from __future__ import annotations

import math
import statistics
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentserve.errors import WorkloadError
from agentserve.sim.workloads import WORKLOADS, Range, make_workload

WORLDS = ("independent", "interaction", "diffusion")
"""One program for each agent; see test_worlds."""
IN_BLOCKS = ("supervisor", "pipeline", "debate", "selector", "random_routing")
"""Their prompts are whole blocks of 16 tokens, in which agents share them."""


@given(low=st.integers(0, 500), width=st.integers(1, 500), position=st.floats(0.03, 0.97), seed=st.integers(0, 99))
def test_a_range_keeps_its_bounds_and_mean(low: int, width: int, position: float, seed: int) -> None:
    wanted = low + width * position
    random = Random(seed)
    drawn = [Range(low, low + width, wanted).draw(random) for _ in range(1500)]
    assert low <= min(drawn)
    assert max(drawn) <= low + width
    # Six standard errors of a uniform distribution, the widest of the family, and half a unit for rounding.
    assert abs(statistics.fmean(drawn) - wanted) < 6 * width / math.sqrt(12 * 1500) + 0.5


@pytest.mark.parametrize(
    ("name", "resume", "output"),
    [
        ("react", (30, 127, 56), (27, 99, 38)),
        ("plan_execute", (125, 421, 251), (41, 125, 58)),
    ],
)
def test_table_one(name: str, resume: tuple[int, int, int], output: tuple[int, int, int]) -> None:
    workload = make_workload(name, num_agents=4, num_programs=1500, seed=3)
    turns = [program.turns for program in workload.programs]
    rows = [
        ([t[0].append_tokens for t in turns], (2500, 3500, 3000)),
        ([turn.append_tokens for t in turns for turn in t[1:]], resume),
        ([turn.output_tokens for t in turns for turn in t], output),
    ]
    for values, (low, high, mean) in rows:
        assert low <= min(values)
        assert max(values) <= high
        assert statistics.fmean(values) == pytest.approx(mean, rel=0.02)
    rounds = [len(t) - 1 for t in turns]
    assert set(rounds) == {2, 3, 4}
    assert statistics.fmean(rounds) == pytest.approx(3, abs=0.1)
    # The tool runs after every turn but the last one.
    assert {turn.tool_gap_ms for t in turns for turn in t[:-1]} == {200.0}
    assert {t[-1].tool_gap_ms for t in turns} == {0.0}


@pytest.mark.parametrize("name", [name for name in WORKLOADS if name not in WORLDS])
def test_the_same_seed_gives_the_same_workload(name: str) -> None:
    first = make_workload(name, num_agents=3, num_programs=5, seed=1)
    assert make_workload(name, num_agents=3, num_programs=5, seed=1) == first
    assert make_workload(name, num_agents=3, num_programs=5, seed=2).programs != first.programs
    # More programs do not change those that were there.
    assert make_workload(name, num_agents=3, num_programs=9, seed=1).programs[:5] == first.programs
    assert len(first.programs) == 5


@pytest.mark.parametrize("name", WORKLOADS)
def test_scale_is_for_prompts_only(name: str) -> None:
    whole = make_workload(name, num_agents=3)
    small = make_workload(name, num_agents=3, scale=0.25)
    rounding = 16 if name in IN_BLOCKS else 1
    # A turn of several agents has several messages, each rounded for itself.
    slack = 4 * rounding if name in IN_BLOCKS else 1
    for one, other in zip(whole.programs, small.programs, strict=True):
        assert [t.output_tokens for t in one.turns] == [t.output_tokens for t in other.turns]
        assert other.prefix_tokens == pytest.approx(one.prefix_tokens / 4, abs=rounding)
        for a, b in zip(one.turns, other.turns, strict=True):
            # Prefix and task are rounded separately.
            assert b.append_tokens == pytest.approx(max(1, a.append_tokens / 4), abs=slack)


def test_coding_agents_share_their_system_prompt() -> None:
    workload = make_workload("coding_agent", num_agents=3, num_programs=400)
    assert {(p.prefix_id, p.prefix_tokens) for p in workload.programs} == {("system-prompt", 8192)}
    lengths = [len(p.turns) for p in workload.programs]
    assert (min(lengths), max(lengths)) == (30, 46)
    assert statistics.fmean(lengths) == pytest.approx(38, rel=0.02)
    gaps = [turn.tool_gap_ms for p in workload.programs for turn in p.turns[:-1]]
    # The log-normal distribution with mean 1161 and deviation 4125 ms has its median at
    # 1161 / sqrt(1 + (4125 / 1161)^2) = 315 ms; cut off at 30 s its mean is a little lower.
    assert statistics.median(gaps) == pytest.approx(315, rel=0.05)
    assert statistics.fmean(gaps) == pytest.approx(1100, rel=0.1)
    assert max(gaps) == 30_000.0


def test_attackers_come_one_after_the_other_beside_the_victim() -> None:
    workload = make_workload("victim_attacker", num_agents=3)
    victim, *attackers = workload.programs
    assert workload.num_agents is None
    assert (victim.role, victim.arrival_ms, victim.turns[0].output_tokens) == ("victim", 0.0, 1900)
    assert [(p.program_id, p.depends_on) for p in attackers] == [
        ("attacker-0-0", ()),
        ("attacker-1-0", ()),
        ("attacker-0-1", ("attacker-0-0",)),
        ("attacker-1-1", ("attacker-1-0",)),
        ("attacker-0-2", ("attacker-0-1",)),
        ("attacker-1-2", ("attacker-1-1",)),
    ]
    assert {(p.role, p.arrival_ms) for p in attackers} == {("attacker", 2000.0)}
    assert all(950 <= p.turns[0].append_tokens <= 1050 for p in attackers)


def test_fanout_has_a_family_for_each_parent() -> None:
    workload = make_workload("fanout", num_agents=2, num_programs=5)
    assert [(p.program_id, p.role, p.depends_on, p.prefix_id) for p in workload.programs] == [
        ("family-000", "parent", (), "family-000"),
        ("family-000-1", "sub-agent", ("family-000",), "family-000"),
        ("family-000-2", "sub-agent", ("family-000",), "family-000"),
        ("family-001", "parent", (), "family-001"),
        ("family-001-1", "sub-agent", ("family-001",), "family-001"),
    ]
    assert {p.prefix_tokens for p in workload.programs} == {3000}


def test_a_rate_makes_an_open_loop() -> None:
    workload = make_workload("react", num_agents=2, num_programs=400, rate=2.0)
    assert workload.num_agents is None
    arrivals = [p.arrival_ms or 0.0 for p in workload.programs]
    assert arrivals[0] == 0.0
    assert arrivals == sorted(arrivals)
    # 399 gaps of 500 ms on average; the standard error is 500 / sqrt(399) = 25 ms.
    assert arrivals[-1] / 399 == pytest.approx(500, abs=100)


def test_default_numbers_of_programs() -> None:
    counts = {name: len(make_workload(name, num_agents=4).programs) for name in WORKLOADS}
    # 1 + 3 * 3 for the victim and three attackers; 1 + 4 for a family.
    for name in WORLDS:
        assert counts.pop(name) == 4, name
    for name in IN_BLOCKS:
        assert counts.pop(name) == 12, name
    assert counts == {"react": 12, "plan_execute": 12, "coding_agent": 12, "victim_attacker": 10, "fanout": 5}
    assert len(make_workload("react", num_agents=20).programs) == 20


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("recat", {}, "no workload 'recat'; there are react, plan_execute,"),
        ("react", {"num_agents": 0}, "num_agents: expected at least 1, not 0"),
        ("react", {"num_programs": 0}, "num_programs: expected at least 1, not 0"),
        ("react", {"scale": math.nan}, "scale: expected a positive number, not nan"),
        ("react", {"rate": 0.0}, "rate: expected programs a second, more than 0, not 0.0"),
        ("victim_attacker", {"rate": 1.0}, "rate: victim_attacker has no arrivals"),
        ("victim_attacker", {"num_agents": 1}, "num_agents: expected at least 2 for victim_attacker"),
    ],
)
def test_wrong_arguments(name: str, values: dict[str, float], message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        make_workload(name, **{"num_agents": 3, **values})  # type: ignore[arg-type]
