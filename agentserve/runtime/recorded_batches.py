"""The batches of a daemon's recording: what was in them, how long they took, and samples for a profile."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from agentserve.core.batch import Batch, BatchOutput, Lane
from agentserve.core.costmodel import CostModel, DeviceProfile, ModelShape, Sample
from agentserve.core.decision_log import describe
from agentserve.errors import ConfigError, RecordingError
from agentserve.profiles.fit import FitReport, fit_profile
from agentserve.runtime.recording import Header, Recording
from agentserve.runtime.replay import build_core

_BUSY, _IDLE = 0.9, 0.1
"""Shares of a batch's time in which the other lane was busy that count as all of it and as none, as `LaneObserver`
has them."""
WAKE_AFTER_NS = 50_000_000
"""A CPU that stands still for 30 ms computes its next batch as fast as ever; after 100 ms it is slower, and after a
second not much slower than that."""
_TRIM = 0.1
"""Share of the longest and of the shortest waits that is left out: those had other reasons."""
_MAX_RUN = 8
"""Decode batches in a row that become one sample."""


class ReplayDiffersError(RecordingError):
    """The recording was made by another version of the control plane."""


@dataclass(frozen=True, slots=True)
class RecordedBatch:
    """A batch that ran. Times are nanoseconds of the recording's clock."""

    batch: Batch
    started_ns: int
    finished_ns: int
    idle_before_ns: int | None
    """Time for which its lane stood still before it, with a request in a batch before and after. None: another reason.
    """
    beside: float
    """Share of its time during which the other lane was really busy."""
    stood_still_ns: int | None = None
    """Time for which no lane was busy before it. None if one was, and for the first batch."""

    @property
    def wakes(self) -> bool:
        """Whether the device may have gone to sleep before it."""
        return self.stood_still_ns is not None and self.stood_still_ns >= WAKE_AFTER_NS

    @property
    def duration_ns(self) -> int:
        """At least 1."""
        return max(1, self.finished_ns - self.started_ns)


def recorded_batches(path: Path) -> tuple[Header, tuple[RecordedBatch, ...]]:
    """The header of a recording and all batches that came back, in the order of their starts.

    The batches come from a replay: a recording holds what came back, not what was in a batch. Raises RecordingError if
    the file cannot be read, ReplayDiffersError if the replay decides otherwise than the recorded daemon did.
    """
    recording = Recording(path)
    core = build_core(recording.header)
    batches: dict[int, Batch] = {}
    outputs: list[BatchOutput] = []
    for number, step in enumerate(recording.steps()):
        try:
            result = core.step(step.now_ns, step.completions, step.commands)
            is_same = tuple(describe(result)) == step.decisions
        except (AssertionError, ValueError, KeyError):
            is_same = False  # the inputs do not fit the state of this core
        if not is_same:
            raise ReplayDiffersError(
                f"{path}: the replay differs from step {number} on: another version of the control plane recorded it"
            )
        batches.update((batch.batch_id, batch) for batch in result.batches)
        outputs += (output for output in step.completions if isinstance(output, BatchOutput))
    return recording.header, tuple(_joined(batches, outputs))


@dataclass(frozen=True, slots=True)
class RecordedRuns:
    """Recordings of one model on one device."""

    header: Header
    """Of the first one."""
    model: ModelShape
    batches: tuple[RecordedBatch, ...]
    samples: tuple[Sample, ...]
    """See `samples_of`."""


def read_runs(paths: Sequence[Path]) -> RecordedRuns:
    """Reads at least one recording.

    Raises what `recorded_batches` raises, and ConfigError if a recording does not say its model, is of another model or
    another number of compute units than the first, or if there is nothing to learn from them.
    """
    assert paths, "at least one recording"
    headers: list[Header] = []
    batches: list[RecordedBatch] = []
    samples: list[Sample] = []
    for path in paths:
        header, found = recorded_batches(path)
        headers.append(header)
        batches += found
        samples += samples_of(found)
        if (header.model_shape, header.compute_units) != (headers[0].model_shape, headers[0].compute_units):
            raise ConfigError(f"{path} was recorded with another model or device than {paths[0]}")
    model = headers[0].model_shape
    if model is None:
        raise ConfigError(f"{paths[0]} does not say what its model is: it was recorded without a profile")
    if not samples:
        raise ConfigError("there are no batches in the recordings that could be samples")
    return RecordedRuns(headers[0], model, tuple(batches), tuple(samples))


def fit_runs(runs: RecordedRuns, sheet: DeviceProfile, measured: Sequence[Sample] = ()) -> FitReport:
    """A profile fitted to recordings, with batches that a calibration measured if there are any.

    `sheet` is where the fit starts, see `fit_profile`. Residuals are those of all samples.
    """
    report = fit_profile([*measured, *runs.samples], sheet, runs.model)
    return FitReport(with_waits(report.profile, runs.batches, runs.model), report.residuals)


