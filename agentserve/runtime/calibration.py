"""Measures what a device can do, through the port that the engine uses: the same batches, the same lanes.

Nobody else may use the executor meanwhile. Blocks are used from 0 up and hold nonsense afterwards, which does not
matter to a memory manager that starts with empty blocks. At the end the executor is told that all requests ended but
one of a single token, which it forgets when it needs the room.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from agentserve.core.batch import Batch, BatchOutput, Lane, ScheduledChunk
from agentserve.core.costmodel import BatchShape, DeviceProfile, ModelShape, Sample
from agentserve.core.executor import Executor
from agentserve.core.slots import PartitionKind, SlotPartition
from agentserve.errors import EngineError
from agentserve.profiles.fit import FitReport, fit_profile
from agentserve.runtime.calibration_grid import Case, Grid, Limits, Load
from agentserve.runtime.calibration_load import LoadStream

_TIMEOUT_S = 120.0
"""No batch of a grid takes nearly as long; an executor that does not answer must not hang the start of a daemon."""
_FIRST_BATCH_ID = -(1 << 62)
"""Batch ids increase over the life of an executor; those of the engine start at 0."""
_FILL_CHUNK = 512
_TPOT_CONTEXT, _TPOT_WARMUP, _TPOT_STEPS = 256, 4, 12
_LONG_LIMIT, _PAIR_LIMIT = 3, 5
"""A case of one lane or of both ends after so many times `Grid.case_time_ns` if each lane has been timed at all."""


class BatchRunner:
    """Hands batches to an executor and waits for what comes out: on virtual time if the executor knows when that is."""

    def __init__(self, executor: Executor) -> None:
        """Takes over the executor's `on_completion`; whoever drives it later registers a function of its own."""
        self._executor = executor
        self._batch_ids = itertools.count(_FIRST_BATCH_ID)
        self._now_ns = 0
        self._num_in_flight = 0
        self._done = threading.Event()
        executor.on_completion(self._done.set)

    def submit(
        self,
        lane: Lane,
        partition: SlotPartition,
        chunks: tuple[ScheduledChunk, ...],
        *,
        co_running: bool = False,
        ended: tuple[str, ...] = (),
    ) -> Batch:
        """Puts a batch into an idle lane; returns at once. `ended`: requests that the executor may forget."""
        batch = Batch(next(self._batch_ids), lane, partition, co_running, chunks, ended)
        self._executor.submit(batch, self._now_ns)
        self._num_in_flight += 1
        return batch

    def wait(self) -> list[BatchOutput]:
        """Blocks until at least one batch is done.

        Raises EngineError if one failed or nothing came for two minutes.
        """
        assert self._num_in_flight > 0, "nothing to wait for"
        while True:
            due_ns = self._executor.next_completion_ns()
            if due_ns is not None:
                self._now_ns = max(self._now_ns, due_ns)
            elif self._done.wait(_TIMEOUT_S):
                self._now_ns = max(self._now_ns, time.monotonic_ns())
            else:
                raise EngineError(f"the executor did not finish a batch in {_TIMEOUT_S:.0f} s")
            # Before the look: what finishes after it sets the event again.
            self._done.clear()
            outputs = [output for output in self._executor.poll(self._now_ns) if isinstance(output, BatchOutput)]
            self._num_in_flight -= len(outputs)
            for output in outputs:
                if output.error is not None:
                    raise EngineError(f"a batch of the calibration failed: {output.error}")
            if outputs:
                return outputs

    def drain(self) -> None:
        """Waits for all that is in flight."""
        while self._num_in_flight:
            self.wait()


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a measurement is."""

    num_done: int
    num_cases: int
    """In all rounds together."""
    label: str
    """The case that comes next, in words; empty at the end."""


def measure_isolated_tpot_ns(executor: Executor, limits: Limits) -> int:
    """Median time between two tokens of a single stream with a short context on the whole, otherwise idle device.

    Takes 16 decode steps. Raises EngineError if the executor fails.
    """
    context = limits.context(_TPOT_CONTEXT)
    session = _Session(executor, limits)
    session.fill(context // limits.block_size)
    streams = session.streams({Lane.DECODE: Load(1, context)})
    finished_ns: list[int | None] = []
    for _ in range(_TPOT_WARMUP + _TPOT_STEPS):
        _, timed = session.submit(Lane.DECODE, session.whole, streams[Lane.DECODE])
        (output,) = session.runner.wait()
        # A step that makes a sequence ready is longer: the intervals around it are left out.
        finished_ns.append(output.finished_ns if timed else None)
    session.end(streams.values())
    session.close()
    intervals = [
        later - earlier
        for earlier, later in itertools.pairwise(finished_ns[_TPOT_WARMUP:])
        if earlier is not None and later is not None
    ]
    return sorted(intervals)[len(intervals) // 2]


def measure(executor: Executor, grid: Grid, report: Callable[[Progress], None] = lambda _: None) -> list[Sample]:
    """Measures the cases of a grid, one sample for each lane of a case: the batch at `Grid.quantile` of the durations.

    Args:
        executor: idle; nobody else may use it meanwhile.
        grid: made for this executor.
        report: called before each case and at the end.

    Raises EngineError if a batch fails.
    """
    deadline_ns = None if grid.time_limit_ns is None else time.monotonic_ns() + grid.time_limit_ns
    session = _Session(executor, grid.limits)
    session.fill(grid.num_filled_blocks)
    timings = {case: _Timings(case) for case in grid.cases}
    num_total, serial = grid.num_rounds * len(grid.cases), itertools.count()
    for num_round in range(grid.num_rounds):
        # There and back, so that a slow drift of the machine weighs on all cases alike.
        for case in reversed(grid.cases) if num_round % 2 else grid.cases:
            num_done = next(serial)
            if not case.required and deadline_ns is not None and time.monotonic_ns() >= deadline_ns:
                continue
            report(Progress(num_done, num_total, case.label))
            _Measurement(session, case, grid, timings[case]).run()
    session.close()
    report(Progress(num_total, num_total, ""))
    return [sample for timing in timings.values() for sample in timing.samples(grid.quantile)]


def calibrate(
    executor: Executor,
    grid: Grid,
    sheet: DeviceProfile,
    model: ModelShape,
    report: Callable[[Progress], None] = lambda _: None,
    *,
    provenance: str | None = None,
) -> FitReport:
    """Measures a grid and fits a profile to it: `measure`, then `profiles.fit.fit_profile`, whose errors it has too."""
    return fit_profile(measure(executor, grid, report), sheet, model, provenance=provenance)


class _Session:
    """An executor with the blocks, request names and warm slots of one calibration."""

    def __init__(self, executor: Executor, limits: Limits) -> None:
        units = executor.capabilities().compute_units
        self.runner = BatchRunner(executor)
        self.whole = SlotPartition(units, units, PartitionKind.WHOLE)
        self.warm_slots: set[tuple[Lane, int]] = set()
        self._limits = limits
        self._filled: range = range(0)
        self._serial = itertools.count()
        self._ended: list[str] = []

    def fill(self, num_blocks: int) -> None:
        """Computes keys and values for blocks from 0 on: what is in untouched memory need not even be numbers."""
        size = self._limits.block_size
        self._filled = range(num_blocks)
        per_chunk = min(_FILL_CHUNK, self._limits.max_model_len) // size
        for first in range(0, num_blocks, max(1, per_chunk)):
            num_tokens = min(per_chunk, num_blocks - first) * size
            load = Load(chunk=num_tokens)
            stream = LoadStream(f"calibration-{next(self._serial)}", load, (), itertools.count(first), self._limits)
            self.submit(Lane.PREFILL, self.whole, stream)
            self.runner.drain()
            self.end([stream])

    def streams(self, loads: dict[Lane, Load]) -> dict[Lane, LoadStream]:
        """Streams that share no block; those of earlier calls must have ended."""
        private = itertools.count(len(self._filled))
        return {
            lane: LoadStream(f"calibration-{next(self._serial)}", load, self._filled, private, self._limits)
            for lane, load in loads.items()
        }

    def submit(
        self, lane: Lane, partition: SlotPartition, stream: LoadStream, *, co_running: bool = False
    ) -> tuple[Batch, bool]:
        """Puts the next batch of a stream into a lane; returns it and whether its duration is that of the load."""
        chunks, timed = stream.next()
        ended = (*self._ended, *stream.take_ended())
        self._ended.clear()
        slot = (lane, partition.units(lane))
        # A slot starts its threads with its first batch.
        timed = timed and slot in self.warm_slots
        self.warm_slots.add(slot)
        return self.runner.submit(lane, partition, chunks, co_running=co_running, ended=ended), timed

    def end(self, streams: Iterable[LoadStream]) -> None:
        """Notes that the requests of streams are over; the executor hears of it with the next batch."""
        for stream in streams:
            self._ended += stream.close()

    def close(self) -> None:
        """Tells the executor that everything is over: only a batch can, so one last request has a single token."""
        private = itertools.count()
        self.submit(Lane.PREFILL, self.whole, LoadStream("calibration", Load(chunk=1), (), private, self._limits))
        self.runner.drain()


class _Timings:
    """What has been timed of a case."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._timed: dict[Lane, list[tuple[int, BatchShape]]] = {lane: [] for lane in case.loads}

    def add(self, batch: Batch, duration_ns: int) -> None:
        self._timed[batch.lane].append((duration_ns, BatchShape.of(batch)))

    def samples(self, quantile: float) -> list[Sample]:
        """For each lane duration and shape of the batch at this quantile of the durations, or next below it."""
        case, samples = self._case, []
        for lane, timed in self._timed.items():
            if timed:
                timed.sort(key=lambda pair: pair[0])
                duration_ns, shape = timed[int((len(timed) - 1) * quantile)]
                samples.append(Sample(shape, lane, case.partition, case.co_running, duration_ns))
        return samples


