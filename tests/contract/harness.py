"""An executor under one handle, and builders of batches: what the contract suite and the executor tests share."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agentserve.core.batch import Batch, BatchOutput, Lane, SampleSpec, ScheduledChunk
from agentserve.core.clock import VirtualClock
from agentserve.core.executor import Executor
from agentserve.core.request import SamplingParams, WorkClass
from agentserve.core.slots import PartitionKind, SlotPartition

NUM_BLOCKS, BLOCK_SIZE, MAX_NUM_SEQS = 64, 4, 8
_TIMEOUT_S = 60.0


class TickingClock(VirtualClock):
    """A clock that moves on by a nanosecond whenever it is read; safe for threads."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()

    def now_ns(self) -> int:
        with self._lock:
            self.advance_to(super().now_ns() + 1)
            return super().now_ns()


@dataclass
class Harness:
    """An executor with the clock that it lives on."""

    executor: Executor
    clock: VirtualClock

    def __post_init__(self) -> None:
        self.woken = threading.Event()
        self._next_batch_id = 0
        self.executor.on_completion(self.woken.set)

    def batch(self, chunks: Sequence[ScheduledChunk], lane: Lane = Lane.DECODE, **values: Any) -> Batch:
        """A batch on the whole device, with the next batch id."""
        self._next_batch_id += 1
        defaults: dict[str, Any] = {"partition": self.whole(), "co_running": False}
        return Batch(batch_id=self._next_batch_id, lane=lane, chunks=tuple(chunks), **{**defaults, **values})

    def whole(self) -> SlotPartition:
        units = self.executor.capabilities().compute_units
        return SlotPartition(units, units, PartitionKind.WHOLE)

    def submit(self, batch: Batch) -> None:
        self.executor.submit(batch, self.clock.now_ns())

    def collect(self, num_outputs: int) -> list[BatchOutput]:
        """Runs until so many outputs have come, and checks that no other output came with them."""
        outputs: list[BatchOutput] = []
        while len(outputs) < num_outputs:
            outputs += self.collect_some()
        assert len(outputs) == num_outputs
        return outputs

    def collect_some(self) -> list[BatchOutput]:
        """Runs until at least one output has come."""
        while True:
            due_ns = self.executor.next_completion_ns()
            if due_ns is not None:
                self.clock.advance_to(max(due_ns, self.clock.now_ns()))
            self.woken.clear()
            outputs = self.executor.poll(self.clock.now_ns())
            if outputs:
                return outputs
            assert due_ns is not None or self.woken.wait(_TIMEOUT_S), "no completion came"

    def run(self, batch: Batch) -> BatchOutput:
        """Submits a batch and waits for its output."""
        self.submit(batch)
        return self.collect(1)[0]


def greedy(**values: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 64, "temperature": 0.0, **values})


def spec(params: SamplingParams, output_index: int = 0, history: Sequence[int] = (), num_prompt: int = 0) -> SampleSpec:
    return SampleSpec(params, output_index, tuple(history), num_prompt)


def chunk(
    request_id: str,
    token_ids: Sequence[int],
    block_ids: Sequence[int],
    *,
    start: int = 0,
    sample: SampleSpec | None = None,
    block_size: int = BLOCK_SIZE,
) -> ScheduledChunk:
    """A chunk that takes as many of `block_ids` as it needs."""
    num_blocks = -(-(start + len(token_ids)) // block_size)
    work_class = WorkClass.DECODE if start and len(token_ids) == 1 else WorkClass.COLD_PREFILL
    return ScheduledChunk(request_id, work_class, start, tuple(token_ids), tuple(block_ids[:num_blocks]), sample)
