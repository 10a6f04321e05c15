"""CUDA graphs of decode steps, one for each slot and batch size.

A decode step is hundreds of short kernels, and launching them one by one takes longer than they run. A graph replays
them in one call. It is bound to shapes and addresses, therefore there is one for each *bucket* of batch sizes, over
buffers that the runner keeps; and a kernel that was captured keeps the execution context of the stream on which it was
captured, wherever the graph is launched (programming guide, 4.6.5), therefore there is one for each slot as well.

Slots times buckets are many, and each graph takes memory and most of a second of start-up. What is used all the time is
captured at start-up (`prepare`); the rest when it was needed a few times, until a limit of number or memory is reached.
What has no graph runs as it is, with the same result.
"""

from __future__ import annotations

import gc
import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from agentserve.core.batch import Lane
from agentserve.errors import ConfigError
from agentserve.executors.pytorch.devices.cuda import CudaSlot

logger = logging.getLogger(__name__)

_CAPTURE_AT = 3
"""A rare entry is captured at its third use. The first two run as they are, and warm up what must not be captured."""


def batch_buckets(max_batch: int) -> tuple[int, ...]:
    """Batch sizes to capture for batches of up to `max_batch` sequences, smallest first.

    Every size up to 4, then steps of a quarter of the size (5, 6, 7, 8, 10, 12, 14, 16, 20, ...): a batch is padded by
    less than a quarter, and a decode step, which is bound by the weights it reads, takes hardly longer for it.

    Raises ConfigError if `max_batch` is not positive.
    """
    if max_batch < 1:
        raise ConfigError(f"the largest batch must be positive, not {max_batch}")
    buckets = [1]
    while buckets[-1] < max_batch:
        step = max(1, (1 << buckets[-1].bit_length() - 1) // 4)
        buckets.append(min(buckets[-1] + step, max_batch))
    return tuple(buckets)


def bucket_for(buckets: tuple[int, ...], batch: int) -> int | None:
    """The smallest bucket that holds a batch; None if it is larger than all of them."""
    index = bisect_left(buckets, batch)
    return buckets[index] if index < len(buckets) else None


class GraphRuntime(Protocol):
    """What is needed of torch.cuda, so that a test can stand in for it."""

    def pool(self) -> Any:
        """A private memory pool for graphs."""
        ...

    def capture(self, stream: Any, pool: Any, work: Callable[[], None]) -> Any:
        """Captures what `work` enqueues on `stream`; the result has `replay()` and `reset()`."""
        ...

    def free_bytes(self) -> int:
        """Free memory of the device."""
        ...


class TorchGraphRuntime:
    """Implements `GraphRuntime`."""

    def __init__(self, index: int = 0) -> None:
        """`index`: of the device."""
        self._index = index

    def pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    def capture(self, stream: Any, pool: Any, work: Callable[[], None]) -> Any:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream), _no_garbage_collection():
            # thread_local: the other lane goes on meanwhile, and what it calls is none of this capture's business.
            # torch.cuda.graph would also stop the device, collect garbage and empty the allocator's cache.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                work()
            except BaseException:
                # The stream must not go on capturing. That the capture is broken is known; why is what is raised.
                with suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph

    def free_bytes(self) -> int:
        return int(torch.cuda.mem_get_info(self._index)[0])


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Memory or events that were freed in the middle of a capture could become part of it."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@dataclass(frozen=True, slots=True)
class GraphReport:
    """What the graphs cost and do."""

    num_graphs: int
    memory_bytes: int
    """Device memory that went while they were captured; what others allocated meanwhile counts, too."""
    capture_ns: int
    """For all of them together."""
    num_replays: int
    num_eager: int
    """Steps without a graph."""
    full: bool
    """No more are captured."""


