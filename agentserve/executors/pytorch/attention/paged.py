"""Attention over the blocks of the pool, for devices that follow block tables at no cost.

Memory. Pool, workspaces and the input buffers of decode steps are made once. Everything else is a temporary of a batch:
torch's allocator gives it memory of the stream that is current when it is made, which is that of the slot, and only
work in that stream uses it. So there is nothing to tell the allocator (`record_stream`): memory that is freed is given
to later work of the same stream. What passes from one slot to another lies in memory of the lane (inputs, tokens that
were sampled) or of all (the pool), and is ordered by the fences of the lane or by the host, which waits for a prompt
before it hands the request to the other lane.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from agentserve.core.batch import Lane, ScheduledChunk
from agentserve.executors.pytorch.attention.inputs import DeviceInputs, HostInputs, InputSizes, Int32s
from agentserve.executors.pytorch.attention.paged_batch import (
    FusedKernels,
    FusedPagedAttention,
    PagedAttention,
    PagedBatch,
)
from agentserve.executors.pytorch.attention.paged_kernels import BatchPlan, PagedKernels
from agentserve.executors.pytorch.devices.graphs import batch_buckets
from agentserve.executors.pytorch.devices.interface import Device
from agentserve.executors.pytorch.paged_pool import PagedPool

_TABLE_GRANULARITY = 16
"""Rows of block tables have a multiple of this many entries."""


class PagedBackend:
    """Implements `KvBackend`."""

    def __init__(
        self,
        pool: PagedPool,
        device: Device,
        make_kernels: Callable[[], PagedKernels],
        *,
        max_num_seqs: int,
        max_model_len: int,
        lookahead: int,
        fused: FusedKernels | None = None,
    ) -> None:
        """Allocates the input buffers.

        Args:
            pool: the blocks.
            device: where the pool is.
            make_kernels: called once for each lane.
            max_num_seqs: the most chunks of a batch.
            max_model_len: the most tokens of a request.
            lookahead: the most batches of a lane that are in flight.
            fused: kernels; without them the model does with torch what they do.
        """
        self.num_blocks = pool.num_blocks
        self.block_size = pool.block_size
        self._pool = pool
        self.buckets = batch_buckets(max_num_seqs)
        self._tables = _BlockTables()
        self._lanes = {
            lane: _LaneState(
                pool,
                device,
                make_kernels(),
                fused,
                max_num_seqs=max_num_seqs,
                width=table_width(max_model_len, pool.block_size),
                lookahead=lookahead,
            )
            for lane in Lane
        }

    @property
    def pages(self) -> Tensor:
        """See `KvBackend.pages`."""
        return self._pool.pages

    def overwritten(self, block_ids: Sequence[int]) -> None:
        """See `KvBackend.overwritten`: nothing is kept beside the blocks."""

    @property
    def static_steps(self) -> PagedBackend | None:
        """See `KvBackend.static_steps`."""
        return self if all(state.kernels.capturable for state in self._lanes.values()) else None

    def batch(self, lane: Lane, bucket: int) -> PagedBatch:
        """See `StaticSteps.batch`."""
        return self._lanes[lane].static_batch(bucket)

    def pad(self, lane: Lane, bucket: int, units: int) -> None:
        """See `StaticSteps.pad`."""
        self._lanes[lane].make_static([], bucket, units)

    def open(self, lane: Lane, chunks: Sequence[ScheduledChunk], sources: Sequence[int], units: int) -> PagedBatch:
        """See `KvBackend.open`."""
        # Single tokens first; the longest context first among the others, since it takes longest.
        order = sorted(range(len(chunks)), key=lambda i: (0, 0) if chunks[i].num_tokens == 1 else (1, -chunks[i].end))
        sequences = [
            _Sequence(chunks[i], sources[i], self._tables.get(chunks[i].request_id, chunks[i].block_ids)) for i in order
        ]
        batch = self._lanes[lane].open(sequences, units)
        last_rows = [0] * len(chunks)
        for index, row in zip(order, batch.last_rows, strict=True):
            last_rows[index] = row
        batch.last_rows = last_rows
        return batch

    def forget(self, request_ids: Iterable[str]) -> None:
        """See `KvBackend.forget`. The pool is the core's; here are only copies of block tables."""
        self._tables.forget(request_ids)

    def close(self) -> None:
        """See `KvBackend.close`."""
        for state in self._lanes.values():
            state.close()


