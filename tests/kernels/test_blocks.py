"""Whole blocks to and from staging memory."""

from __future__ import annotations

import pytest
import torch

from agentserve_kernels.blocks import gather_blocks, scatter_blocks
from agentserve_kernels.checks import KernelArgumentError


def make_pool(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Six blocks of 3 * 2 * 2 * 8 * 80 numbers, all different bits up to what the dtype can tell apart."""
    return torch.arange(6 * 3 * 2 * 2 * 8 * 80, device=device).view(6, 3, 2, 2, 8, 80).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_units", [1, 100])
def test_blocks_come_back(device: torch.device, dtype: torch.dtype, num_units: int) -> None:
    pool = make_pool(device, dtype)
    original = pool.clone()
    ids = torch.tensor([4, 0, -1, 5], dtype=torch.int32, device=device)
    staging = torch.full((4, *pool.shape[1:]), torch.nan, dtype=dtype, device=device)
    gather_blocks(pool, ids, staging, num_units=num_units)
    assert torch.equal(staging[[0, 1, 3]], original[[4, 0, 5]])
    assert staging[2].isnan().all()  # padding
    target = torch.tensor([1, 2, -1, 0], dtype=torch.int32, device=device)
    scatter_blocks(staging, target, pool, num_units=num_units)
    assert torch.equal(pool, original[[5, 4, 0, 3, 4, 5]])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_blocks_to_pinned_memory_and_back() -> None:
    pool = make_pool(torch.device("cuda"))
    original = pool.clone()
    staging = torch.empty((2, *pool.shape[1:]), dtype=pool.dtype, pin_memory=True)
    ids = torch.tensor([3, 1], dtype=torch.int32, device="cuda")
    gather_blocks(pool, ids, staging, num_units=2)
    torch.cuda.synchronize()
    assert torch.equal(staging, original[[3, 1]].cpu())
    scatter_blocks(staging, ids.flip(0), pool, num_units=2)
    torch.cuda.synchronize()
    assert torch.equal(pool[[1, 3]], original[[3, 1]])


def test_nothing_to_copy(device: torch.device) -> None:
    pool = make_pool(device)
    gather_blocks(pool, torch.empty(0, dtype=torch.int32, device=device), pool[:0], num_units=1)


def test_wrong_arguments_are_refused(device: torch.device) -> None:
    pool, ids = make_pool(device), torch.zeros(2, dtype=torch.int32, device=device)
    with pytest.raises(KernelArgumentError, match="blocks of pool and staging differ"):
        gather_blocks(pool, ids, pool[:2, 0], num_units=1)
    with pytest.raises(KernelArgumentError, match="blocks of pool and staging differ"):
        gather_blocks(pool, ids, pool[:2].float(), num_units=1)
    with pytest.raises(KernelArgumentError, match="must be contiguous"):
        gather_blocks(pool.transpose(1, 2), ids, pool[:2].transpose(1, 2), num_units=1)
    with pytest.raises(KernelArgumentError, match=r"block_ids has shape \[2\], expected \[3\]"):
        scatter_blocks(pool[:3], ids, pool, num_units=1)
    with pytest.raises(KernelArgumentError, match="num_units is 0"):
        scatter_blocks(pool[:2], ids, pool, num_units=0)
    with pytest.raises(KernelArgumentError, match="a block has 6 bytes"):
        odd = torch.zeros((4, 3), dtype=torch.bfloat16, device=device)
        gather_blocks(odd, ids, odd[:2], num_units=1)
