"""Blocks in host memory, and copies of whole blocks.

A block of the pool is one piece of memory, some hundred kilobytes of it. So copies go through the copy engines of a
GPU, which reach the full rate of the link with pieces of that size and take no multiprocessor from anybody; on a CPU
they are plain copies by the calling thread, not by the team of workers that torch would start for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from agentserve.executors.pytorch.devices.interface import Device

_SLAB_BYTES = 1 << 30
"""Page-locked memory comes in powers of two: in one piece a tier could take almost twice its size."""


def as_rows(pages: Tensor) -> Tensor:
    """`[num_blocks, ...]` contiguous, as bytes `[num_blocks, block_bytes]`."""
    return pages.flatten(1).view(torch.uint8)


def copy_rows(target: Tensor, first_target: int, source: Tensor, first_source: int, count: int) -> None:
    """Copies neighbouring blocks, `[n, block_bytes]` uint8 each; between device and host only in stream order."""
    to, of = target[first_target : first_target + count], source[first_source : first_source + count]
    if to.is_cpu and of.is_cpu:
        np.copyto(to.numpy(), of.numpy())
    else:
        to.copy_(of, non_blocking=True)


def row_bytes(rows: Tensor, index: int) -> memoryview:
    """The bytes of a block in host memory."""
    return rows[index].numpy().data


class HostMemory:
    """Room for blocks, allocated once."""

    def __init__(self, device: Device, num_blocks: int, block_bytes: int) -> None:
        self.num_blocks = num_blocks
        self._per_slab = max(1, min(num_blocks, _SLAB_BYTES // block_bytes))
        sizes = [min(self._per_slab, num_blocks - first) for first in range(0, num_blocks, self._per_slab)]
        self._slabs = [device.host_empty((size, block_bytes), torch.uint8) for size in sizes]

    def bytes_of(self, slot: int) -> memoryview:
        """The memory of a block."""
        return row_bytes(*self._place(slot))

    def fill(self, slots: Sequence[int], rows: Tensor, ids: Sequence[int]) -> None:
        """Copies blocks `ids` of `rows` into these slots, in stream order."""
        for slab, place, block_id, count in self._runs(slots, ids):
            copy_rows(slab, place, rows, block_id, count)

    def read(self, slots: Sequence[int], rows: Tensor, ids: Sequence[int]) -> None:
        """Copies these slots into blocks `ids` of `rows`, in stream order."""
        for slab, place, block_id, count in self._runs(slots, ids):
            copy_rows(rows, block_id, slab, place, count)

    def close(self) -> None:
        """Gives the memory back; nothing may be copied any more."""
        self._slabs.clear()

    def _place(self, slot: int) -> tuple[Tensor, int]:
        slab, place = divmod(slot, self._per_slab)
        return self._slabs[slab], place

    def _runs(self, slots: Sequence[int], ids: Sequence[int]) -> Iterator[tuple[Tensor, int, int, int]]:
        """Slab, place in it, block and count of each stretch that is one piece of memory on both sides."""
        for slot, block_id, count in runs_of_pairs(zip(slots, ids, strict=True), self._per_slab):
            slab, place = self._place(slot)
            yield slab, place, block_id, count


def runs_of_pairs(pairs: Iterable[tuple[int, int]], per_slab: int) -> Iterator[tuple[int, int, int]]:
    """Joins pairs whose numbers both go up by one, but not over a multiple of `per_slab` of the first number."""
    start: tuple[int, int] | None = None
    count = 0
    for slot, block_id in pairs:
        if start is not None and (slot, block_id) == (start[0] + count, start[1] + count) and slot % per_slab:
            count += 1
            continue
        if start is not None:
            yield (*start, count)
        start, count = (slot, block_id), 1
    if start is not None:
        yield (*start, count)
