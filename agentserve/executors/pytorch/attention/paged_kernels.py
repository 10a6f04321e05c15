"""Attention over block tables: what kernels must offer, and the reference in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from agentserve.executors.pytorch.attention.inputs import Int32s
from agentserve.models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """The sizes of an attention layer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype

    @classmethod
    def of(cls, config: ModelConfig, block_size: int, dtype: torch.dtype) -> AttentionShape:
        return cls(config.num_heads, config.num_kv_heads, config.head_dim, block_size, dtype)

    @property
    def scale(self) -> float:
        """What products of queries and keys are multiplied with."""
        return float(self.head_dim**-0.5)


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """A batch as the host knows it. Single tokens first, then longer chunks."""

    num_units: int
    """Compute units of the slot."""
    num_singles: int
    """Rows of single tokens without padding."""
    bucket: int
    """Rows of single tokens with padding."""
    query_lengths: Sequence[int]
    """Tokens that are computed, by sequence; padding is not listed."""
    kv_lengths: Sequence[int]
    """Tokens that are there, those included."""
    tables: Sequence[Int32s]
    """Block ids."""
    is_static: bool
    """Whether the forward pass may be captured, and what was captured of another batch of this bucket be replayed."""


Pages: TypeAlias = tuple[Tensor, Tensor]
"""Keys and values of a layer, each `[num_blocks, num_kv_heads, block_size, head_dim]` with any first stride."""


@dataclass(frozen=True, slots=True)
class SingleRows:
    """Sequences of which one token is computed, on the device."""

    kv_lengths: Tensor
    """`[s]` int32; 0 is a row of padding."""
    block_tables: Tensor
    """`[s, width]` int32"""


@dataclass(frozen=True, slots=True)
class ChunkRows:
    """Sequences of which more tokens are computed, on the device."""

    query_starts: Tensor
    """`[s + 1]` int32: the rows of sequence i are `query_starts[i] .. query_starts[i + 1]`."""
    kv_lengths: Tensor
    """`[s]` int32, chunks included."""
    block_tables: Tensor
    """`[s, width]` int32"""


class PagedKernels(Protocol):
    """Kernels with planner and workspaces: one object for each lane, since two lanes run at once.

    Keys and values of the batch are in their pages already. `query` and `out` are `[n, num_heads, head_dim]`; what
    becomes of `out` in rows of padding does not matter, as long as nothing fails.
    """

    name: str
    capturable: bool
    """Whether `decode` may be captured in a graph."""

    def plan(self, batch: BatchPlan) -> None:
        """On the host, before the forward pass of every batch."""
        ...

    def decode(self, query: Tensor, pages: Pages, out: Tensor, rows: SingleRows) -> None:
        """One token a sequence."""
        ...

    def prefill(self, query: Tensor, pages: Pages, out: Tensor, rows: ChunkRows) -> None:
        """Chunks; causal."""
        ...


def page_lists(tables: Sequence[Int32s], kv_lengths: Sequence[int], block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tables of blocks one after the other, as FlashInfer wants them.

    Returns three int32 tensors in host memory: where the blocks of each sequence start `[s + 1]`, the blocks, and how
    many tokens the last block of each sequence holds `[s]`. Blocks beyond a sequence's length are left out.
    """
    counts = [-(-length // block_size) for length in kv_lengths]
    starts = np.zeros(len(counts) + 1, dtype=np.int32)
    np.cumsum(counts, out=starts[1:])
    indices = np.concatenate([table[:count] for table, count in zip(tables, counts, strict=True)])
    last = np.array(kv_lengths, dtype=np.int32) - (np.array(counts, dtype=np.int32) - 1) * block_size
    return torch.from_numpy(starts), torch.from_numpy(indices), torch.from_numpy(last)


class TorchKernels:
    """The reference: gathers the blocks of each sequence and calls torch's attention.

    Runs anywhere and is slow: it reads lengths and tables back from the device, so nothing of it can be captured.
    """

    name = "torch"
    capturable = False

    def __init__(self, shape: AttentionShape) -> None:
        self._scale = shape.scale

    def plan(self, batch: BatchPlan) -> None:
        """See `PagedKernels.plan`: there is nothing to plan."""

    def decode(self, query: Tensor, pages: Pages, out: Tensor, rows: SingleRows) -> None:
        """See `PagedKernels.decode`."""
        for row, length in enumerate(rows.kv_lengths.tolist()):
            if length == 0:
                out[row].zero_()
                continue
            keys, values = self._gather(pages, rows.block_tables[row], length)
            # The heads that share keys stand in the place of query positions: see `SdpaAttention`.
            grouped = query[row].reshape(1, keys.shape[1], -1, query.shape[-1])
            attended = functional.scaled_dot_product_attention(grouped, keys, values, scale=self._scale)
            out[row] = attended.view(out.shape[1:])

    def prefill(self, query: Tensor, pages: Pages, out: Tensor, rows: ChunkRows) -> None:
        """See `PagedKernels.prefill`."""
        starts = rows.query_starts.tolist()
        for index, length in enumerate(rows.kv_lengths.tolist()):
            start, end = starts[index], starts[index + 1]
            keys, values = self._gather(pages, rows.block_tables[index], length)
            mask = torch.ones(end - start, length, dtype=torch.bool, device=query.device).tril_(length - (end - start))
            attended = functional.scaled_dot_product_attention(
                query[start:end].transpose(0, 1).unsqueeze(0),
                keys,
                values,
                attn_mask=mask,
                enable_gqa=True,
                scale=self._scale,
            )
            out[start:end] = attended[0].transpose(0, 1)

    @staticmethod
    def _gather(pages: Pages, table: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one sequence, each `[1, num_kv_heads, length, head_dim]`."""
        block_ids = table[: -(-length // pages[0].shape[2])].long()
        keys, values = (part[block_ids].transpose(0, 1).flatten(1, 2)[None, :, :length] for part in pages)
        return keys, values