def samples_of(batches: Iterable[RecordedBatch]) -> list[Sample]:
    """Samples for `profiles.fit.fit_profile`: the batches that ran alone, or beside a busy lane, all the time.

    Decode batches in a row that hold the same requests differ by a token each, and by noise, which is large: up to
    `_MAX_RUN` of them become one sample, with the shape in their middle and their mean duration. It is the mean that
    adds up to the time of a request.
    """
    samples: list[Sample] = []
    run: list[RecordedBatch] = []
    last_key: tuple[object, ...] | None = None
    for item in batches:
        if _IDLE < item.beside < _BUSY or item.wakes:
            continue
        shape, batch = item.batch.shape, item.batch
        if shape.num_prefill_tokens:
            samples.append(_sample([item]))
            continue
        key = (batch.lane, batch.partition, item.beside >= _BUSY, tuple(chunk.request_id for chunk in batch.chunks))
        if run and (key != last_key or len(run) == _MAX_RUN):
            samples.append(_sample(run))
            run = []
        run.append(item)
        last_key = key
    return [*samples, _sample(run)] if run else samples


def with_waits(device: DeviceProfile, batches: Sequence[RecordedBatch], model: ModelShape) -> DeviceProfile:
    """The profile with what lies between batches, as recorded: `turnaround_ns`, and `wake_ns`.

    `device` is fitted to the batches already: what the first ones after a pause take longer than it says is the cost of
    waking up. What does not occur keeps its value.
    """
    gaps = [item.idle_before_ns for item in batches if item.idle_before_ns is not None and not item.wakes]
    cost_model = CostModel(device, model)
    extra = [
        item.duration_ns - cost_model.duration_ns(item.batch.shape, item.batch.lane, item.batch.partition, False)
        for item in batches
        if item.wakes and item.beside <= _IDLE
    ]
    if gaps:
        device = replace(device, turnaround_ns=round(_trimmed_mean(gaps)))
    if extra:
        device = replace(device, wake_ns=max(0, round(_trimmed_mean(extra))), wake_after_ns=WAKE_AFTER_NS)
    return device


def _trimmed_mean(values: Sequence[int]) -> float:
    left_out = int(_TRIM * len(values))
    kept = sorted(values)[left_out : len(values) - left_out]
    return math.fsum(kept) / len(kept)


def _sample(run: Sequence[RecordedBatch]) -> Sample:
    middle = run[len(run) // 2]
    duration_ns = round(math.fsum(item.duration_ns for item in run) / len(run))
    batch = middle.batch
    return Sample(batch.shape, batch.lane, batch.partition, middle.beside >= _BUSY, duration_ns)


def _joined(batches: dict[int, Batch], outputs: Sequence[BatchOutput]) -> Iterable[RecordedBatch]:
    busy = {lane: sorted((o.started_ns, o.finished_ns) for o in outputs if o.lane is lane) for lane in Lane}
    before: dict[Lane, tuple[int, frozenset[str]]] = {}
    busy_until_ns: int | None = None
    for output in sorted(outputs, key=lambda output: (output.started_ns, output.batch_id)):
        if output.error is not None:
            continue
        batch, lane = batches[output.batch_id], output.lane
        members = frozenset(chunk.request_id for chunk in batch.chunks)
        idle_ns = None
        if lane in before and members & before[lane][1]:
            idle_ns = max(0, output.started_ns - before[lane][0])
        before[lane] = (output.finished_ns, members)
        stood_still_ns = None
        if busy_until_ns is not None and output.started_ns >= busy_until_ns:
            stood_still_ns = output.started_ns - busy_until_ns
        busy_until_ns = max(busy_until_ns or 0, output.finished_ns)
        other = Lane.DECODE if lane is Lane.PREFILL else Lane.PREFILL
        duration_ns = max(1, output.finished_ns - output.started_ns)
        yield RecordedBatch(
            batch=batch,
            started_ns=output.started_ns,
            finished_ns=output.finished_ns,
            idle_before_ns=idle_ns,
            beside=_overlap_ns(busy[other], output.started_ns, output.finished_ns) / duration_ns,
            stood_still_ns=stood_still_ns,
        )


def _overlap_ns(spans: Sequence[tuple[int, int]], start_ns: int, end_ns: int) -> int:
    """How much of a time lies within spans, which are sorted and do not overlap each other."""
    total = 0
    for index in range(max(0, bisect.bisect_left(spans, (start_ns, 0)) - 1), len(spans)):
        first, last = spans[index]
        if first >= end_ns:
            break
        total += max(0, min(last, end_ns) - max(first, start_ns))
    return total
