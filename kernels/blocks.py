"""Whole blocks between the pool and contiguous staging memory, for moves between tiers.

The seam is `pages` of the executor's `PagedPool`, one piece of memory a block, and memory of `Device.host_empty`, which
kernels of a GPU reach. One launch moves any number of scattered blocks where copies would be one for each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from agentserve_kernels.checks import check_tensor, check_units, require
from agentserve_kernels.tuning import cdiv

_TILE = 2048
"""Words of 8 bytes that a program copies at once."""

_CTAS_PER_UNIT = 4


@triton.jit(do_not_specialize=["num_tiles"])
def _copy_kernel(source, target, block_ids, num_tiles, num_words, gathers: tl.constexpr, tile: tl.constexpr):
    """Copies blocks of `num_words` words: `target[i] = source[ids[i]]`, or the other way round."""
    columns = tl.arange(0, tile)
    tiles_per_block = tl.cdiv(num_words, tile)
    for index in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        item = index // tiles_per_block
        block = tl.load(block_ids + item).to(tl.int64)
        words = (index % tiles_per_block).to(tl.int64) * tile + columns
        # A negative id is padding.
        inside = words < tl.where(block >= 0, num_words, 0)
        in_pool = block * num_words + words
        in_staging = item.to(tl.int64) * num_words + words
        if gathers:
            tl.store(target + in_staging, tl.load(source + in_pool, mask=inside), mask=inside)
        else:
            tl.store(target + in_pool, tl.load(source + in_staging, mask=inside), mask=inside)


def gather_blocks(pool: Tensor, block_ids: Tensor, out: Tensor, *, num_units: int) -> None:
    """`out[i] = pool[block_ids[i]]`; rows of negative ids are left alone.

    pool            [num_blocks, ...] contiguous, a multiple of 8 bytes a block
    block_ids       [n] int32 on the pool's device
    out             [n, ...] contiguous, on the same device or in pinned host memory

    `num_units` bounds the multiprocessors that copy: few are enough for a move over PCIe. Raises KernelArgumentError.
    """
    _launch(pool, out, pool, block_ids, out, num_units, gathers=True)


def scatter_blocks(source: Tensor, block_ids: Tensor, pool: Tensor, *, num_units: int) -> None:
    """`pool[block_ids[i]] = source[i]`; the ids must differ. Shapes as for `gather_blocks`.

    Raises KernelArgumentError.
    """
    _launch(source, pool, pool, block_ids, source, num_units, gathers=False)


def _launch(
    source: Tensor, target: Tensor, pool: Tensor, block_ids: Tensor, staging: Tensor, num_units: int, *, gathers: bool
) -> None:
    check_units(num_units)
    require(pool.ndim >= 1 and staging.ndim >= 1, "blocks need an axis to count them")
    check_tensor("block_ids", block_ids, (staging.shape[0],), (torch.int32,), pool.device)
    require(pool.shape[1:] == staging.shape[1:] and pool.dtype == staging.dtype, "blocks of pool and staging differ")
    require(pool.is_contiguous() and staging.is_contiguous(), "pool and staging must be contiguous")
    reachable = staging.device == pool.device or (pool.is_cuda and staging.is_pinned())
    require(reachable, f"staging on {staging.device} cannot be reached from {pool.device}: pinned memory can")
    if staging.shape[0] == 0 or pool.numel() == 0:
        return
    num_bytes = pool[0].numel() * pool.element_size()
    require(num_bytes % 8 == 0, f"a block has {num_bytes} bytes, expected a multiple of 8")
    num_words = num_bytes // 8
    num_tiles = staging.shape[0] * cdiv(num_words, _TILE)
    _copy_kernel[(min(num_tiles, num_units * _CTAS_PER_UNIT),)](
        source.view(-1).view(torch.int64),
        target.view(-1).view(torch.int64),
        block_ids,
        num_tiles,
        num_words,
        gathers=gathers,
        tile=_TILE,
        num_warps=8,
    )
