"""Recordings as workloads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from agentserve.core.batch import BatchOutput
from agentserve.core.engine import StepResult
from agentserve.core.events import Command, SubmitRequest
from agentserve.core.request import SamplingParams
from agentserve.errors import RecordingError, WorkloadError
from agentserve.runtime.recording import Recorder
from agentserve.runtime.virtual import VirtualDriver
from agentserve.sim.orchestrator import simulate
from agentserve.sim.programs import Program, Turn, Workload
from agentserve.sim.recorded import recording_workload
from tests.core import builders

MS = 1_000_000
ENGINE: dict[str, Any] = {"num_blocks": 256, "max_model_len": 512}


@contextmanager
def recorded(path: Path) -> Iterator[VirtualDriver]:
    """A virtual driver all of whose steps are written down."""
    driver = builders.virtual(**ENGINE)
    recorder = Recorder(path, builders.header(**ENGINE))
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


def test_recordings_that_hold_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    with recorded(path):
        pass
    with pytest.raises(WorkloadError, match="expected at least one request that got a token"):
        recording_workload(path)
    with pytest.raises(RecordingError):
        recording_workload(tmp_path / "none.jsonl")
