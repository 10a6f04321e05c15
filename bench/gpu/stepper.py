"""Runs batches of one shape through an executor and keeps the time of each: the calibration's loads, one by one."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentserve.build import Measurable, build_executor
from agentserve.config import ServeConfig
from agentserve.core.batch import Lane
from agentserve.core.slots import PartitionKind, SlotPartition
from agentserve.runtime.calibration import BatchRunner
from agentserve.runtime.calibration_grid import Limits, Load
from agentserve.runtime.calibration_load import LoadStream
from bench.gpu.record import PartRun

_FILL_CHUNK = 2048


def open_executor(part: PartRun, **options: Any) -> Measurable:
    """The daemon's executor with the part's model; close it. `options` as fields of ServeConfig."""
    config = ServeConfig(model=part.model, load_format=part.load_format, executor=part.executor, **options)
    return build_executor(config, part.say)


@dataclass(frozen=True, slots=True)
class Step:
    """A batch that ran."""

    duration_ns: int
    """From its start to its end, as the executor says."""
    period_ns: int | None
    """Since the end of the one before it; None where that was no step of the same load."""


class Stepper:
    """One lane of an executor that nobody else uses."""

    def __init__(self, target: Measurable) -> None:
        capabilities = target.executor.capabilities()
        units = capabilities.compute_units
        self.whole = SlotPartition(units, units, PartitionKind.WHOLE)
        self.limits: Limits = target.limits
        self.lookahead = capabilities.lookahead
        self._runner = BatchRunner(target.executor)
        self._serial = itertools.count()
        self._filled: range = range(0)
        self._ended: list[str] = []

    def fill(self, num_tokens: int) -> int:
        """Computes keys and values for contexts; returns for how many tokens: half of the pool at most."""
        size, limits = self.limits.block_size, self.limits
        num_blocks = min(num_tokens // size, limits.num_blocks // 2)
        per_chunk = max(1, min(_FILL_CHUNK, limits.max_model_len // 2) // size)
        for first in range(0, num_blocks, per_chunk):
            load = Load(chunk=min(per_chunk, num_blocks - first) * size)
            self._run(
                Lane.PREFILL, LoadStream(self._name(), load, (), itertools.count(first), limits), 1, 1, self.whole
            )
        self._filled = range(num_blocks)
        return num_blocks * size

    def close(self) -> None:
        """Tells the executor that everything is over: only a batch can."""
        stream = LoadStream(self._name(), Load(chunk=1), (), itertools.count(), self.limits)
        self._run(Lane.PREFILL, stream, 1, 1, self.whole)
        self._ended.clear()

    def fits(self, load: Load) -> bool:
        """Whether the executor can take it beside what is filled."""
        num_sequences = load.num_decodes + (load.chunk > 0)
        room = self.limits.num_blocks - len(self._filled)
        return (
            load.fits(self.limits)
            and num_sequences <= self.limits.max_num_seqs
            and load.num_blocks(self.limits) <= room
        )

    def run(self, load: Load, num_steps: int, *, depth: int = 1, partition: SlotPartition | None = None) -> list[Step]:
        """At least `num_steps` steps of a load alone in its lane, `depth` of them in flight; the first are left out."""
        lane = Lane.DECODE if load.num_decodes else Lane.PREFILL
        private = itertools.count(len(self._filled))
        stream = LoadStream(self._name(), load, self._filled, private, self.limits)
        return self._run(lane, stream, num_steps + depth, min(depth, self.lookahead), partition or self.whole)[depth:]

    def _run(self, lane: Lane, stream: LoadStream, num_steps: int, depth: int, partition: SlotPartition) -> list[Step]:
        steps: list[Step] = []
        timed: dict[int, bool] = {}
        last_ns: int | None = None
        while len(steps) < num_steps or timed:
            while len(timed) < depth and len(steps) < num_steps:
                chunks, is_timed = stream.next()
                ended = (*self._ended, *stream.take_ended())
                self._ended.clear()
                batch = self._runner.submit(lane, partition, chunks, ended=ended)
                timed[batch.batch_id] = is_timed
            for output in self._runner.wait():
                # A step that makes sequences ready is another load, and so is the time until its end.
                if timed.pop(output.batch_id):
                    period_ns = None if last_ns is None else output.finished_ns - last_ns
                    steps.append(Step(output.finished_ns - output.started_ns, period_ns))
                    last_ns = output.finished_ns
                else:
                    last_ns = None
        self._ended += stream.close()
        return steps

    def _name(self) -> str:
        return f"check-{next(self._serial)}"


# ---- what the device did meanwhile ----


def kernel_intervals(trace: Path) -> list[tuple[float, float]]:
    """Start and end in microseconds of all that ran on the GPU, from a trace that torch.profiler has exported."""
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    kinds = {"kernel", "gpu_memcpy", "gpu_memset"}
    found = [(float(e["ts"]), float(e["ts"]) + float(e["dur"])) for e in events if e.get("cat") in kinds]
    return sorted(found)


def idle_gaps(intervals: Sequence[tuple[float, float]]) -> list[float]:
    """Times in which nothing ran between the first and the last, longest first."""
    gaps: list[float] = []
    reached = intervals[0][1] if intervals else 0.0
    for start, end in intervals:
        if start > reached:
            gaps.append(start - reached)
        reached = max(reached, end)
    return sorted(gaps, reverse=True)
