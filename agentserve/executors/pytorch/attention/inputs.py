"""What a batch needs on the device beside weights and pages, in one piece of memory that takes one copy.

Rows of single tokens come first, then those of longer chunks:

    int64   token_ids[num_rows]  positions[num_rows]  slots[num_rows]  sources[num_singles]
    int32   kv_lengths[num_sequences]  query_starts[num_chunks + 1]  block_tables[num_sequences, width]

A slot is the place of a token in the pool, `block * block_size + offset`; -1 is a row of padding. A source is a place
among the tokens that the lane's last batch sampled; -1: the token is in `token_ids`. Every array starts at a multiple
of 16 bytes, because Triton compiles a kernel again for a pointer that does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_ALIGNMENT = 16
Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class InputSizes:
    """How large the arrays are."""

    num_singles: int
    """Sequences of which one token is computed, one row each; padding counts."""
    num_chunks: int
    """Sequences of which more tokens are computed."""
    num_chunk_rows: int
    """Tokens of those."""
    width: int
    """Blocks in a row of the block table."""

    @property
    def num_rows(self) -> int:
        return self.num_singles + self.num_chunk_rows

    @property
    def num_sequences(self) -> int:
        return self.num_singles + self.num_chunks

    def lengths(self) -> tuple[tuple[int, int], ...]:
        """(item size, number of items) of the arrays, in their order."""
        rows, sequences = self.num_rows, self.num_sequences
        return (
            (8, rows),
            (8, rows),
            (8, rows),
            (8, self.num_singles),
            (4, sequences),
            (4, self.num_chunks + 1),
            (4, sequences * self.width),
        )

    def offsets(self) -> tuple[int, ...]:
        """Where the arrays start, and at the end where the last one ends, in bytes."""
        offsets = [0]
        for size, count in self.lengths():
            offsets.append(-(-(offsets[-1] + size * count) // _ALIGNMENT) * _ALIGNMENT)
        return tuple(offsets)

    @property
    def num_bytes(self) -> int:
        return self.offsets()[-1]


class HostInputs:
    """The arrays in host memory, to be filled."""

    __slots__ = ("block_tables", "buffer", "kv_lengths", "positions", "query_starts", "slots", "sources", "token_ids")

    def __init__(self, buffer: Tensor, sizes: InputSizes) -> None:
        """`buffer`: uint8, at least `sizes.num_bytes` of them."""
        self.buffer = buffer[: sizes.num_bytes]
        memory = self.buffer.numpy()
        views = [
            memory[offset : offset + size * count]
            for (size, count), offset in zip(sizes.lengths(), sizes.offsets(), strict=False)
        ]
        self.token_ids: Int64s = views[0].view(np.int64)
        self.positions: Int64s = views[1].view(np.int64)
        self.slots: Int64s = views[2].view(np.int64)
        self.sources: Int64s = views[3].view(np.int64)
        self.kv_lengths: Int32s = views[4].view(np.int32)
        self.query_starts: Int32s = views[5].view(np.int32)
        self.block_tables: Int32s = views[6].view(np.int32).reshape(sizes.num_sequences, sizes.width)


class DeviceInputs:
    """The arrays in device memory, to be computed with."""

    __slots__ = ("block_tables", "buffer", "kv_lengths", "positions", "query_starts", "slots", "sources", "token_ids")

    def __init__(self, buffer: Tensor, sizes: InputSizes) -> None:
        """`buffer`: uint8, at least `sizes.num_bytes` of them."""
        self.buffer = buffer[: sizes.num_bytes]
        views = []
        for (size, count), offset in zip(sizes.lengths(), sizes.offsets(), strict=False):
            dtype = torch.int64 if size == 8 else torch.int32
            views.append(self.buffer[offset : offset + size * count].view(dtype))
        self.token_ids, self.positions, self.slots, self.sources, self.kv_lengths, self.query_starts = views[:6]
        self.block_tables = views[6].view(sizes.num_sequences, sizes.width)
