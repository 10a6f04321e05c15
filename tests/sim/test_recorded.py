"""Recordings as workloads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from agentserve.build.simulation import build_driver, make_plans
from agentserve.config import AdapterConfig, LoraConfig
from agentserve.core.batch import BatchOutput
from agentserve.core.engine import StepResult
from agentserve.core.events import HUMAN, Command, NoteTurn, SubmitRequest
from agentserve.core.request import SamplingParams
from agentserve.errors import RecordingError, WorkloadError
from agentserve.runtime.recording import Recorder, Recording
from agentserve.runtime.replay import replay
from agentserve.runtime.virtual import VirtualDriver
from agentserve.sim.cells import expand
from agentserve.sim.orchestrator import simulate
from agentserve.sim.programs import Program, Turn, Workload
from agentserve.sim.recorded import recording_workload
from agentserve.sim.sweep import Plan
from tests.core import builders

MS = 1_000_000
ENGINE: dict[str, Any] = {"num_blocks": 256, "max_model_len": 512}


LORA = LoraConfig(tuple(AdapterConfig(name, 4000, 2) for name in "xyz"), max_resident=1, read_bytes_per_s=1e6)


@contextmanager
def recorded(path: Path, **values: Any) -> Iterator[VirtualDriver]:
    """A virtual driver all of whose steps are written down."""
    header = builders.header(**ENGINE, **values)
    driver = build_driver(header)
    recorder = Recorder(path, header)
    step = driver.core.step

    def recorded_step(now_ns: int, completions: Sequence[BatchOutput], commands: Sequence[Command]) -> StepResult:
        result = step(now_ns, completions, commands)
        recorder.write(now_ns, completions, commands, result)
        return result

    driver.core.step = recorded_step  # type: ignore[method-assign]
    yield driver
    recorder.close()


def test_a_simulated_run_comes_back_as_it_was(tmp_path: Path) -> None:
    turns = (Turn(40, 5, 300.0), Turn(12, 3, 0.5), Turn(7, 2))
    programs = (
        Program("a", turns, "system", 32, arrival_ms=0.0),
        Program("b", turns[1:], arrival_ms=10.0),
        Program("c", turns[:1], "system", 32, arrival_ms=20.0),
    )
    path = tmp_path / "run.jsonl"
    with recorded(path) as driver:
        simulate(Workload("w", programs, None), driver, fast_forward=False)
    found = recording_workload(path, seed=4)
    assert (found.name, found.num_agents, found.seed) == ("recording", None, 4)
    assert [p.arrival_ms for p in found.programs] == [0.0, 10.0, 20.0]
    assert [p.turns for p in found.programs] == [turns, turns[1:], (Turn(40, 5),)]
    assert [p.prefix_tokens for p in found.programs] == [32, 0, 32]
    assert found.programs[0].prefix_id == found.programs[2].prefix_id != found.programs[1].prefix_id
    # And it runs: with the same numbers of tokens.
    again = simulate(found, builders.virtual(**ENGINE)).records
    assert sorted(r.num_prompt_tokens for r in again) == [12, 22, 40, 40, 57, 67]


def test_what_was_said_of_turns_is_recorded_replayed_and_simulated(tmp_path: Path) -> None:
    """The tools that were noted later, the task, and the end where somebody said so: a and b are one task of two."""
    path = tmp_path / "run.jsonl"
    with recorded(path, policy="ttl", admission="working_set") as driver:
        for name, is_last in (("a", None), ("b", True)):
            base = 100 * (1 + (name == "b"))
            history = tuple(range(base, base + 20))
            first = SubmitRequest(f"{name}0", history, SamplingParams(3), session_id=name, program_id="task")
            driver.at(0, first)
            driver.at(900 * MS, NoteTurn(f"{name}0", "grep" if is_last else HUMAN))
            last = dataclasses.replace(first, request_id=f"{name}1", prompt_token_ids=(*history, 1, 2, 3, 4, 5, 6))
            # Behind its own answer, as the next turn of a client.
            driver.at(1000 * MS, dataclasses.replace(last, is_last_turn=is_last))
        driver.run()
    assert replay(path).identical
    found = recording_workload(path)
    told = [(p.task, p.says_end, [turn.tool_name for turn in p.turns]) for p in found.programs]
    assert told == [("task", False, [HUMAN, None]), ("task", True, ["grep", None])]
    with recorded(tmp_path / "again.jsonl") as driver:
        simulate(found, driver, fast_forward=False)
    commands = [
        command
        for step in Recording(tmp_path / "again.jsonl").steps()
        for command in step.commands
        if isinstance(command, SubmitRequest)
    ]
    said = {(c.session_id, c.program_id, c.tool_name, c.is_last_turn) for c in commands}
    assert said == {
        ("recorded-0000", "task", HUMAN, None),
        ("recorded-0000", "task", None, None),
        ("recorded-0001", "task", "grep", False),
        ("recorded-0001", "task", None, True),
    }


def request(index: int, prompt: range | tuple[int, ...], session: str = "s") -> SubmitRequest:
    return SubmitRequest(f"r{index}", tuple(prompt), SamplingParams(max_tokens=3), session_id=session)


def test_only_the_same_session_continues_a_conversation(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    longer = (*range(20), *range(500, 520))
    requests = request(0, range(20)), request(1, longer, "other"), request(2, longer), request(3, range(20))
    with recorded(path) as driver:
        for index, command in enumerate(requests):
            driver.at(index * 10_000 * MS, command)
        driver.run()
    found = recording_workload(path)
    # The second one begins alike but is of another session; the fourth does not continue the third.
    assert [len(p.turns) for p in found.programs] == [2, 1, 1]
    assert found.programs[0].turns[1].append_tokens == 40 - 20 - 3
    assert [p.prefix_tokens for p in found.programs] == [20, 20, 20]


def test_adapters_are_recorded_replayed_and_simulated(tmp_path: Path) -> None:
    """Two agents with one system prompt and adapters of their own, and one without; there is one slot."""
    turns = (Turn(40, 5, 300.0), Turn(12, 3))
    programs = tuple(
        Program(name, turns, "system", 32, arrival_ms=index * 10.0, adapter=adapter)
        for index, (name, adapter) in enumerate({"a": "x", "b": "y", "c": None, "d": "x"}.items())
    )
    path = tmp_path / "run.jsonl"
    with recorded(path, lora=LORA) as driver:
        live = simulate(Workload("w", programs, None), driver, fast_forward=False)
    assert replay(path).identical
    found = recording_workload(path)
    assert [(p.adapter, p.turns) for p in found.programs] == [("x", turns), ("y", turns), (None, turns), ("x", turns)]
    # Prefixes are shared by those of one adapter only: b and c begin alike, but nothing is found for them.
    assert [p.prefix_tokens for p in found.programs] == [32, 0, 0, 32]

    def plan_of(**values: str) -> Plan:
        (plan,) = make_plans(expand({"workload": str(path), **values}))
        return plan

    plan = plan_of()
    assert plan.header.config.lora == LORA
    again = simulate(plan.workload, build_driver(plan.header), fast_forward=False)
    assert again.stats[0].adapters is not None and again.stats[0].adapters == live.stats[0].adapters
    assert sorted(r.num_cached_tokens for r in again.records) == sorted(r.num_cached_tokens for r in live.records)
    two, other = (
        plan_of(max_loras="2").header.config.lora,
        plan_of(model="qwen2.5-3b", gpu="rtx-4090").header.config.lora,
    )
    assert two == dataclasses.replace(LORA, max_resident=2)
    # Another model has adapters of another size; only those that somebody uses are made up.
    assert other is not None and [a.name for a in other.adapters] == ["x", "y"]
    assert min(a.num_bytes for a in other.adapters) > 1e6


def test_recordings_that_hold_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    with recorded(path):
        pass
    with pytest.raises(WorkloadError, match="expected at least one request that got a token"):
        recording_workload(path)
    with pytest.raises(RecordingError):
        recording_workload(tmp_path / "none.jsonl")
