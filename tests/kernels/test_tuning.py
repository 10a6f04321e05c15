"""Tile sizes and splits are pure functions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agentserve_kernels.checks import HEAD_DIMS
from agentserve_kernels.decode import decode_splits, scratch_rows
from agentserve_kernels.prefill import prefill_scratch_rows
from agentserve_kernels.tuning import (
    MAX_SPLITS,
    SHARED_MEMORY_LIMITS_BYTES,
    cdiv,
    choose_splits,
    decode_tiles,
    most_splits,
    next_power_of_two,
    prefill_tiles,
    shared_memory_limit_bytes,
)

CAPABILITIES = sorted(SHARED_MEMORY_LIMITS_BYTES)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_fit(capability: tuple[int, int], head_dim: int, itemsize: int) -> None:
    limit = SHARED_MEMORY_LIMITS_BYTES[capability]
    for rows in (1, 16, 17, 64, 65, 10000):
        tiles = prefill_tiles(capability, head_dim, itemsize, rows)
        assert tiles.shared_bytes(capability, head_dim, itemsize) < limit
        assert tiles.num_rows >= 16
        assert tiles.num_tokens >= 16
    for group_size in (1, 7, 16, 32):
        tiles = decode_tiles(capability, head_dim, itemsize, group_size)
        assert tiles.num_rows >= group_size
        assert tiles.shared_bytes(capability, head_dim, itemsize) < limit // 2


def test_an_unknown_architecture_gets_what_fits_everywhere() -> None:
    assert shared_memory_limit_bytes((13, 0)) == 99 * 1024


def test_known_choices() -> None:
    # Qwen2.5-7B: 28 heads share 4 KV heads of 128.
    hopper, ada = decode_tiles((9, 0), 128, 2, 7), decode_tiles((8, 9), 128, 2, 7)
    assert (hopper.num_rows, hopper.num_tokens) == (16, 64)
    # 99 KiB / 2 hold 2 tiles of keys and of values of 32 tokens (32 KiB), not of 64.
    assert (ada.num_rows, ada.num_tokens) == (16, 32)
    assert prefill_tiles((9, 0), 128, 2, 4096 * 7).num_rows == 128
    assert prefill_tiles((9, 0), 128, 2, 7).num_rows == 16


@pytest.mark.parametrize(
    ("work", "tiles", "units", "expected"),
    [
        (1, 1, 132, 1),  # one tile cannot be cut
        (264, 16, 132, 1),  # every slot has something to do
        (4, 256, 132, 64),  # 264 slots / 4 = 66, but 64 pieces of 4 tiles are as fast
        (32, 64, 132, 8),  # 264 / 32 = 8 pieces of 8 tiles
        (4, 256, 8, 4),  # a small slot: 16 / 4
        (200, 64, 132, 5),  # 1 round of 66 tiles, or 4 rounds of 13 + 2 and the merge: 63
        (4, 2, 132, 1),  # too little to pay for the merge
    ],
)
def test_splits(work: int, tiles: int, units: int, expected: int) -> None:
    assert choose_splits(work, tiles, units) == expected


@given(work=st.integers(1, 300), tiles=st.integers(1, 600), units=st.integers(1, 192))
def test_splits_stay_in_bounds_and_never_lose(work: int, tiles: int, units: int) -> None:
    splits = choose_splits(work, tiles, units)
    assert 1 <= splits <= min(tiles, MAX_SPLITS)
    assert splits <= most_splits(work, tiles, units)
    # In rounds times tiles, whatever the fixed costs.
    assert cdiv(work * splits, 2 * units) * cdiv(tiles, splits) <= cdiv(work, 2 * units) * tiles


@given(
    num_sequences=st.integers(1, 24),
    context=st.integers(1, 20000),
    units=st.integers(1, 132),
    kv_heads=st.integers(1, 8),
)
def test_a_scratch_is_large_enough_for_every_bucket(
    num_sequences: int, context: int, units: int, kv_heads: int
) -> None:
    num_heads = 2 * kv_heads
    rows = scratch_rows(
        24, num_heads, kv_heads, 128, 20000, 132, dtype=torch.bfloat16, capability=(9, 0)
    )  # fmt: skip
    tokens = decode_tiles((9, 0), 128, 2, 2).num_tokens
    splits = decode_splits(num_sequences, kv_heads, context, units, tile_tokens=tokens)
    assert splits == 1 or splits * num_sequences * num_heads <= rows


def test_a_scratch_is_small() -> None:
    # 4 * 264 CTAs * 7 heads, at most: 3.8 MB of Qwen2.5-7B on an H200.
    rows = scratch_rows(64, 28, 4, 128, 32768, 132, dtype=torch.bfloat16, capability=(9, 0))
    assert 7 * 264 <= rows <= 4 * 264 * 7


@pytest.mark.parametrize("num_tokens", [8, 16, 64, 100, 256, 500])
def test_short_chunks_fill_the_device(num_tokens: int) -> None:
    # Qwen2.5-7B after 16 thousand tokens on an H200: pieces of the context are as many as wanted, and fill 132 units.
    tiles = num_tokens * 7 // 128 + 1
    splits = choose_splits(tiles * 4, 256, 132, ctas_per_unit=1)
    assert splits * num_tokens * 28 <= prefill_scratch_rows(132)
    assert splits * tiles * 4 >= 0.75 * 132


def test_powers_of_two() -> None:
    assert [next_power_of_two(n) for n in (0, 1, 2, 3, 64, 80)] == [1, 1, 2, 4, 64, 128]