class _Measurement:
    """One case in one round: keeps its lanes busy until enough batches are timed."""

    def __init__(self, session: _Session, case: Case, grid: Grid, timings: _Timings) -> None:
        self._session = session
        self._case = case
        self._grid = grid
        self._timings = timings
        self._streams = session.streams(case.loads)
        self._in_flight: dict[int, tuple[Batch, bool]] = {}
        self._spent_ns = dict.fromkeys(case.loads, 0)
        self._num_timed = dict.fromkeys(case.loads, 0)

    def run(self) -> None:
        for lane in self._streams:
            self._submit(lane)
        while not self._enough():
            for output in self._session.runner.wait():
                self._book(output)
                if not self._enough():
                    # At once, so that the other lane does not notice a gap.
                    self._submit(output.lane)
        self._session.runner.drain()
        self._session.end(self._streams.values())

    def _submit(self, lane: Lane) -> None:
        batch, timed = self._session.submit(
            lane, self._case.partition, self._streams[lane], co_running=self._case.co_running
        )
        self._in_flight[batch.batch_id] = (batch, timed)

    def _book(self, output: BatchOutput) -> None:
        batch, timed = self._in_flight.pop(output.batch_id)
        duration_ns = output.finished_ns - output.started_ns
        self._spent_ns[output.lane] += duration_ns
        if timed:
            self._num_timed[output.lane] += 1
            self._timings.add(batch, duration_ns)

    def _enough(self) -> bool:
        grid = self._grid
        num_timed, spent_ns = min(self._num_timed.values()), max(self._spent_ns.values())
        if self._case.co_running:
            # The lane with the short batches is timed as often as the other one allows.
            return num_timed >= grid.min_timed or (num_timed >= 1 and spent_ns >= _PAIR_LIMIT * grid.case_time_ns)
        if num_timed < grid.min_timed:
            return num_timed >= 1 and spent_ns >= _LONG_LIMIT * grid.case_time_ns
        return num_timed >= grid.max_timed or spent_ns >= grid.case_time_ns
