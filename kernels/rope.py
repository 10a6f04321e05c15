"""Rotary embedding, with the norms of heads before it and the write into pages after it, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from agentserve_kernels.checks import FLOAT_DTYPES, check_pages, check_tensor, require
from agentserve_kernels.tuning import next_power_of_two

_HEADS_PER_PROGRAM = 4
"""Few, so that a decode step of one token still spreads over the device."""


@triton.jit
def _rope_kernel(
    qkv,
    cos,
    sin,
    positions,
    q_weight,
    k_weight,
    query_out,
    k_pages,
    v_pages,
    slots,
    eps,
    stride_qkv,
    stride_cos,
    stride_query,
    stride_block,
    stride_head,
    has_positions: tl.constexpr,
    has_norm: tl.constexpr,
    num_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    padded_half: tl.constexpr,
    block_size: tl.constexpr,
    tile_heads: tl.constexpr,
):
    """Programs `(token, heads)`. Query, key and value heads lie side by side; a program may see all three kinds."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * tile_heads + tl.arange(0, tile_heads)
    half = tl.arange(0, padded_half)
    half_dim: tl.constexpr = head_dim // 2
    in_half = half < half_dim
    present = (heads < num_heads + 2 * num_kv_heads)[:, None] & in_half[None, :]
    is_query = heads < num_heads
    is_value = heads >= num_heads + num_kv_heads

    pointers = qkv + token * stride_qkv + heads[:, None] * head_dim + half[None, :]
    low = tl.load(pointers, mask=present, other=0.0).to(tl.float32)
    high = tl.load(pointers + half_dim, mask=present, other=0.0).to(tl.float32)
    new_low = low
    new_high = high
    if has_norm:
        scale = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / head_dim + eps)[:, None]
        q_low = tl.load(q_weight + half, mask=in_half, other=0.0).to(tl.float32)
        q_high = tl.load(q_weight + half_dim + half, mask=in_half, other=0.0).to(tl.float32)
        k_low = tl.load(k_weight + half, mask=in_half, other=0.0).to(tl.float32)
        k_high = tl.load(k_weight + half_dim + half, mask=in_half, other=0.0).to(tl.float32)
        new_low = low * scale * tl.where(is_query[:, None], q_low[None, :], k_low[None, :])
        new_high = high * scale * tl.where(is_query[:, None], q_high[None, :], k_high[None, :])
    row = token
    if has_positions:
        row = tl.load(positions + token)
    c = tl.load(cos + row * stride_cos + half, mask=in_half, other=0.0)[None, :]
    s = tl.load(sin + row * stride_cos + half, mask=in_half, other=0.0)[None, :]
    turned_low = tl.where(is_value[:, None], low, new_low * c - new_high * s)
    turned_high = tl.where(is_value[:, None], high, new_high * c + new_low * s)

    dtype = query_out.dtype.element_ty
    query_pointers = query_out + token * stride_query + heads[:, None] * head_dim + half[None, :]
    tl.store(query_pointers, turned_low.to(dtype), mask=present & is_query[:, None])
    tl.store(query_pointers + half_dim, turned_high.to(dtype), mask=present & is_query[:, None])
    slot = tl.load(slots + token)
    if slot >= 0:
        place = (slot // block_size) * stride_block + (slot % block_size) * head_dim
        kv_heads = (heads - num_heads - tl.where(is_value, num_kv_heads, 0)).to(tl.int64)
        offsets = place + kv_heads[:, None] * stride_head + half[None, :]
        is_key = (heads >= num_heads) & (heads < num_heads + num_kv_heads)
        tl.store(k_pages + offsets, turned_low.to(dtype), mask=present & is_key[:, None])
        tl.store(k_pages + offsets + half_dim, turned_high.to(dtype), mask=present & is_key[:, None])
        tl.store(v_pages + offsets, turned_low.to(dtype), mask=present & is_value[:, None])
        tl.store(v_pages + offsets + half_dim, turned_high.to(dtype), mask=present & is_value[:, None])


def rope_and_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    query_out: Tensor,
    *,
    positions: Tensor | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Norms (if there are weights) and rotates queries and keys; writes keys and values into their pages.

    qkv             [n, (num_heads + 2 * num_kv_heads) * head_dim], any stride in axis 0
    cos, sin        [n, head_dim / 2] float32; with `positions` [n] int64: tables `[max_positions, head_dim / 2]`
    k_pages         [num_blocks, num_kv_heads, block_size, head_dim], any stride in axis 0; v_pages likewise
    slots           [n] int64: block * block_size + offset; negative: padding, of which no key or value is written
    query_out       [n, num_heads, head_dim]
    q_weight        [head_dim], with k_weight: RMSNorm of each head before the rotation (Qwen3); `eps` belongs to it

    The halves of a head are the two coordinates: `(x1 cos - x2 sin, x2 cos + x1 sin)`. Everything is computed in
    float32 and rounded once. Raises KernelArgumentError.
    """
    num_tokens, num_heads, head_dim = query_out.shape
    device, dtype = qkv.device, qkv.dtype
    check_pages(k_pages, v_pages, num_heads=num_heads, head_dim=head_dim)
    num_kv_heads, block_size = k_pages.shape[1], k_pages.shape[2]
    num_all = num_heads + 2 * num_kv_heads
    check_tensor("qkv", qkv, (num_tokens, num_all * head_dim), (k_pages.dtype,), k_pages.device)
    check_tensor("query_out", query_out, (num_tokens, num_heads, head_dim), (dtype,), device, num_packed=2)
    num_angles = num_tokens if positions is None else None
    for name, table in (("cos", cos), ("sin", sin)):
        check_tensor(name, table, (num_angles, head_dim // 2), (torch.float32,), device)
    require(cos.shape == sin.shape and cos.stride() == sin.stride(), "cos and sin differ in shape or strides")
    check_tensor("slots", slots, (num_tokens,), (torch.int64,), device)
    if positions is not None:
        check_tensor("positions", positions, (num_tokens,), (torch.int64,), device)
    require((q_weight is None) == (k_weight is None), "q_weight and k_weight go together")
    if q_weight is not None and k_weight is not None:
        check_tensor("q_weight", q_weight, (head_dim,), FLOAT_DTYPES, device)
        check_tensor("k_weight", k_weight, (head_dim,), (q_weight.dtype,), device)
    if num_tokens == 0:
        return
    _rope_kernel[(num_tokens, -(-num_all // _HEADS_PER_PROGRAM))](
        qkv,
        cos,
        sin,
        slots if positions is None else positions,
        cos if q_weight is None else q_weight,
        cos if k_weight is None else k_weight,
        query_out,
        k_pages,
        v_pages,
        slots,
        eps,
        qkv.stride(0),
        cos.stride(0),
        query_out.stride(0),
        k_pages.stride(0),
        k_pages.stride(1),
        has_positions=positions is not None,
        has_norm=q_weight is not None,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        padded_half=next_power_of_two(head_dim // 2),
        block_size=block_size,
        tile_heads=_HEADS_PER_PROGRAM,
        num_warps=1 if head_dim <= 128 else 2,
    )
