"""Prefill and decode over pages, against attention in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agentserve_kernels import reference
from agentserve_kernels.checks import KernelArgumentError
from agentserve_kernels.decode import decode_splits, paged_decode
from agentserve_kernels.prefill import paged_prefill
from agentserve_kernels.tuning import AttentionTiles
from tests.kernels.builders import Cache, assert_near, make_cache, make_scratch, randn

SMALL_TILES = AttentionTiles(num_rows=16, num_tokens=16, num_warps=4, num_stages=3)
"""Many tiles with few tokens."""


def run_decode(cache: Cache, num_heads: int, *, num_units: int, tiles: AttentionTiles | None = None) -> None:
    """Runs the kernel and compares; the workspace holds NaN."""
    dtype, device = cache.pool.dtype, cache.pool.device
    num_sequences, head_dim = len(cache.kv_lengths), cache.pool.shape[-1]
    query = randn((num_sequences, num_heads, head_dim), dtype, device)
    out, expected = torch.full_like(query, torch.nan), torch.empty_like(query)
    arguments = (cache.kv_lengths, cache.block_tables)
    scratch = make_scratch(128 * num_sequences * num_heads, head_dim, device)
    scale = head_dim**-0.5
    paged_decode(
        query, cache.k_pages, cache.v_pages, out, *arguments, scratch, scale=scale, num_units=num_units, tiles=tiles
    )
    reference.paged_decode(query, cache.k_pages, cache.v_pages, expected, *arguments, scale=scale)
    assert_near(out, expected, dtype)


def run_prefill(
    cache: Cache,
    chunks: list[int],
    num_heads: int,
    *,
    num_units: int = 8,
    tiles: AttentionTiles | None = None,
    splits: bool = False,
) -> None:
    """Runs the kernel on the last `chunks` tokens of the sequences and compares."""
    dtype, device = cache.pool.dtype, cache.pool.device
    head_dim = cache.pool.shape[-1]
    starts = torch.tensor([0, *chunks], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
    query = randn((sum(chunks), num_heads, head_dim), dtype, device)
    out, expected = torch.full_like(query, torch.nan), torch.empty_like(query)
    arguments = (starts, cache.kv_lengths, cache.block_tables)
    scratch = make_scratch(8 * query.shape[0] * num_heads, head_dim, device) if splits else None
    scale = head_dim**-0.5
    paged_prefill(
        query, cache.k_pages, cache.v_pages, out, *arguments, scratch, scale=scale, num_units=num_units, tiles=tiles
    )
    reference.paged_prefill(query, cache.k_pages, cache.v_pages, expected, *arguments, scale=scale)
    assert_near(out, expected, dtype)


@pytest.mark.parametrize("num_units", [1, 64], ids=["whole", "split"])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "block_size", "dtype"),
    [
        (4, 4, 64, 8, torch.float32),  # no sharing of KV heads
        (6, 2, 80, 16, torch.float16),
        (7, 1, 128, 16, torch.bfloat16),
        (3, 1, 96, 32, torch.float32),
        (4, 2, 256, 128, torch.float16),
        (20, 1, 64, 16, torch.float32),  # more heads than the least tile has rows
    ],
)
def test_decode(
    device: torch.device, num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype,
    num_units: int,
) -> None:  # fmt: skip
    # Padding, one token, and lengths around the borders of blocks and of tiles.
    lengths = [0, 1, block_size + 1, 63, 64, 65, 150]
    cache = make_cache(
        lengths, num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=block_size, dtype=dtype, device=device
    )
    run_decode(cache, num_heads, num_units=num_units)


def test_decode_in_a_bucket_much_larger_than_the_contexts(device: torch.device) -> None:
    # 64 blocks of 16 tokens: 64 tiles of 16 tokens and more splits than the short contexts have tiles.
    cache = make_cache(
        [5, 40, 0], num_kv_heads=1, head_dim=64, block_size=16, dtype=torch.float32, device=device, max_blocks=64
    )
    assert decode_splits(3, 1, 1024, 64, tile_tokens=16) > 3
    run_decode(cache, 2, num_units=64, tiles=SMALL_TILES)


def test_decode_of_padding_alone_reads_nothing(device: torch.device) -> None:
    # All ids in the table point far outside.
    for num_units in (1, 64):
        cache = make_cache(
            [0, 0], num_kv_heads=2, head_dim=64, block_size=16, dtype=torch.float32, device=device, max_blocks=32
        )
        run_decode(cache, 4, num_units=num_units, tiles=SMALL_TILES)


def test_decode_of_nobody_launches_nothing(device: torch.device) -> None:
    cache = make_cache([], num_kv_heads=2, head_dim=64, block_size=16, dtype=torch.float32, device=device)
    run_decode(cache, 4, num_units=8)


def test_decode_repeats_bit_for_bit(device: torch.device) -> None:
    cache = make_cache([300, 77], num_kv_heads=1, head_dim=64, block_size=16, dtype=torch.float16, device=device)
    query = randn((2, 4, 64), torch.float16, device)
    results = []
    for _ in range(2):
        out = torch.empty_like(query)
        scratch = make_scratch(1024, 64, device)
        tables = (cache.kv_lengths, cache.block_tables)
        paged_decode(query, cache.k_pages, cache.v_pages, out, *tables, scratch, scale=0.125, num_units=16)
        results.append(out)
    assert torch.equal(*results)


@pytest.mark.parametrize("splits", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "block_size", "dtype", "tiles"),
    [
        (2, 2, 64, 16, torch.float32, SMALL_TILES),
        (6, 2, 80, 8, torch.float16, None),
        (7, 1, 128, 16, torch.bfloat16, None),
        (7, 1, 96, 32, torch.float32, SMALL_TILES),
        (3, 1, 256, 64, torch.float16, None),
    ],
)
def test_prefill(
    device: torch.device, num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype,
    tiles: AttentionTiles | None, splits: bool,
) -> None:  # fmt: skip
    # (prefix, chunk): cold, resumed at and around borders of blocks, a single token, a long prefix.
    batch = [(0, 21), (block_size, 5), (block_size - 1, 17), (2 * block_size + 1, 1), (130, 9)]
    cache = make_cache(
        [prefix + chunk for prefix, chunk in batch],
        num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=block_size, dtype=dtype, device=device,
    )  # fmt: skip
    run_prefill(cache, [chunk for _, chunk in batch], num_heads, num_units=64, tiles=tiles, splits=splits)


@settings(max_examples=12)
@given(
    batch=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), min_size=1, max_size=4),
    group_size=st.sampled_from([1, 2, 3, 5, 7]),
    splits=st.booleans(),
)
def test_prefill_of_ragged_batches(
    device: torch.device, batch: list[tuple[int, int]], group_size: int, splits: bool
) -> None:
    # A chunk may be empty. Then its sequence has tiles that nobody computes.
    cache = make_cache(
        [prefix + chunk for prefix, chunk in batch],
        num_kv_heads=1, head_dim=64, block_size=8, dtype=torch.float32, device=device,
    )  # fmt: skip
    run_prefill(cache, [chunk for _, chunk in batch], group_size, num_units=16, tiles=SMALL_TILES, splits=splits)


def test_a_scratch_that_is_too_small_means_fewer_splits_in_prefill(device: torch.device) -> None:
    cache = make_cache([200], num_kv_heads=1, head_dim=64, block_size=16, dtype=torch.float32, device=device)
    query = randn((2, 2, 64), torch.float32, device)
    starts = torch.tensor([0, 2], dtype=torch.int32, device=device)
    scratch = make_scratch(2 * 2 * 3, 64, device)  # three pieces of two tokens with two heads
    out, expected = torch.empty_like(query), torch.empty_like(query)
    arguments = (starts, cache.kv_lengths, cache.block_tables)
    pages = (cache.k_pages, cache.v_pages)
    paged_prefill(query, *pages, out, *arguments, scratch, scale=0.125, num_units=64, tiles=SMALL_TILES)
    reference.paged_prefill(query, *pages, expected, *arguments, scale=0.125)
    assert_near(out, expected, torch.float32)
    assert not scratch.lse.isnan().any()  # all three were used


def test_wrong_arguments_are_refused(device: torch.device) -> None:
    cache = make_cache([20, 30], num_kv_heads=2, head_dim=64, block_size=16, dtype=torch.float32, device=device)
    query = randn((2, 4, 64), torch.float32, device)

    def decode(**changes: object) -> None:
        arguments = {
            "query": query,
            "k_pages": cache.k_pages,
            "v_pages": cache.v_pages,
            "out": torch.empty_like(query),
            "kv_lengths": cache.kv_lengths,
            "block_tables": cache.block_tables,
            "scratch": make_scratch(0, 64, device),
            "scale": 0.125,
            "num_units": 1,
        }
        paged_decode(**{**arguments, **changes})

    decode()
    with pytest.raises(KernelArgumentError, match="num_units is 0"):
        decode(num_units=0)
    with pytest.raises(KernelArgumentError, match=r"out has shape \[2, 4, 32\], expected \[2, 4, 64\]"):
        decode(out=torch.empty((2, 4, 32), device=device))
    with pytest.raises(KernelArgumentError, match=r"kv_lengths is torch\.int64, expected torch\.int32"):
        decode(kv_lengths=cache.kv_lengths.long())
    with pytest.raises(KernelArgumentError, match="3 query heads cannot share 2 KV heads"):
        decode(query=query[:, :3].contiguous(), out=torch.empty((2, 3, 64), device=device))
    with pytest.raises(KernelArgumentError, match=r"query is torch\.float16"):
        decode(query=query.half(), out=query.half())
    with pytest.raises(KernelArgumentError, match="must be contiguous"):
        decode(query=query.transpose(0, 1).contiguous().transpose(0, 1))
    with pytest.raises(KernelArgumentError, match="scratch has 0 rows, 256 are needed"):
        # 2 CTAs on each of 64 units are 32 for each of two sequences and two KV heads: 32 pieces * 2 * 4 heads.
        decode(num_units=64, tiles=SMALL_TILES, max_context=1 << 12, scratch=make_scratch(0, 64, device))
    with pytest.raises(KernelArgumentError, match="scratch is for head_dim 128"):
        decode(num_units=64, tiles=SMALL_TILES, max_context=1 << 12, scratch=make_scratch(4096, 128, device))
    with pytest.raises(KernelArgumentError, match="a tile of 16 rows cannot hold 32 heads"):
        wide = randn((2, 64, 64), torch.float32, device)
        decode(query=wide, out=torch.empty_like(wide), tiles=SMALL_TILES)
    with pytest.raises(KernelArgumentError, match="block_size is 4"):
        decode(k_pages=cache.k_pages[:, :, :4].contiguous(), v_pages=cache.v_pages[:, :, :4].contiguous())
