"""What batches tell about the device: how long they took, and whether the other lane was busy meanwhile."""

from __future__ import annotations

from collections.abc import Sequence

from agentserve.core.batch import Batch, BatchOutput, Lane
from agentserve.core.controllers import BatchObservation
from agentserve.core.request import WorkClass

# Looking up a member of an enumeration costs as much as a call.
_PREFILL = Lane.PREFILL
_DECODE = Lane.DECODE
_DECODE_WORK = WorkClass.DECODE
_BUSY, _IDLE = 0.9, 0.1
"""Shares of a batch's time in which the other lane was busy that count as all of it and as none."""


class LaneObserver:
    """Keeps the recent past of both lanes."""

    def __init__(self) -> None:
        self._running_since: dict[Lane, int] = {}
        self._past: dict[Lane, list[tuple[int, int]]] = {lane: [] for lane in Lane}
        """Start and end of batches that may overlap one that is in flight in the other lane."""
        self._previous_decode_ns = 0
        self._previous_decodes: Batch | None = None

    def started(self, batch: Batch, now_ns: int) -> None:
        self._running_since[batch.lane] = now_ns

    def running_since_ns(self, lane: Lane) -> int | None:
        """When the batch was made that runs in this lane; None if it is idle."""
        return self._running_since.get(lane)

    def finished(self, batch: Batch, output: BatchOutput) -> BatchObservation:
        """Books the end of a batch."""
        lane = batch.lane
        del self._running_since[lane]
        other = _DECODE if lane is _PREFILL else _PREFILL
        duration_ns = max(1, output.finished_ns - output.started_ns)
        spans, is_other_busy = self._past[other], other in self._running_since
        share = 0.0
        if spans or is_other_busy:  # else there is nothing to add up, which is the usual case
            share = self._overlap_ns(other, output.started_ns, output.finished_ns) / duration_ns
            # Nothing that the other lane starts from now on can overlap what ended before.
            spans.clear()
        if is_other_busy:
            self._past[lane].append((output.started_ns, output.finished_ns))
        else:
            self._past[lane].clear()
        gap_ns = self._gap_ns(batch, output) if lane is _DECODE else None
        return BatchObservation(
            batch=batch,
            shape=batch.shape,
            duration_ns=duration_ns,
            finished_ns=output.finished_ns,
            since_previous_decode_ns=gap_ns,
            co_running=share >= _BUSY,
            alone=share <= _IDLE,
        )

    def continued(self, started_ns: int, ends_ns: Sequence[int]) -> None:
        """Books batches of the decode lane that followed at once, with the same requests, and when each of them ended.

        The other lane is as it was when the one before them ended, at `started_ns`.
        """
        if not ends_ns:
            return
        if _PREFILL in self._running_since:
            self._past[_DECODE] += zip((started_ns, *ends_ns[:-1]), ends_ns, strict=True)
        self._previous_decode_ns = ends_ns[-1]
        if _DECODE in self._running_since:  # a batch that was made ahead started at once
            self._running_since[_DECODE] = ends_ns[-1]

    def _overlap_ns(self, other: Lane, start_ns: int, end_ns: int) -> int:
        spans = list(self._past[other])
        if other in self._running_since:
            spans.append((self._running_since[other], end_ns))
        return sum(max(0, min(end, end_ns) - max(start, start_ns)) for start, end in spans)

    def _gap_ns(self, batch: Batch, output: BatchOutput) -> int | None:
        gap_ns = output.finished_ns - self._previous_decode_ns if self._continues(batch) else None
        self._previous_decode_ns = output.finished_ns
        self._previous_decodes = batch
        return gap_ns

    def _continues(self, batch: Batch) -> bool:
        """Whether some request of a batch of decodes got a token from the one before it, too."""
        before = self._previous_decodes
        if before is None:
            return False
        first, other = batch.chunks[0], before.chunks[0]
        if first.work_class is _DECODE_WORK and first.request_id == other.request_id and other.sample is not None:
            return True
        sampled = {chunk.request_id for chunk in before.chunks if chunk.sample is not None}
        return any(chunk.work_class is _DECODE_WORK and chunk.request_id in sampled for chunk in batch.chunks)
