"""Batches on the time line of a run, kept while it goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from agentserve.core.batch import Batch, Lane
from agentserve.core.decode_run import DecodeRun
from agentserve.core.events import BatchScheduled
from agentserve.core.request import WorkClass
from agentserve.sim.cluster import InstanceStep


@dataclass(frozen=True, slots=True)
class BatchSpan:
    """A batch on the time line. Times are nanoseconds from the start of the run."""

    lane: Lane
    partition: str
    """Label of its partition."""
    started_ns: int
    finished_ns: int
    num_decodes: int
    num_cold_tokens: int
    num_resume_tokens: int
    cold_program_ids: tuple[str, ...]
    """Programs whose cold prefill it advances."""
    instance: int = 0


class SpanKeeper:
    """Keeps the batches of one instance: all of them, or the first ones that it makes."""

    def __init__(self, instance: int, max_batches: int | None) -> None:
        self._instance = instance
        self._num_left = max_batches
        self._scheduled: dict[int, tuple[int, Batch]] = {}
        """In flight and wanted, by id: when each was made."""
        self.spans: list[tuple[tuple[int, int, int], BatchSpan]] = []
        """By (when made, instance, id), not in order. Times are those of the clock."""

    def take(self, step: InstanceStep) -> None:
        """Looks at a step of the instance."""
        if self._num_left == 0 and not self._scheduled:
            return
        if step.result.run is not None:
            self._take_run(step.result.run)
        for output in step.completions:
            self._end(output.batch_id, output.started_ns, output.finished_ns)
        if self._num_left != 0:
            for event in step.result.events:
                if isinstance(event, BatchScheduled):
                    self._begin(event.at_ns, event.batch)

    def _take_run(self, run: DecodeRun) -> None:
        depth, starts_ns = len(run.plan.batches), run.starts_ns()
        for batch, started_ns, finished_ns in zip(run.plan.batches, starts_ns, run.ends_ns, strict=False):
            self._end(batch.batch_id, started_ns, finished_ns)
        num_kept = max(0, run.num_steps - depth)
        if self._num_left is not None:
            num_kept = min(num_kept, self._num_left)
            self._num_left -= num_kept
        label = run.plan.partition.label
        for index in range(depth, depth + num_kept):
            key = (run.ends_ns[index - depth], self._instance, run.first_batch_id + index - depth)
            times = (starts_ns[index], run.ends_ns[index])
            self.spans.append((key, BatchSpan(Lane.DECODE, label, *times, run.num_decodes, 0, 0, (), self._instance)))
        if run.in_flight is not None and run.num_steps >= depth:
            self._begin(run.ends_ns[run.num_steps - depth], run.in_flight)

    def _begin(self, at_ns: int, batch: Batch) -> None:
        if self._num_left is not None:
            if self._num_left == 0:
                return
            self._num_left -= 1
        self._scheduled[batch.batch_id] = (at_ns, batch)

    def _end(self, batch_id: int, started_ns: int, finished_ns: int) -> None:
        scheduled = self._scheduled.pop(batch_id, None)
        if scheduled is not None:
            at_ns, batch = scheduled
            span = _span(self._instance, batch, started_ns, finished_ns)
            self.spans.append(((at_ns, self._instance, batch_id), span))


def first_spans(keepers: Iterable[SpanKeeper], start_ns: int, max_batches: int | None) -> tuple[BatchSpan, ...]:
    """The first `max_batches` batches of all instances that were made, in the order of their starts."""
    made = sorted((item for keeper in keepers for item in keeper.spans), key=lambda item: item[0])
    started = sorted(made[:max_batches], key=lambda item: (item[1].started_ns, item[1].instance, item[0][2]))
    spans = (span for _, span in started)
    if start_ns == 0:
        return tuple(spans)
    return tuple(
        dataclasses.replace(s, started_ns=s.started_ns - start_ns, finished_ns=s.finished_ns - start_ns) for s in spans
    )


def _span(instance: int, batch: Batch, started_ns: int, finished_ns: int) -> BatchSpan:
    num_tokens = {WorkClass.COLD_PREFILL: 0, WorkClass.RESUME_PREFILL: 0, WorkClass.DECODE: 0}
    for chunk in batch.chunks:
        num_tokens[chunk.work_class] += chunk.num_tokens
    cold = [chunk.request_id for chunk in batch.chunks if chunk.work_class is WorkClass.COLD_PREFILL]
    return BatchSpan(
        lane=batch.lane,
        partition=batch.partition.label,
        started_ns=started_ns,
        finished_ns=finished_ns,
        num_decodes=batch.shape.num_decodes,
        num_cold_tokens=num_tokens[WorkClass.COLD_PREFILL],
        num_resume_tokens=num_tokens[WorkClass.RESUME_PREFILL],
        cold_program_ids=tuple(request_id.rpartition("/")[0] for request_id in cold),
        instance=instance,
    )