@dataclass(frozen=True, slots=True)
class _Sequence:
    chunk: ScheduledChunk
    source: int
    table: Int32s


class _BlockTables:
    """Block ids of requests as arrays.

    A decode step adds a block to a table now and then. Making an array of all of a long table again in every step would
    take longer than the step.
    """

    def __init__(self) -> None:
        # Entries are replaced, never changed, and each access is one operation: no lock is needed.
        self._entries: dict[str, tuple[tuple[int, ...], Int32s]] = {}

    def get(self, request_id: str, block_ids: tuple[int, ...]) -> Int32s:
        """`block_ids` as an array."""
        entry = self._entries.get(request_id)
        if entry is not None:
            known, table = entry
            # Comparing is cheap, because the tuples share their items.
            if known is block_ids or known == block_ids:
                return table
            if block_ids[: len(known)] == known:
                table = np.concatenate([table, np.array(block_ids[len(known) :], dtype=np.int32)])
                self._entries[request_id] = (block_ids, table)
                return table
        table = np.array(block_ids, dtype=np.int32)
        self._entries[request_id] = (block_ids, table)
        return table

    def forget(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._entries.pop(request_id, None)


class _LaneState:
    """Kernels and input buffers of a lane."""

    def __init__(
        self,
        pool: PagedPool,
        device: Device,
        kernels: PagedKernels,
        fused: FusedKernels | None,
        *,
        max_num_seqs: int,
        width: int,
        lookahead: int,
    ) -> None:
        self._pool = pool
        self._torch_device = device.torch_device
        self.kernels = kernels
        self._fused = fused
        self._width = width
        self._buckets = batch_buckets(max_num_seqs)
        num_bytes = self._decode_sizes(self._buckets[-1]).num_bytes
        self._device_buffer = device.empty((num_bytes,), torch.uint8)
        # One for each batch that may be in flight: what a batch was prepared in is filled again when its output is out.
        self._host_buffers = [device.host_empty((num_bytes,), torch.uint8) for _ in range(lookahead)]
        self._num_steps = 0
        self._device_inputs: dict[int, DeviceInputs] = {}

    def open(self, sequences: list[_Sequence], units: int) -> PagedBatch:
        """Single tokens come first."""
        num_singles = sum(sequence.chunk.num_tokens == 1 for sequence in sequences)
        if num_singles == len(sequences):
            bucket = next(size for size in self._buckets if size >= num_singles)
            last_rows = self.make_static(sequences, bucket, units)
            batch = self.static_batch(bucket)
        else:
            sizes = self._sizes_of(sequences, num_singles)
            is_pinned = self._torch_device.type != "cpu"
            host_buffer = torch.empty(sizes.num_bytes, dtype=torch.uint8, pin_memory=is_pinned)
            inputs = DeviceInputs(host_buffer.new_empty(sizes.num_bytes, device=self._torch_device), sizes)
            last_rows = self._make_ready(HostInputs(host_buffer, sizes), inputs, sequences, num_singles, units)
            batch = PagedBatch(
                self._attention(inputs, num_singles),
                inputs,
                sizes.num_rows,
                substitutes=any(sequence.source >= 0 for sequence in sequences),
            )
        batch.last_rows = last_rows
        return batch

    def make_static(self, sequences: list[_Sequence], bucket: int, units: int) -> list[int]:
        """Fills the lane's buffers with a decode step of `bucket` rows; returns the rows of the sequences."""
        host_buffer = self._host_buffers[self._num_steps % len(self._host_buffers)]
        self._num_steps += 1
        host = HostInputs(host_buffer, self._decode_sizes(bucket))
        return self._make_ready(host, self._static_inputs(bucket), sequences, bucket, units)

    def close(self) -> None:
        """Gives the host buffers back."""
        self._host_buffers.clear()

    def static_batch(self, bucket: int) -> PagedBatch:
        """A decode step in the lane's buffers."""
        inputs = self._static_inputs(bucket)
        return PagedBatch(
            self._attention(inputs, bucket), inputs, bucket, substitutes=True, is_static=self.kernels.capturable
        )

    def _attention(self, inputs: DeviceInputs, num_singles: int) -> PagedAttention:
        if self._fused is None:
            return PagedAttention(self._pool, self.kernels, inputs, num_singles)
        return FusedPagedAttention(self._pool, self.kernels, inputs, num_singles, fused=self._fused)

    def _static_inputs(self, bucket: int) -> DeviceInputs:
        inputs = self._device_inputs.get(bucket)
        if inputs is None:
            inputs = self._device_inputs[bucket] = DeviceInputs(self._device_buffer, self._decode_sizes(bucket))
        return inputs

    def _make_ready(
        self, host: HostInputs, inputs: DeviceInputs, sequences: list[_Sequence], bucket: int, units: int
    ) -> list[int]:
        """Fills, copies and plans a batch with `bucket` rows of single tokens, padding included."""
        last_rows = self._fill(host, sequences, bucket)
        inputs.buffer.copy_(host.buffer, non_blocking=True)
        num_singles = sum(sequence.chunk.num_tokens == 1 for sequence in sequences)
        self.kernels.plan(
            BatchPlan(
                num_units=units,
                num_singles=num_singles,
                bucket=bucket,
                query_lengths=[sequence.chunk.num_tokens for sequence in sequences],
                kv_lengths=[sequence.chunk.end for sequence in sequences],
                tables=[sequence.table for sequence in sequences],
                is_static=num_singles == len(sequences),
            )
        )
        return last_rows

    def _decode_sizes(self, bucket: int) -> InputSizes:
        return InputSizes(num_singles=bucket, num_chunks=0, num_chunk_rows=0, width=self._width)

    @staticmethod
    def _sizes_of(sequences: list[_Sequence], num_singles: int) -> InputSizes:
        num_tokens = sum(sequence.chunk.num_tokens for sequence in sequences)
        return InputSizes(
            num_singles=num_singles,
            num_chunks=len(sequences) - num_singles,
            num_chunk_rows=num_tokens - num_singles,
            width=_rounded_up(max(len(sequence.table) for sequence in sequences), _TABLE_GRANULARITY),
        )

    def _fill(self, host: HostInputs, sequences: list[_Sequence], bucket: int) -> list[int]:
        """Writes all arrays; returns the last rows of the sequences. Singles beyond the sequences become padding."""
        block_size = self._pool.block_size
        last_rows: list[int] = []
        row = 0
        for index, (chunk, source, table) in enumerate((s.chunk, s.source, s.table) for s in sequences):
            end = row + chunk.num_tokens
            host.kv_lengths[index] = chunk.end
            host.block_tables[index, : len(table)] = table
            if chunk.num_tokens == 1:
                host.token_ids[row] = max(chunk.token_ids[0], 0)  # a pending one must be some token, too
                host.positions[row] = chunk.start
                host.slots[row] = int(table[chunk.start // block_size]) * block_size + chunk.start % block_size
                host.sources[row] = source
            else:
                positions = np.arange(chunk.start, chunk.end)
                host.token_ids[row:end] = chunk.token_ids
                host.positions[row:end] = positions
                host.slots[row:end] = table[positions // block_size].astype(np.int64) * block_size
                host.slots[row:end] += positions % block_size
                host.query_starts[index - bucket + 1] = end - bucket
            row = end
            last_rows.append(row - 1)
        host.query_starts[0] = 0
        num_padding = len(host.token_ids) - row
        if num_padding:
            host.token_ids[row:] = host.positions[row:] = host.kv_lengths[len(sequences) :] = 0
            host.slots[row:] = host.sources[row:] = -1
        return last_rows


def table_width(max_model_len: int, block_size: int) -> int:
    """Entries in a row of the block table of a decode step."""
    return _rounded_up(-(-max_model_len // block_size), _TABLE_GRANULARITY)


def _rounded_up(number: int, step: int) -> int:
    return -(-number // step) * step
