"""Agent simulations: who calls when, what is said of it, and that invocation distances are worth it."""

from __future__ import annotations

import dataclasses

import pytest

from agentserve.build.simulation import build_driver
from agentserve.errors import WorkloadError
from agentserve.sim.orchestrator import simulate
from agentserve.sim.programs import Program, Turn, Workload, WorldStep
from agentserve.sim.workloads import make_workload
from agentserve.sim.worlds import WORLDS, make_world
from bench.scalesim.report import merged, table
from bench.scalesim.runs import SYSTEMS, Setting, run
from tests.core.builders import header


@pytest.mark.parametrize("name", list(WORLDS))
def test_about_a_fifth_calls_in_a_step_and_the_distances_say_when(name: str) -> None:
    workload = make_workload(name, num_agents=200)
    assert workload == make_workload(name, num_agents=200)
    calls = sum(len(step.calls) for step in workload.steps)
    assert 0.15 < calls / len(workload.steps) / 200 < 0.25
    due: dict[str, float] = {}
    num_right = num_told = 0
    for index, step in enumerate(workload.steps):
        for agent in step.calls:
            if agent in due:
                num_told += 1
                num_right += due[agent] == index
        due |= {agent: index + distance for agent, distance in step.distances}
    # Independent: one in five is a step off. In a town a meeting may come that was not foreseen, or not come.
    assert num_right / num_told > {"independent": 0.7, "interaction": 0.6, "diffusion": 0.99}[name]


def test_longer_actions_leave_fewer_agents_active() -> None:
    for mean_action, share in ((1, 1 / 2), (9, 1 / 10)):
        _, steps = make_world("independent", 300, 40, lambda length: length, 0, mean_action=mean_action)
        calls = [len(step.calls) for step in steps]
        assert 0.85 * share < sum(calls) / len(calls) / 300 < 1.15 * share
    for name, mean_action in (("diffusion", 4), ("independent", 0)):
        with pytest.raises(WorkloadError, match="mean_action"):
            make_world(name, 30, 16, lambda length: length, 0, mean_action=mean_action)


def test_results_of_several_seeds_have_a_mean_and_a_range() -> None:
    """TTFTs of 8 and 12 ms against 10 and 20: 20 % and 40 % less; steps with their gap of 100 against 200 and 300."""

    def result(system: str, seed: int, ttft_ms: float, world_ms: float) -> dict[str, object]:
        setting = dataclasses.asdict(Setting("independent", system, 60, seed=seed))
        values = dict.fromkeys(("active_share", "step_ms", "ttft_p99_ms", "wait_ms", "hit_rate"), 1.0)
        return {"setting": setting, "ttft_ms": ttft_ms, "world_ms": world_ms, **values}

    before = [result("lru", 0, 90.0, 200.0), result("lru", 1, 90.0, 300.0)]
    before += [result("hierarchical", 0, 10.0, 150.0), result("hierarchical", 1, 20.0, 150.0)]
    lines = table({"main": merged([*before, result("scalesim", 0, 8.0, 100.0), result("scalesim", 1, 12.0, 100.0)])})
    assert "main (2 seeds)" in lines
    (line,) = [line for line in lines.splitlines() if " scalesim " in line]
    assert line.endswith("2.50 [2.00, 3.00]  -30% [-40%, -20%]") and " 10.0 " in line


def test_a_step_begins_when_the_calls_before_it_have_ended_and_its_gap_is_over() -> None:
    programs = tuple(Program(name, (Turn(20, 3), Turn(5, 3))) for name in "ab")
    steps = (
        WorldStep(("a",), (("b", 1.0),)), WorldStep(("b", "a"), (), 50.0), WorldStep(("b",))
    )  # fmt: skip
    driver = build_driver(header(policy="invocation_distance"))
    records = simulate(Workload("world", programs, None, steps=steps), driver).records
    by_turn = {(r.program_id, r.turn_index): r for r in records}
    assert by_turn["b", 0].sent_ns == by_turn["a", 1].sent_ns == by_turn["a", 0].finished_ns
    last = max(by_turn["b", 0].finished_ns, by_turn["a", 1].finished_ns)
    assert by_turn["b", 1].sent_ns == last + 50_000_000


def test_steps_must_make_each_turn_once() -> None:
    with pytest.raises(WorkloadError, match="each turn in one step"):
        Workload("world", (Program("a", (Turn(20, 3),)),), None, steps=(WorldStep(("a",)), WorldStep(("a",))))
    with pytest.raises(WorkloadError, match="one program for each agent"):
        make_workload("diffusion", num_agents=5, num_programs=3)


def test_runs_of_decode_steps_change_nothing() -> None:
    workload = make_workload("independent", num_agents=10, scale=0.02)
    values = {"num_blocks": 60, "max_model_len": 128, "policy": "invocation_distance"}
    fast, slow = (
        simulate(workload, build_driver(header(**values)), fast_forward=fast_forward) for fast_forward in (True, False)
    )
    assert fast.records == slow.records


@pytest.mark.parametrize("name", list(WORLDS))
def test_distances_beat_reactive_caching_which_beats_none(name: str) -> None:
    results = {system: run(Setting(name, system, 60)) for system in SYSTEMS}
    times = {system: result["world_ms"] for system, result in results.items()}
    assert times["lru"] > 1.1 * times["hierarchical"]
    assert times["hierarchical"] > 1.01 * times["scalesim"]
    assert results["scalesim"]["ttft_ms"] < 0.85 * results["hierarchical"]["ttft_ms"]
