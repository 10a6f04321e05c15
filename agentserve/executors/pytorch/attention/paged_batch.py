"""One batch over the blocks of the pool: its attention and its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from agentserve.executors.pytorch.attention.inputs import DeviceInputs
from agentserve.executors.pytorch.attention.paged_kernels import ChunkRows, PagedKernels, Pages, SingleRows
from agentserve.executors.pytorch.paged_pool import PagedPool
from agentserve.models.interface import FusedOperations, HeadNormWeights, ProjectedAttention, RotaryTables


class FusedKernels(FusedOperations, Protocol):
    """The operations between the matrix products, and the one that knows pages."""

    def write_rotated(
        self,
        projected: Tensor,
        rotary: RotaryTables,
        head_norm: HeadNormWeights | None,
        *,
        pages: Pages,
        slots: Tensor,
        query: Tensor,
    ) -> None:
        """Norms and rotates queries and keys, and writes keys and values into their pages, in one kernel.

        For the first three see `ProjectedAttention`; `query` `[num_tokens, num_heads, head_dim]` is filled.
        """
        ...


class PagedAttention:
    """Implements `models.interface.Attention` for one batch."""

    def __init__(self, pool: PagedPool, kernels: PagedKernels, inputs: DeviceInputs, num_singles: int) -> None:
        """`num_singles` counts padding."""
        self._kernels = kernels
        self._slots = inputs.slots
        self._num_singles = num_singles
        self._pages = pool.pages_by_layer
        self._block_size = pool.block_size
        lengths, tables = inputs.kv_lengths, inputs.block_tables
        self._singles = SingleRows(lengths[:num_singles], tables[:num_singles])
        self._chunks = ChunkRows(inputs.query_starts, lengths[num_singles:], tables[num_singles:])
        self._places: tuple[Tensor, Tensor] | None = None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `models.interface.Attention.attend`."""
        if layer == 0:
            # Part of the forward pass, so that a captured one computes it again.
            blocks = torch.div(self._slots, self._block_size, rounding_mode="floor")
            self._places = blocks, torch.remainder(self._slots, self._block_size)
        assert self._places is not None
        blocks, offsets = self._places
        pages = self._pages[layer]
        for part, new in zip(pages, (key, value), strict=True):
            part[blocks, :, offsets] = new
        return self._attend(query, pages)

    def _attend(self, query: Tensor, pages: Pages) -> Tensor:
        """`query` `[num_tokens, num_heads, head_dim]` -> `[num_tokens, num_heads * head_dim]`; keys are written."""
        num_tokens, singles = query.shape[0], self._num_singles
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        if singles:
            self._kernels.decode(query[:singles], pages, out[:singles], self._singles)
        if singles < num_tokens:
            self._kernels.prefill(query[singles:], pages, out[singles:], self._chunks)
        return out.view(num_tokens, -1)


class FusedPagedAttention(PagedAttention, ProjectedAttention):
    """A `PagedAttention` that rotates and writes in one kernel, and brings the others along."""

    def __init__(
        self,
        pool: PagedPool,
        kernels: PagedKernels,
        inputs: DeviceInputs,
        num_singles: int,
        *,
        fused: FusedKernels,
    ) -> None:
        super().__init__(pool, kernels, inputs, num_singles)
        self.operations = self._fused = fused

    def attend_projected(
        self, layer: int, projected: Tensor, rotary: RotaryTables, head_norm: HeadNormWeights | None
    ) -> Tensor:
        """See `ProjectedAttention.attend_projected`."""
        pages = self._pages[layer]
        _, num_kv_heads, _, head_dim = pages[0].shape
        query = projected.new_empty((projected.shape[0], projected.shape[1] // head_dim - 2 * num_kv_heads, head_dim))
        self._fused.write_rotated(projected, rotary, head_norm, pages=pages, slots=self._slots, query=query)
        return self._attend(query, pages)


class PagedBatch:
    """Implements `OpenBatch`: single tokens first, with padding behind them if it is a decode step."""

    def __init__(
        self,
        attention: PagedAttention,
        inputs: DeviceInputs,
        num_rows: int,
        *,
        substitutes: bool,
        is_static: bool = False,
    ) -> None:
        """`substitutes`: whether tokens may be pending; always so for what may be captured."""
        self.attention = attention
        self.num_rows = num_rows
        self.last_rows: Sequence[int] = ()
        self.is_static = is_static
        self._inputs = inputs
        self._substitutes = substitutes

    def inputs(self, carried: Tensor) -> tuple[Tensor, Tensor]:
        """See `OpenBatch.inputs`."""
        inputs = self._inputs
        if not self._substitutes:
            return inputs.token_ids, inputs.positions
        sources = inputs.sources
        singles = inputs.token_ids[: len(sources)]
        tokens = torch.where(sources >= 0, carried[sources.clamp(min=0)], singles)
        if len(tokens) < self.num_rows:
            tokens = torch.cat([tokens, inputs.token_ids[len(tokens) :]])
        return tokens, inputs.positions

    def finish(self) -> None:
        """See `OpenBatch.finish`: keys and values are in their blocks since they were computed."""

    def close(self) -> None:
        """See `OpenBatch.close`: what the batch took is freed with it."""
