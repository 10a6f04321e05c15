"""What a recording says about its device: batches, waits between them, and a profile fitted to them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from agentserve.core.costmodel import CostModel, DeviceProfile
from agentserve.errors import ConfigError
from agentserve.profiles.fit import fit_profile
from agentserve.runtime.recorded_batches import (
    WAKE_AFTER_NS,
    ReplayDiffersError,
    fit_runs,
    read_runs,
    recorded_batches,
    samples_of,
    with_waits,
)
from agentserve.sim.programs import Program, Turn, Workload
from bench.fidelity.predict import slowed
from tests.bench.recorded_runs import record_run
from tests.core import builders

MS = 1_000_000
ENGINE = {"num_blocks": 256, "max_model_len": 512, "decode_lookahead": 1}
TURNS = (Turn(40, 9, 200.0), Turn(12, 6, 300.0), Turn(7, 12, 250.0), Turn(9, 4))
WORKLOAD = Workload("w", (Program("a", TURNS), Program("b", TURNS[1:])), 1, 0)


def real_device() -> DeviceProfile:
    """What the recorded daemon ran on: half as fast as its profile says, with waits that this does not know."""
    slow = slowed(builders.device_profile(), 2.0)
    return dataclasses.replace(slow, turnaround_ns=MS, wake_ns=15 * MS, wake_after_ns=WAKE_AFTER_NS)


def recorded(tmp_path: Path, name: str = "run.jsonl", device: DeviceProfile | None = None) -> Path:
    record_run(tmp_path / name, WORKLOAD, header=builders.header(**ENGINE), device=device or real_device())
    return tmp_path / name


def test_the_simulated_device_waits_between_batches_and_wakes_up(tmp_path: Path) -> None:
    header, batches = recorded_batches(recorded(tmp_path))
    assert header.model_shape is not None
    cost_model = CostModel(real_device(), header.model_shape)
    gaps = {item.idle_before_ns for item in batches if item.idle_before_ns is not None}
    assert gaps == {MS}
    # The first batch of each of the seven turns, but that of program a, before which nothing is known, and that of
    # program b, which follows a at once.
    assert sum(item.wakes for item in batches) == 5
    for item in batches[1:]:
        batch = item.batch
        expected = cost_model.duration_ns(batch.shape, batch.lane, batch.partition, batch.co_running)
        assert item.duration_ns == expected + (15 * MS if item.wakes else 0)


def test_waits_are_found(tmp_path: Path) -> None:
    header, batches = recorded_batches(recorded(tmp_path))
    assert header.model_shape is not None
    bare = dataclasses.replace(real_device(), turnaround_ns=0, wake_ns=0, wake_after_ns=0)
    assert with_waits(bare, batches, header.model_shape) == real_device()
    assert with_waits(bare, (), header.model_shape) == bare  # what does not occur keeps its value


def test_decodes_in_a_row_are_one_sample_with_their_mean(tmp_path: Path) -> None:
    _, batches = recorded_batches(recorded(tmp_path))
    samples = samples_of(batches)
    decodes = [item for item in batches if not item.batch.shape.num_prefill_tokens]
    prefills = [s for s in samples if s.shape.num_prefill_tokens]
    assert len(prefills) == len(batches) - len(decodes) - 5  # those that wake the device say nothing about their shape
    first = next(s for s in samples if not s.shape.num_prefill_tokens)
    # Turn 1 samples nine tokens, the first of them with the prompt: eight decodes, and the fifth is in their middle.
    assert first.shape == decodes[4].batch.shape
    assert first.duration_ns == round(sum(item.duration_ns for item in decodes[:8]) / 8)


def test_a_profile_follows_from_recordings(tmp_path: Path) -> None:
    runs = read_runs([recorded(tmp_path), recorded(tmp_path, "again.jsonl")])
    assert len(runs.samples) == 2 * len(samples_of(recorded_batches(tmp_path / "run.jsonl")[1]))
    fitted = fit_runs(runs, builders.device_profile()).profile
    assert (fitted.turnaround_ns, fitted.wake_after_ns) == (MS, WAKE_AFTER_NS)
    model, true = CostModel(fitted, runs.model), CostModel(real_device(), runs.model)
    for item in runs.batches:
        batch = item.batch
        args = (batch.shape, batch.lane, batch.partition, False)
        assert model.duration_ns(*args) == pytest.approx(true.duration_ns(*args), rel=0.03)
    # What was measured counts, too: the same number of samples of a device twice as slow again.
    twice = [dataclasses.replace(sample, duration_ns=2 * sample.duration_ns) for sample in runs.samples]
    both = fit_runs(runs, builders.device_profile(), twice)
    assert sum(residual.num_samples for residual in both.residuals) == 2 * len(runs.samples)
    assert both.profile.bandwidth_bytes_per_s < fitted.bandwidth_bytes_per_s
    assert fit_profile(runs.samples, builders.device_profile(), runs.model).profile.turnaround_ns == 0


def test_recordings_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    path = recorded(tmp_path)
    other = tmp_path / "other.jsonl"
    header = builders.header(**ENGINE)
    assert header.model_shape is not None
    header = dataclasses.replace(header, model_shape=dataclasses.replace(header.model_shape, num_layers=3))
    record_run(other, WORKLOAD, header=header)
    with pytest.raises(ConfigError, match=r"other\.jsonl was recorded with another model or device than .*run\.jsonl"):
        read_runs([path, other])
    lines = path.read_text(encoding="utf-8").replace("cached=0", "cached=4")
    path.write_text(lines, encoding="utf-8")
    with pytest.raises(ReplayDiffersError, match="the replay differs from step 0 on: another version"):
        read_runs([path])
