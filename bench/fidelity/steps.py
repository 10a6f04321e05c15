"""Batch by batch: how long each one took, and how long the cost model says that it takes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentserve.core.batch import Batch, Lane
from agentserve.core.costmodel import CostModel, DeviceProfile, ModelShape
from agentserve.runtime.recorded_batches import RecordedBatch, ReplayDiffersError, recorded_batches
from agentserve.runtime.recording import Recording


@dataclass(frozen=True, slots=True)
class BatchTime:
    """A batch of a recording. Times are nanoseconds of the recording's clock."""

    kind: str
    """What it holds, and whether the other lane was busy when it was submitted."""
    lane: Lane
    started_ns: int
    finished_ns: int
    predicted_ns: int
    """What the cost model gives a simulated batch of this shape, at this place, with this neighbour."""
    idle_before_ns: int | None
    """Time for which its lane stood still before it, with a request in a batch before and after. None: another reason.

    The simulator submits the next batch in the moment in which one ends."""
    beside: float
    """Share of its time during which the other lane was really busy."""

    @property
    def measured_ns(self) -> int:
        return self.finished_ns - self.started_ns


def read_batches(path: Path) -> tuple[tuple[RecordedBatch, ...], tuple[str, ...]]:
    """All batches of a recording in the order of their starts, and notes.

    No batches and a note if the replay decides otherwise than the recorded daemon did, which had another version of the
    control plane then, or if there is no profile in the header. Raises RecordingError if the file cannot be read.
    """
    header = Recording(path).header
    if header.device is None or header.model_shape is None:
        return (), ("no times by kind of batch: the recording has no profile of its device",)
    try:
        return recorded_batches(path)[1], ()
    except ReplayDiffersError as error:
        return (), (f"no times by kind of batch: {error}",)


def timed(batches: Iterable[RecordedBatch], device: DeviceProfile, model: ModelShape | None) -> tuple[BatchTime, ...]:
    """Each batch beside what the cost model gives a simulated one of this shape and place."""
    assert model is not None, "batches are read only with the shape of the model"
    cost_model = CostModel(device, model)
    return tuple(_timed(item, cost_model) for item in batches)


def _timed(item: RecordedBatch, cost_model: CostModel) -> BatchTime:
    batch = item.batch
    predicted_ns = cost_model.duration_ns(batch.shape, batch.lane, batch.partition, batch.co_running)
    if item.stood_still_ns is not None:
        predicted_ns += cost_model.device.wake_ns_after(item.stood_still_ns)
    return BatchTime(
        kind=kind_of(batch),
        lane=batch.lane,
        started_ns=item.started_ns,
        finished_ns=item.finished_ns,
        predicted_ns=predicted_ns,
        idle_before_ns=item.idle_before_ns,
        beside=item.beside,
    )


def kind_of(batch: Batch) -> str:
    """What is in a batch, and whether it had a neighbour when it was submitted."""
    shape = batch.shape
    if not shape.num_prefill_tokens:
        what = "decode"
    elif shape.num_decodes:
        what = "decode with prompt tokens joined"
    else:
        what = "prefill"
    other = "decode" if batch.lane is Lane.PREFILL else "prefill"
    return f"{what}, beside {other}" if batch.co_running else f"{what}, alone"


def speed_factor(batches: Sequence[BatchTime]) -> float | None:
    """How many times longer all batches together took than predicted; None without batches."""
    predicted_ns = sum(batch.predicted_ns for batch in batches)
    return sum(batch.measured_ns for batch in batches) / predicted_ns if predicted_ns else None


def by_kind(batches: Sequence[BatchTime]) -> list[dict[str, Any]]:
    """For each kind of batch, the one with the most time first: means in milliseconds, the signed error of the mean.

    `share` is its share in the time of all batches, `spread` the standard deviation of measured / predicted.
    """
    kinds: dict[str, list[BatchTime]] = {}
    for batch in batches:
        kinds.setdefault(batch.kind, []).append(batch)
    total_ns = sum(batch.measured_ns for batch in batches)
    rows = [_row(kind, group, total_ns) for kind, group in kinds.items()]
    return sorted(rows, key=lambda row: -row["share"])


def _row(kind: str, group: Sequence[BatchTime], total_ns: int) -> dict[str, Any]:
    measured_ns = sum(batch.measured_ns for batch in group)
    predicted_ns = sum(batch.predicted_ns for batch in group)
    ratios = [batch.measured_ns / batch.predicted_ns for batch in group]
    mean = math.fsum(ratios) / len(ratios)
    idle = [batch.idle_before_ns for batch in group if batch.idle_before_ns is not None]
    return {
        "kind": kind,
        "num_batches": len(group),
        "share": measured_ns / total_ns,
        "measured_ms": measured_ns / len(group) / 1e6,
        "predicted_ms": predicted_ns / len(group) / 1e6,
        "error": predicted_ns / measured_ns - 1.0,
        "spread": math.sqrt(math.fsum((ratio - mean) ** 2 for ratio in ratios) / len(ratios)),
        "beside": math.fsum(batch.beside * batch.measured_ns for batch in group) / measured_ns,
        "idle_before_ms": sum(idle) / len(idle) / 1e6 if idle else None,
    }
