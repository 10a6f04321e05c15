"""Norms, activation, and rotary embedding with the write into pages."""

from __future__ import annotations

import pytest
import torch

from agentserve.models.layers import rotate
from agentserve_kernels import reference
from agentserve_kernels.checks import KernelArgumentError
from agentserve_kernels.elementwise import add_rms_norm, rms_norm, silu_mul
from agentserve_kernels.rope import rope_and_write
from tests.kernels.builders import assert_near, make_cache, randn

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 576, 1000])
def test_rms_norm(device: torch.device, width: int, dtype: torch.dtype) -> None:
    x = randn((5, width), dtype, device) * 3
    weight = randn((width,), dtype, device, seed=2)
    out = torch.empty_like(x)
    rms_norm(x, weight, 1e-5, out)
    assert_near(out, reference.rms_norm(x, weight, 1e-5), dtype)
    # In place, on rows that are not packed.
    wide = torch.full((5, width + 8), torch.nan, dtype=dtype, device=device)
    rows = wide[:, :width]
    rows.copy_(x)
    rms_norm(rows, weight, 1e-5, rows)
    assert torch.equal(rows, out)
    assert wide[:, width:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm(device: torch.device, dtype: torch.dtype) -> None:
    x, residual = randn((3, 96), dtype, device), randn((3, 96), dtype, device, seed=2)
    weight = randn((96,), dtype, device, seed=3)
    expected, total = reference.add_rms_norm(x, residual, weight, 1e-6)
    out, kept, summed = torch.empty_like(x), x.clone(), residual.clone()
    add_rms_norm(x, summed, weight, 1e-6, out)
    assert torch.equal(summed, total)
    assert torch.equal(x, kept)
    assert_near(out, expected, dtype)
    add_rms_norm(x, residual, weight, 1e-6)  # into x
    assert torch.equal(x, out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [40, 1536])
def test_silu_mul(device: torch.device, width: int, dtype: torch.dtype) -> None:
    gate_up = randn((3, 2 * width), dtype, device) * 4
    out = torch.empty((3, width), dtype=dtype, device=device)
    silu_mul(gate_up, out)
    assert_near(out, reference.silu_mul(gate_up), dtype)


def test_nothing_to_do(device: torch.device) -> None:
    empty, weight = torch.empty((0, 8), device=device), torch.ones(8, device=device)
    rms_norm(empty, weight, 1e-5, empty)
    silu_mul(torch.empty((0, 16), device=device), empty)


def test_wrong_arguments_are_refused(device: torch.device) -> None:
    x, weight = torch.zeros((2, 8), device=device), torch.ones(8, device=device)
    with pytest.raises(KernelArgumentError, match=r"weight has shape \[7\], expected \[8\]"):
        rms_norm(x, weight[:7], 1e-5, x)
    with pytest.raises(KernelArgumentError, match=r"residual is torch\.float16"):
        add_rms_norm(x, x.half(), weight, 1e-5)
    with pytest.raises(KernelArgumentError, match="last 1 axes must be contiguous"):
        rms_norm(x.T.contiguous().T, weight, 1e-5, x)
    with pytest.raises(KernelArgumentError, match=r"gate_up has shape \[2, 8\], expected \[2, 16\]"):
        silu_mul(x, x)
    with pytest.raises(KernelArgumentError, match="expected at most 32768"):
        wide = torch.zeros((1, 40000), device=device)
        rms_norm(wide, wide[0], 1e-5, wide)


@pytest.mark.parametrize("has_norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "block_size", "dtype"),
    [
        (9, 3, 64, 16, torch.float32),
        (7, 1, 80, 8, torch.bfloat16),
        (2, 2, 96, 32, torch.float32),
        (3, 1, 128, 16, torch.float16),
        (4, 2, 256, 8, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("has_positions", [False, True], ids=["rows", "table"])
def test_rope_and_write(
    device: torch.device, num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype,
    has_norm: bool, has_positions: bool,
) -> None:  # fmt: skip
    shape = {"num_kv_heads": num_kv_heads, "head_dim": head_dim, "block_size": block_size}
    cache = make_cache([3 * block_size], **shape, dtype=dtype, device=device)
    copy = cache.pool.clone()
    # First and last place of a block, padding, the last block of the pool.
    last = cache.pool.shape[0] * block_size - 1
    slots = torch.tensor([0, block_size - 1, -1, block_size + 3, last], device=device)
    num_tokens = len(slots)
    qkv = randn((num_tokens, (num_heads + 2 * num_kv_heads) * head_dim), dtype, device)
    num_rows = 50 if has_positions else num_tokens
    angles = torch.outer(torch.arange(num_rows), 0.1 + torch.arange(head_dim // 2) / head_dim)
    options = {"positions": torch.tensor([7, 0, 49, 3, 3], device=device) if has_positions else None}
    if has_norm:
        options |= {"q_weight": randn((head_dim,), dtype, device, 5), "k_weight": randn((head_dim,), dtype, device, 6)}
    tables = (angles.cos().to(device), angles.sin().to(device))
    out = torch.full((num_tokens, num_heads, head_dim), torch.nan, dtype=dtype, device=device)
    expected = torch.empty_like(out)
    rope_and_write(qkv, *tables, cache.k_pages, cache.v_pages, slots, out, **options, eps=1e-6)
    reference.rope_and_write(qkv, *tables, copy[:, 1, 0], copy[:, 1, 1], slots, expected, **options, eps=1e-6)
    assert_near(out, expected, dtype)
    # What was not written is still NaN, in both.
    assert torch.equal(cache.pool.isnan(), copy.isnan())
    assert_near(cache.pool.nan_to_num(), copy.nan_to_num(), dtype)


def test_the_convention_is_that_of_the_models(device: torch.device) -> None:
    heads = randn((4, 3, 64), torch.float32, device)
    angles = torch.rand((4, 32), device=device) * 6
    cos, sin = angles.cos(), angles.sin()
    both = (torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None])
    assert_near(reference.rotate(heads, cos, sin), rotate(heads, both), torch.float32)


def test_rope_refuses_wrong_arguments(device: torch.device) -> None:
    cache = make_cache([8], num_kv_heads=1, head_dim=64, block_size=8, dtype=torch.float32, device=device)
    qkv, table = torch.zeros((2, 4 * 64), device=device), torch.zeros((2, 32), device=device)
    out, slots = torch.zeros((2, 2, 64), device=device), torch.zeros(2, dtype=torch.int64, device=device)
    pages = (cache.k_pages, cache.v_pages)
    with pytest.raises(KernelArgumentError, match=r"qkv has shape \[2, 192\], expected \[2, 256\]"):
        rope_and_write(qkv[:, :192], table, table, *pages, slots, out)
    with pytest.raises(KernelArgumentError, match=r"cos has shape \[1, 32\], expected \[2, 32\]"):
        rope_and_write(qkv, table[:1], table, *pages, slots, out)
    with pytest.raises(KernelArgumentError, match="q_weight and k_weight go together"):
        rope_and_write(qkv, table, table, *pages, slots, out, q_weight=table[0].repeat(2))
    with pytest.raises(KernelArgumentError, match=r"slots is torch\.int32"):
        rope_and_write(qkv, table, table, *pages, slots.int(), out)
