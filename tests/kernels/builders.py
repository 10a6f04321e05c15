"""Random paged caches and batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agentserve_kernels.attention import DecodeScratch


@dataclass
class Cache:
    """One layer of a pool, and sequences in it."""

    pool: Tensor
    k_pages: Tensor
    v_pages: Tensor
    kv_lengths: Tensor
    block_tables: Tensor


def make_cache(
    lengths: Sequence[int],
    *,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    max_blocks: int | None = None,
    seed: int = 0,
) -> Cache:
    """Sequences of `lengths` in random blocks of the middle layer of three. What no sequence owns is NaN."""
    random = torch.Generator().manual_seed(seed)
    counts = [-(-length // block_size) for length in lengths]
    num_blocks = sum(counts) + 2
    pool = torch.full((num_blocks, 3, 2, num_kv_heads, block_size, head_dim), torch.nan, dtype=dtype, device=device)
    order = torch.randperm(num_blocks, generator=random).tolist()
    width = max([1, *counts]) if max_blocks is None else max_blocks
    # An id that is never to be used points far outside.
    tables = torch.full((len(lengths), width), 1 << 30, dtype=torch.int32)
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        ids = [order.pop() for _ in range(count)]
        tables[row, :count] = torch.tensor(ids, dtype=torch.int32)
        values = torch.randn((2, num_kv_heads, count * block_size, head_dim), generator=random).to(dtype)
        values[:, :, length:] = torch.nan
        blocks = values.unflatten(2, (count, block_size)).permute(2, 0, 1, 3, 4)
        if count:
            pool[ids, 1] = blocks.to(device)
    kv_lengths = torch.tensor(lengths, dtype=torch.int32)
    return Cache(pool, pool[:, 1, 0], pool[:, 1, 1], kv_lengths.to(device), tables.to(device))


def randn(shape: Sequence[int], dtype: torch.dtype, device: torch.device, seed: int = 1) -> Tensor:
    """Normal numbers."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def make_scratch(num_rows: int, head_dim: int, device: torch.device) -> DecodeScratch:
    """A workspace full of NaN: what is read without having been written shows."""
    scratch = DecodeScratch(num_rows, head_dim, device=device)
    scratch.partial.fill_(torch.nan)
    scratch.lse.fill_(torch.nan)
    return scratch


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Equal up to the rounding of `dtype`."""
    tolerance = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)
