"""Attention of one new token a sequence over its paged context (Flash-Decoding)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from agentserve_kernels.attention import LOG2_E, DecodeScratch, attend, dot_precision, merge
from agentserve_kernels.checks import check_pages, check_tensor, check_units, require
from agentserve_kernels.tuning import (
    AttentionTiles,
    cdiv,
    choose_splits,
    decode_tiles,
    device_capability,
    most_splits,
    next_power_of_two,
)


@triton.jit(do_not_specialize=["num_splits", "num_rows", "stride_table"])
def _decode_kernel(
    query,
    k_pages,
    v_pages,
    out,
    partial,
    lse,
    kv_lengths,
    block_tables,
    scale_log2,
    num_splits,
    num_rows,
    stride_query,
    stride_out,
    stride_block,
    stride_head,
    stride_table,
    num_heads: tl.constexpr,
    group_size: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
    block_size: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_tokens: tl.constexpr,
    split: tl.constexpr,
    precision: tl.constexpr,
    stages: tl.constexpr,
):
    """Programs `(kv_head, sequence, piece)`. The rows are the heads that share the KV head, padded."""
    kv_head = tl.program_id(0)
    sequence = tl.program_id(1).to(tl.int64)
    piece = tl.program_id(2)
    rows = tl.arange(0, tile_rows)
    dims = tl.arange(0, padded_dim)
    heads = kv_head * group_size + rows
    present = (rows < group_size)[:, None] & (dims < head_dim)[None, :]
    columns = heads[:, None] * head_dim + dims[None, :]
    end = tl.load(kv_lengths + sequence)
    # The pieces divide the actual length: a short context in a large bucket keeps as many CTAs busy as it can.
    length = tl.cdiv(tl.cdiv(end, tile_tokens), num_splits) * tile_tokens
    start = tl.minimum(piece * length, end)
    end = tl.minimum(start + length, end)
    cells = (piece * num_rows + sequence * num_heads) + heads
    if start >= end:
        if split:
            tl.store(lse + cells, tl.full([tile_rows], float("-inf"), tl.float32), mask=rows < group_size)
        else:
            zeros = tl.zeros([tile_rows, padded_dim], out.dtype.element_ty)
            tl.store(out + sequence * stride_out + columns, zeros, mask=present)
        return
    queries = tl.load(query + sequence * stride_query + columns, mask=present, other=0.0)
    positions = tl.full([tile_rows], 0, tl.int32) + end
    middle = start + (end - start) // tile_tokens * tile_tokens
    k_base = k_pages + kv_head.to(tl.int64) * stride_head
    v_base = v_pages + kv_head.to(tl.int64) * stride_head
    table = block_tables + sequence * stride_table
    accumulated = tl.zeros([tile_rows, padded_dim], tl.float32)
    maximum = tl.full([tile_rows], float("-inf"), tl.float32)
    total = tl.zeros([tile_rows], tl.float32)
    accumulated, maximum, total = attend(
        queries, accumulated, maximum, total, positions, start, middle, k_base, v_base, table, stride_block, scale_log2,
        False, head_dim, padded_dim, block_size, tile_tokens, precision, stages,
    )  # fmt: skip
    accumulated, maximum, total = attend(
        queries, accumulated, maximum, total, positions, middle, end, k_base, v_base, table, stride_block, scale_log2,
        True, head_dim, padded_dim, block_size, tile_tokens, precision, 1,
    )  # fmt: skip
    result = accumulated / total[:, None]
    if split:
        tl.store(partial + cells[:, None] * head_dim + dims[None, :], result, mask=present)
        tl.store(lse + cells, maximum + tl.log2(total), mask=rows < group_size)
    else:
        tl.store(out + sequence * stride_out + columns, result.to(out.dtype.element_ty), mask=present)


def decode_splits(
    num_sequences: int, num_kv_heads: int, max_context: int, num_units: int, *, tile_tokens: int = 64
) -> int:
    """How many pieces each context is cut into; a function of sizes only, see `tuning.choose_splits`."""
    return choose_splits(num_sequences * num_kv_heads, cdiv(max_context, tile_tokens), num_units)


def scratch_rows(
    max_sequences: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    max_context: int,
    num_units: int,
    *,
    dtype: torch.dtype,
    capability: tuple[int, int],
) -> int:
    """Rows of a `DecodeScratch` for all batches of up to `max_sequences`, contexts up to `max_context`, and slots of up
    to `num_units` multiprocessors.
    """
    tiles = decode_tiles(capability, head_dim, dtype.itemsize, num_heads // num_kv_heads)
    context_tiles = cdiv(max_context, tiles.num_tokens)
    most = 0
    for num_sequences in range(1, max_sequences + 1):
        splits = most_splits(num_sequences * num_kv_heads, context_tiles, num_units)
        most = max(most, num_sequences * splits if splits > 1 else 0)
    return most * num_heads


def paged_decode(
    query: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    out: Tensor,
    kv_lengths: Tensor,
    block_tables: Tensor,
    scratch: DecodeScratch,
    *,
    scale: float,
    num_units: int,
    max_context: int | None = None,
    tiles: AttentionTiles | None = None,
) -> None:
    """Attention of one token a sequence; its key and value are in the pages already.

    query, out      [s, num_heads, head_dim]
    k_pages         [num_blocks, num_kv_heads, block_size, head_dim], any stride in axis 0; v_pages likewise
    kv_lengths      [s] int32, tokens in the pages including the new one; 0: a row of padding, `out` becomes 0
    block_tables    [s, max_blocks] int32; not read for rows of padding
    scratch         of the calling lane; at least `decode_splits(...) * s * num_heads` rows

    `max_context` bounds `kv_lengths` (default: what `block_tables` can hold) and with `num_units`, the multiprocessors
    that the kernel may use, decides how the contexts are split. `tiles` overrides `tuning.decode_tiles`.

    Raises KernelArgumentError.
    """
    num_sequences, num_heads, head_dim = query.shape
    device, dtype = query.device, query.dtype
    check_pages(k_pages, v_pages, num_heads=num_heads, head_dim=head_dim)
    check_tensor("query", query, (None, None, None), (k_pages.dtype,), k_pages.device, num_packed=2)
    check_tensor("out", out, (num_sequences, num_heads, head_dim), (dtype,), device, num_packed=2)
    check_tensor("kv_lengths", kv_lengths, (num_sequences,), (torch.int32,), device)
    check_tensor("block_tables", block_tables, (num_sequences, None), (torch.int32,), device)
    check_units(num_units)
    require(num_sequences <= 65535, f"{num_sequences} sequences are too many for one launch")
    if num_sequences == 0:
        return
    num_kv_heads, block_size = k_pages.shape[1], k_pages.shape[2]
    group_size = num_heads // num_kv_heads
    if tiles is None:
        tiles = decode_tiles(device_capability(device), head_dim, dtype.itemsize, group_size)
    require(tiles.num_rows >= group_size, f"a tile of {tiles.num_rows} rows cannot hold {group_size} heads")
    context = block_tables.shape[1] * block_size if max_context is None else max_context
    splits = decode_splits(num_sequences, num_kv_heads, context, num_units, tile_tokens=tiles.num_tokens)
    if splits > 1:
        scratch.check(splits * num_sequences * num_heads, head_dim, device)
    _decode_kernel[(num_kv_heads, num_sequences, splits)](
        query,
        k_pages,
        v_pages,
        out,
        scratch.partial,
        scratch.lse,
        kv_lengths,
        block_tables,
        scale * LOG2_E,
        splits,
        num_sequences * num_heads,
        query.stride(0),
        out.stride(0),
        k_pages.stride(0),
        k_pages.stride(1),
        block_tables.stride(0),
        num_heads=num_heads,
        group_size=group_size,
        head_dim=head_dim,
        padded_dim=next_power_of_two(head_dim),
        block_size=block_size,
        tile_rows=tiles.num_rows,
        tile_tokens=tiles.num_tokens,
        split=splits > 1,
        precision=dot_precision(dtype),
        num_warps=tiles.num_warps,
        stages=tiles.num_stages,
    )
    if splits > 1:
        merge(scratch, out, splits)