class DecodeGraphs:
    """The graphs of one lane. For the thread of that lane."""

    def __init__(
        self,
        step: Callable[[CudaSlot, int], None],
        *,
        buckets: tuple[int, ...],
        max_graphs: int,
        max_bytes: int,
        runtime: GraphRuntime | None = None,
    ) -> None:
        """Captures nothing yet.

        Args:
            step: enqueues the decode step of the first so many rows of the runner's buffers on the current stream. It
                allocates nothing that outlives it, and leaves its results in buffers of the runner: graphs of a slot
                share their memory. Rows that are padding must be harmless. It is called with a bucket, or with the
                size of a batch that is larger than all buckets.
            buckets: see `batch_buckets`.
            max_graphs: in all slots together.
            max_bytes: of device memory; a capture that reaches it is the last.
            runtime: torch.cuda, unless a test brings its own.
        """
        self._step = step
        self._buckets = buckets
        self._max_graphs = max_graphs
        self._max_bytes = max_bytes
        self._runtime = runtime or TorchGraphRuntime()
        self._graphs: dict[tuple[Lane, int, int], Any] = {}
        self._pools: dict[tuple[Lane, int], Any] = {}
        self._num_uses: dict[tuple[Lane, int, int], int] = {}
        self._memory_bytes = self._capture_ns = self._num_replays = self._num_eager = 0
        self._has_failed = False

    def prepare(self, slot: CudaSlot, buckets: Iterable[int]) -> None:
        """Captures graphs at start-up, the largest first, so that the smaller ones find the memory they need.

        Raises what the step or the capture raises.
        """
        for bucket in sorted(buckets, reverse=True):
            if self._is_full():
                return
            slot.run(lambda bucket=bucket: self._step(slot, bucket))  # type: ignore[misc]
            self._capture(slot, bucket)

    def enqueue(self, slot: CudaSlot, num_rows: int) -> int:
        """Enqueues a step, from a graph if there is one. To be called from work launched in `slot`.

        Returns the number of rows that are computed: the bucket.
        """
        bucket = bucket_for(self._buckets, num_rows)
        if bucket is None:
            self._num_eager += 1
            self._step(slot, num_rows)
            return num_rows
        key = (slot.lane, slot.units, bucket)
        if key not in self._graphs:
            self._num_uses[key] = self._num_uses.get(key, 0) + 1
            if self._num_uses[key] >= _CAPTURE_AT and not self._is_full():
                self._try_capture(slot, bucket)
        graph = self._graphs.get(key)
        if graph is None:
            self._num_eager += 1
            self._step(slot, bucket)
        else:
            self._num_replays += 1
            graph.replay()
        return bucket

    def report(self) -> GraphReport:
        return GraphReport(
            len(self._graphs),
            self._memory_bytes,
            self._capture_ns,
            self._num_replays,
            self._num_eager,
            self._is_full(),
        )

    def close(self) -> None:
        """Destroys the graphs; none may run. Before the slots are closed, whose contexts they keep in use."""
        while self._graphs:
            _, graph = self._graphs.popitem()
            graph.reset()
        self._pools.clear()

    def _is_full(self) -> bool:
        return self._has_failed or len(self._graphs) >= self._max_graphs or self._memory_bytes >= self._max_bytes

    def _try_capture(self, slot: CudaSlot, bucket: int) -> None:
        """Without memory for a graph the step runs without one: nobody's request fails for it."""
        try:
            self._capture(slot, bucket)
        except torch.OutOfMemoryError as error:
            self._has_failed = True
            logger.warning("no more CUDA graphs, there is no memory for them: %s", error)

    def _capture(self, slot: CudaSlot, bucket: int) -> None:
        place = (slot.lane, slot.units)
        if place not in self._pools:
            self._pools[place] = self._runtime.pool()
        started_ns, free_bytes = time.perf_counter_ns(), self._runtime.free_bytes()
        graph = self._runtime.capture(slot.stream, self._pools[place], lambda: self._step(slot, bucket))
        self._graphs[*place, bucket] = graph
        self._memory_bytes += max(0, free_bytes - self._runtime.free_bytes())
        self._capture_ns += time.perf_counter_ns() - started_ns
        if self._is_full():
            logger.info(
                "no more CUDA graphs: %d take %d MiB; other batches run without one",
                len(self._graphs),
                self._memory_bytes >> 20,
            )
