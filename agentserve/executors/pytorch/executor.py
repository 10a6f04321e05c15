"""Runs batches of a real model with torch, one thread a lane."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

import torch

from agentserve.core.batch import Batch, BatchOutput, Lane, TokenSample
from agentserve.core.clock import Clock
from agentserve.core.executor import Capabilities
from agentserve.errors import EngineError
from agentserve.executors.pytorch.devices.interface import Device
from agentserve.executors.pytorch.kv_store import KvStore
from agentserve.executors.pytorch.lanes import LaneThread
from agentserve.executors.pytorch.runner import ModelRunner
from agentserve.models.config import ModelConfig
from agentserve.models.interface import DecoderModel

logger = logging.getLogger(__name__)


def kv_bytes_per_block(config: ModelConfig, dtype: torch.dtype | str, block_size: int) -> int:
    """Bytes of a block of the pool; `dtype` is that of the model, a name as in `torch.float32` without `torch.`."""
    resolved = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return config.kv_bytes_per_token(resolved.itemsize) * block_size


class TorchExecutor:
    """Implements `core.executor.Executor`."""

    def __init__(
        self,
        model: DecoderModel,
        device: Device,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        clock: Clock,
    ) -> None:
        """Takes over `device` and closes it in `close`.

        Args:
            model: on `device.torch_device`.
            device: what to run on.
            num_blocks: KV blocks in the pool; memory is taken as they are used.
            block_size: tokens in a block.
            max_num_seqs: requests that may hold blocks at a time; a batch never has more chunks.
            clock: stamps `started_ns` and `finished_ns`.
        """
        if num_blocks < 1 or block_size < 1 or max_num_seqs < 1:
            raise EngineError("the numbers of blocks, tokens in a block and sequences must be positive")
        self._device = device
        self._clock = clock
        self._max_num_seqs = max_num_seqs
        pool_bytes = kv_bytes_per_block(model.config, model.dtype, block_size) * num_blocks
        store = KvStore(
            model.config,
            device,
            model.dtype,
            num_blocks=num_blocks,
            block_size=block_size,
            # Requests that run hold distinct tokens except for shared prefixes: as much as the pool is ample.
            mirror_limit_bytes=pool_bytes,
        )
        self._store = store
        self._runner = ModelRunner(model, store, device.torch_device)
        self._capabilities = Capabilities(
            name=device.name,
            device=device.description,
            compute_units=device.compute_units,
            unit_granularity=device.unit_granularity,
            min_units=device.min_units,
            num_blocks=num_blocks,
            block_size=block_size,
            lookahead=device.lookahead,
        )
        self._lock = threading.Lock()  # guards the four below
        self._num_in_flight = dict.fromkeys(Lane, 0)
        self._finished: deque[BatchOutput] = deque()
        self._wake: Callable[[], None] | None = None
        self._closed = False
        self._lanes = {lane: LaneThread(lane, self._run) for lane in Lane}

    def capabilities(self) -> Capabilities:
        return self._capabilities

    def submit(self, batch: Batch, now_ns: int) -> None:  # noqa: ARG002 - real batches start when they start
        """See `Executor.submit`. A batch counts as in flight until `poll` has returned its output."""
        with self._lock:
            if self._closed:
                raise RuntimeError("the executor is closed")
            if self._num_in_flight[batch.lane] >= self._capabilities.lookahead:
                raise RuntimeError(f"the {batch.lane.value} lane is full")
            self._num_in_flight[batch.lane] += 1
        self._store.forget(batch.ended_request_ids)
        self._lanes[batch.lane].put(batch)

    def poll(self, now_ns: int) -> list[BatchOutput]:  # noqa: ARG002 - what is finished is finished
        with self._lock:
            outputs = list(self._finished)
            self._finished.clear()
            for output in outputs:
                self._num_in_flight[output.lane] -= 1
        return outputs

    def next_completion_ns(self) -> int | None:
        """Always None: nobody knows how long real work takes."""
        return None

    def on_completion(self, wake: Callable[[], None]) -> None:
        """See `Executor.on_completion`; a second function replaces the first. It is called on the lane's thread."""
        with self._lock:
            self._wake = wake
            waiting = bool(self._finished)
        if waiting:
            wake()

    def close(self) -> None:
        """See `Executor.close`. What was in flight can still be polled."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        for lane in self._lanes.values():
            lane.close()
        self._device.close()

    # ---- on the thread of a lane ----

    def _run(self, batch: Batch) -> None:
        started_ns = self._clock.now_ns()
        samples: tuple[TokenSample, ...] = ()
        error: str | None = None
        try:
            samples = self._compute(batch)
        except Exception as exception:
            logger.exception("batch %d of the %s lane failed", batch.batch_id, batch.lane.value)
            error = f"{type(exception).__name__}: {exception}"
        output = BatchOutput(batch.batch_id, batch.lane, started_ns, self._clock.now_ns(), samples, error)
        with self._lock:
            self._finished.append(output)
            wake = self._wake
        if wake is not None:
            wake()

    def _compute(self, batch: Batch) -> tuple[TokenSample, ...]:
        if not 1 <= len(batch.chunks) <= self._max_num_seqs:
            raise EngineError(f"a batch of {len(batch.chunks)} chunks; the limit is {self._max_num_seqs}")
        results: list[tuple[TokenSample, ...]] = []
        slot = self._device.slot(batch.lane, batch.partition.units(batch.lane))
        slot.run(lambda: results.append(self._runner.run(batch)))
        return results[0]
