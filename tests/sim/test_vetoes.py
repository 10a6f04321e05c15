"""`simulate --tool-allow`: the daemon's policy is asked, and a program ends with the call that is stopped."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentserve.build.simulation import build_instance, make_plans
from agentserve.core.agents.policies.tool_allow import ToolAllowList
from agentserve.core.events import HUMAN
from agentserve.errors import ConfigError, WorkloadError
from agentserve.sim.cells import expand
from agentserve.sim.cluster import Cluster
from agentserve.sim.orchestrator import simulate
from agentserve.sim.programs import Program, Turn, Workload, WorldStep, dump_programs
from agentserve.sim.router import build_router
from agentserve.sim.vetoes import without_vetoed_calls


def program(name: str, *tools: str | None, agent: str | None = None) -> Program:
    return Program(name, tuple(Turn(40, 4, 100.0, tool, agent=agent) for tool in tools))


def workload(*programs: Program) -> Workload:
    return Workload("w", programs, 2, 0, "")


READ_ONLY = ToolAllowList([("reader", ("read_*", "grep"))])


def test_a_program_ends_with_the_call_that_is_stopped() -> None:
    before = workload(program("reader", "read_file", "write_file", "read_file", None), program("writer", "write_file"))
    after = without_vetoed_calls(before, [READ_ONLY])
    first, second = after.programs
    assert first.turns == (Turn(40, 4, 100.0, "read_file"), Turn(40, 4, 0.0, HUMAN))
    assert second is before.programs[1]
    assert after.notes == ("1 of 2 programs end early, because a tool call of theirs is stopped",)


def test_of_several_calls_each_is_asked_about() -> None:
    before = workload(program("p", "grep+read_file", "grep+write_file", "grep", agent="reader"))
    (after,) = without_vetoed_calls(before, [READ_ONLY]).programs
    assert [turn.tool_name for turn in after.turns] == ["grep+read_file", HUMAN]


def test_what_names_no_tool_passes() -> None:
    before = workload(program("reader", None, HUMAN, "grep"))
    after = without_vetoed_calls(before, [READ_ONLY])
    assert after.programs == before.programs
    assert after.notes == ("0 of 1 programs end early, because a tool call of theirs is stopped",)


def test_steps_of_a_framework_cannot_be_cut() -> None:
    steps = (WorldStep(("reader",)), WorldStep(("reader",)))
    before = Workload("w", (program("reader", "write_file", None),), None, 0, "", steps=steps)
    with pytest.raises(WorkloadError, match="its steps call programs"):
        without_vetoed_calls(before, [READ_ONLY])


def test_the_option(tmp_path: Path) -> None:
    """Of two agents one may not write: its program ends with its second call, the other all of them."""
    path = tmp_path / "programs.jsonl"
    tools = ("grep", "write_file", "grep")
    dump_programs([program("a", *tools, agent="reader"), program("b", *tools, agent="writer")], path)
    texts = {"workload": str(path), "gpu": "rtx-4090", "model": "qwen2.5-3b"}
    (plan,) = make_plans(expand({**texts, "tool_allow": "reader=grep\nwriter=grep,write_file"}))
    assert [len(program.turns) for program in plan.workload.programs] == [2, 3]
    run = simulate(
        plan.workload,
        Cluster([build_instance(plan.header)], build_router("round_robin", overload="wait", overload_calls=4)),
    )
    assert sorted((record.program_id, record.turn_index) for record in run.records) == [
        ("a", 0), ("a", 1), ("b", 0), ("b", 1), ("b", 2),
    ]  # fmt: skip
    assert all(record.error is None for record in run.records)
    with pytest.raises(ConfigError, match="no agent of the workload is called 'editor'"):
        make_plans(expand({**texts, "tool_allow": "editor=grep"}))
