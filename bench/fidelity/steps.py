"""Batch by batch: how long each one took, and how long the cost model says that it takes."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentserve.core.batch import Batch, BatchOutput, Lane
from agentserve.core.costmodel import CostModel
from agentserve.core.decision_log import describe
from agentserve.runtime.recording import Recording
from agentserve.runtime.replay import build_core


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


def batch_times(path: Path) -> tuple[tuple[BatchTime, ...], tuple[str, ...]]:
    """All batches of a recording in the order of their starts, and notes.

    The batches come from a replay: a recording holds what came back, not what was in a batch. No batches and a note if
    the replay decides otherwise than the recorded daemon did, which had another version of the control plane then, or
    if there is no profile in the header. Raises RecordingError if the file cannot be read.
    """
    recording = Recording(path)
    header = recording.header
    if header.device is None or header.model_shape is None:
        return (), ("no times by kind of batch: the recording has no profile of its device",)
    cost_model = CostModel(header.device, header.model_shape)
    core = build_core(header)
    batches: dict[int, Batch] = {}
    outputs: list[BatchOutput] = []
    for number, step in enumerate(recording.steps()):
        try:
            result = core.step(step.now_ns, step.completions, step.commands)
            is_same = tuple(describe(result)) == step.decisions
        except (AssertionError, ValueError, KeyError):
            is_same = False  # the inputs do not fit the state of this core
        if not is_same:
            return (), (f"no times by kind of batch: the replay differs from step {number} on",)
        batches.update((batch.batch_id, batch) for batch in result.batches)
        outputs += step.completions
    return tuple(_times(batches, outputs, cost_model)), ()


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


def _times(batches: dict[int, Batch], outputs: Sequence[BatchOutput], cost_model: CostModel) -> Iterable[BatchTime]:
    busy = {lane: sorted((o.started_ns, o.finished_ns) for o in outputs if o.lane is lane) for lane in Lane}
    before: dict[Lane, tuple[int, frozenset[str]]] = {}
    for output in sorted(outputs, key=lambda output: (output.started_ns, output.batch_id)):
        batch, lane = batches[output.batch_id], output.lane
        members = frozenset(chunk.request_id for chunk in batch.chunks)
        idle_ns = None
        if lane in before and members & before[lane][1]:
            idle_ns = max(0, output.started_ns - before[lane][0])
        before[lane] = (output.finished_ns, members)
        other = Lane.DECODE if lane is Lane.PREFILL else Lane.PREFILL
        duration_ns = max(1, output.finished_ns - output.started_ns)
        yield BatchTime(
            kind=kind_of(batch),
            lane=lane,
            started_ns=output.started_ns,
            finished_ns=output.finished_ns,
            predicted_ns=cost_model.duration_ns(batch.shape, lane, batch.partition, batch.co_running),
            idle_before_ns=idle_ns,
            beside=_overlap_ns(busy[other], output.started_ns, output.finished_ns) / duration_ns,
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
