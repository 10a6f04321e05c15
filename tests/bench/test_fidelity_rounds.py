"""Live rounds of a fidelity campaign: disturbed runs are repeated, seeds take turns."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from bench.fidelity.disturbance import Others
from bench.fidelity.live import LiveCell, LiveRuns
from bench.fidelity.observed import CALIBRATION, HELD_OUT, Observation
from bench.load.workloads import WorkloadSpec
from tests.core import builders


def run_live(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shares: Sequence[float], **values: Any
) -> tuple[LiveRuns, list[tuple[int, int]]]:
    """Runs without a daemon, during which others use these shares; and the (round, seed) that each run had."""
    calls: list[tuple[int, int]] = []

    async def made_up(
        self: LiveRuns,
        cell: LiveCell,
        round_index: int,
        seed: int,
        recording: Path,
    ) -> Observation:
        calls.append((round_index, seed))
        named = cell.make(seed)
        return Observation(
            cell=named.title,
            round=round_index,
            header=builders.header(),
            workload=named.workload,
            records=(),
            recorded=(),
            notes=(recording.name,),
            others_share=shares[len(calls) - 1],
        )

    monkeypatch.setattr(LiveRuns, "_run_cell", made_up)
    cell = LiveCell(WorkloadSpec.parse("react:agents=1,programs=1,scale=0.02"), None)
    console = Console(file=io.StringIO(), width=300)
    runs = LiveRuns([cell], tmp_path / "device.json", (), 1, 0, tmp_path, 60.0, console)
    return dataclasses.replace(runs, **values), calls


async def test_a_disturbed_run_is_repeated_and_the_quietest_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runs, calls = run_live(monkeypatch, tmp_path, [0.3, 0.1, 0.2])
    (observation,), failures = await runs.run()
    assert failures == [] and calls == [(0, 0)] * 3
    assert observation.others_share == 0.1
    assert observation.notes[0] == "recording-0-0-0-1.jsonl"
    assert observation.notes[1].endswith(
        "other processes used 30.0%, 10.0%, 20.0% of the processor; the least disturbed of these runs counts"
    )


async def test_an_undisturbed_run_is_not_repeated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runs, calls = run_live(monkeypatch, tmp_path, [0.3, 0.01])
    (observation,), _ = await runs.run()
    assert len(calls) == 2 and observation.others_share == 0.01


async def test_calibration_and_held_out_runs_take_turns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runs, calls = run_live(monkeypatch, tmp_path, [0.0] * 4, rounds=2, calibration_seeds=(7,))
    observations, _ = await runs.run()
    assert calls == [(0, 7), (0, 0), (1, 0), (1, 7)]  # every other round in reverse
    assert [observation.role for observation in observations] == [CALIBRATION, HELD_OUT, HELD_OUT, CALIBRATION]


def test_what_others_use_is_all_but_the_client_and_the_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter((0.0, 10.0))
    everybody = iter((100.0, 112.0))
    times = {None: iter((5.0, 6.0)), 42: iter((20.0, 27.0)), 43: iter((1.0, 1.5))}

    def process(pid: int | None = None) -> SimpleNamespace:
        return SimpleNamespace(
            cpu_times=lambda: SimpleNamespace(user=next(times[pid]), system=0.0),
            children=lambda recursive: [process(43)] if recursive else [],
        )

    system = SimpleNamespace(
        cpu_count=lambda: 2,
        cpu_times=lambda: SimpleNamespace(user=next(everybody), system=1.0, nice=2.0, steal=3.0),
        Process=process,
    )
    monkeypatch.setattr("bench.fidelity.disturbance.psutil", system)
    monkeypatch.setattr("bench.fidelity.disturbance.time", SimpleNamespace(monotonic=lambda: next(now)))
    # Twelve seconds of everybody; 1 of the client, 7 of the daemon and half a one of its child are ours.
    assert Others(42).share() == pytest.approx(3.5 / 10 / 2)
