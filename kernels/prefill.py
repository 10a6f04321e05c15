"""Causal attention of chunks of prompts over a paged prefix."""

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
    device_capability,
    next_power_of_two,
    prefill_tiles,
)


@triton.jit(do_not_specialize=["num_sequences", "num_splits", "num_tokens", "stride_table"])
def _prefill_kernel(
    query,
    k_pages,
    v_pages,
    out,
    partial,
    lse,
    query_starts,
    kv_lengths,
    block_tables,
    scale_log2,
    num_sequences,
    num_splits,
    num_tokens,
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
    """Programs `(kv_head, tile, piece)`. A row is a token and one of the heads that share the KV head."""
    kv_head = tl.program_id(0)
    tile = tl.program_id(1)
    piece = tl.program_id(2)
    # Sequence i starts at tile `query_starts[i] * group_size // tile_rows + i`. That leaves it enough tiles, whatever
    # the lengths, and needs no list of tiles from the host. Binary search for the last sequence that starts in time.
    sequence = 0
    beyond = num_sequences
    while beyond - sequence > 1:
        middle = (sequence + beyond) // 2
        starts_in_time = tl.load(query_starts + middle) * group_size // tile_rows + middle <= tile
        sequence = tl.where(starts_in_time, middle, sequence)
        beyond = tl.where(starts_in_time, beyond, middle)
    first_token = tl.load(query_starts + sequence)
    num_queries = tl.load(query_starts + sequence + 1) - first_token
    num_rows = num_queries * group_size
    num_tiles = tl.cdiv(num_rows, tile_rows)
    index = tile - (first_token * group_size // tile_rows + sequence)
    if index >= num_tiles:
        return
    # The last tokens look back furthest. CTAs start in the order of their ids, so the longest goes first.
    index = num_tiles - 1 - index
    rows = index * tile_rows + tl.arange(0, tile_rows)
    dims = tl.arange(0, padded_dim)
    present = (rows < num_rows)[:, None] & (dims < head_dim)[None, :]
    heads = kv_head * group_size + rows % group_size
    tokens = (first_token + rows // group_size).to(tl.int64)
    columns = heads[:, None] * head_dim + dims[None, :]
    queries = tl.load(query + tokens[:, None] * stride_query + columns, mask=present, other=0.0)

    prefix = tl.load(kv_lengths + sequence) - num_queries
    positions = prefix + rows // group_size
    first_position = prefix + index * tile_rows // group_size
    end = prefix + (tl.minimum((index + 1) * tile_rows, num_rows) - 1) // group_size + 1
    # Up to here every row sees every token.
    unmasked_end = (first_position + 1) // tile_tokens * tile_tokens
    start = 0
    if split:
        length = tl.cdiv(tl.cdiv(end, tile_tokens), num_splits) * tile_tokens
        start = tl.minimum(piece * length, end)
        end = tl.minimum(start + length, end)
    middle = tl.maximum(start, tl.minimum(unmasked_end, end))

    k_base = k_pages + kv_head.to(tl.int64) * stride_head
    v_base = v_pages + kv_head.to(tl.int64) * stride_head
    table = block_tables + sequence.to(tl.int64) * stride_table
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
    # Rows that nothing of this piece is visible to: their maximum, and so their logarithm, stays -inf.
    divisor = tl.where(total == 0.0, 1.0, total)
    result = accumulated / divisor[:, None]
    if split:
        cells = (piece.to(tl.int64) * num_tokens + tokens) * num_heads + heads
        tl.store(partial + cells[:, None] * head_dim + dims[None, :], result, mask=present & (total > 0.0)[:, None])
        tl.store(lse + cells, maximum + tl.log2(divisor), mask=rows < num_rows)
    else:
        tl.store(out + tokens[:, None] * stride_out + columns, result.to(out.dtype.element_ty), mask=present)


def prefill_scratch_rows(num_units: int) -> int:
    """Rows of a `DecodeScratch` with which a short chunk after a long prefix fills `num_units` multiprocessors.

    That is two rounds of tiles of 128 rows. With fewer rows the context is cut into fewer pieces, nothing else.
    """
    return 2 * num_units * 128


def paged_prefill(
    query: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    out: Tensor,
    query_starts: Tensor,
    kv_lengths: Tensor,
    block_tables: Tensor,
    scratch: DecodeScratch | None = None,
    *,
    scale: float,
    num_units: int,
    max_context: int | None = None,
    tiles: AttentionTiles | None = None,
) -> None:
    """Causal attention of one chunk a sequence; keys and values of the chunks are in the pages already.

    query, out      [n, num_heads, head_dim]; rows beyond `query_starts[s]` are left alone, or undefined if split
    k_pages         [num_blocks, num_kv_heads, block_size, head_dim], any stride in axis 0; v_pages likewise
    query_starts    [s + 1] int32, rising from 0: the chunk of sequence i is rows `query_starts[i] .. [i + 1]`
    kv_lengths      [s] int32, tokens in the pages including the chunk
    block_tables    [s, max_blocks] int32

    `num_units` is how many multiprocessors the kernel may use. If the tiles are too few for them (a short chunk after
    a long prefix) and there is a `scratch`, the context is split; `max_context` bounds `kv_lengths` (default: what
    `block_tables` can hold). `tiles` overrides the choice of `tuning.prefill_tiles`.

    One CTA computes one tile, and the hardware gives the next CTA to whichever multiprocessor is free. That balances
    better than a loop in resident CTAs could without atomics, and a decode kernel of higher priority on the same
    multiprocessors waits for one tile at most. Put the sequence with the longest context first.

    Raises KernelArgumentError.
    """
    num_tokens, num_heads, head_dim = query.shape
    num_sequences = kv_lengths.shape[0]
    device, dtype = query.device, query.dtype
    check_pages(k_pages, v_pages, num_heads=num_heads, head_dim=head_dim)
    check_tensor("query", query, (None, None, None), (k_pages.dtype,), k_pages.device, num_packed=2)
    check_tensor("out", out, (num_tokens, num_heads, head_dim), (dtype,), device, num_packed=2)
    check_tensor("query_starts", query_starts, (num_sequences + 1,), (torch.int32,), device)
    check_tensor("kv_lengths", kv_lengths, (None,), (torch.int32,), device)
    check_tensor("block_tables", block_tables, (num_sequences, None), (torch.int32,), device)
    check_units(num_units)
    if num_tokens == 0 or num_sequences == 0:
        return
    num_kv_heads, block_size = k_pages.shape[1], k_pages.shape[2]
    group_size = num_heads // num_kv_heads
    if tiles is None:
        mean_rows = cdiv(num_tokens * group_size, num_sequences)
        tiles = prefill_tiles(device_capability(device), head_dim, dtype.itemsize, mean_rows)
    num_tiles = num_tokens * group_size // tiles.num_rows + num_sequences
    # The second axis of a grid ends there: more than 299 thousand tokens of Qwen2.5-7B in one batch.
    require(num_tiles <= 65535, f"{num_tokens} tokens are too many for one launch")
    context = block_tables.shape[1] * block_size if max_context is None else max_context
    splits = 1
    if scratch is not None:
        wanted = choose_splits(num_tiles * num_kv_heads, cdiv(context, tiles.num_tokens), num_units, ctas_per_unit=1)
        splits = max(1, min(wanted, scratch.num_rows // (num_tokens * num_heads)))
    if scratch is None or splits == 1:
        used, partial, lse = None, out, out
    else:
        scratch.check(splits * num_tokens * num_heads, head_dim, device)
        used, partial, lse = scratch, scratch.partial, scratch.lse
    _prefill_kernel[(num_kv_heads, num_tiles, splits)](
        query,
        k_pages,
        v_pages,
        out,
        partial,
        lse,
        query_starts,
        kv_lengths,
        block_tables,
        scale * LOG2_E,
        num_sequences,
        splits,
        num_tokens,
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
        split=used is not None,
        precision=dot_precision(dtype),
        num_warps=tiles.num_warps,
        stages=tiles.num_stages,
    )
    if used is not None:
        merge(used, out, splits)
