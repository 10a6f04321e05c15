"""Tile sizes, pipeline stages and numbers of splits: pure functions of shapes and of the architecture.

Nothing is tuned at run time: a kernel that was compiled at start-up must not be compiled again because a batch has
another size. The numbers follow from what must fit: registers (64 Ki a multiprocessor) and shared memory, which the
table lists. `compile_check` proves that they do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

SHARED_MEMORY_LIMITS_BYTES = {
    (8, 0): 163 * 1024,
    (8, 6): 99 * 1024,
    (8, 7): 163 * 1024,
    (8, 9): 99 * 1024,
    (9, 0): 227 * 1024,
    (10, 0): 227 * 1024,
    (12, 0): 99 * 1024,
}
"""Shared memory of one CTA by compute capability (CUDA Programming Guide, table of technical specifications)."""

MAX_SPLITS = 128
"""A context is cut into at most this many pieces: the merge holds all of them at once."""

_FIXED_TILES = 2
"""What starting a CTA and writing its result costs, in tiles of the context."""

_MERGE_TILES = 3
"""What launching the merge costs, in tiles of the context."""


@dataclass(frozen=True, slots=True)
class AttentionTiles:
    """How an attention kernel cuts its work."""

    num_rows: int
    """Queries of a CTA: tokens times heads that share a KV head, packed. A power of two, at least 16."""
    num_tokens: int
    """Tokens of the context looked at at once. A power of two, at least 16."""
    num_warps: int
    num_stages: int
    """Depth of the software pipeline: 1 is none."""

    def shared_bytes(self, capability: tuple[int, int], head_dim: int, itemsize: int) -> int:
        """The shared memory of one CTA, but for a few KiB: the queries, and the tiles of keys and values in flight.

        Finding the block of a token is one stage of the pipeline, so two stages more are one tile more; the
        asynchronous products of Hopper hold a tile longer.
        """
        num_buffers = self.num_stages // 2 + int(capability[0] == 9 and self.num_rows >= 64)
        return (self.num_rows + 2 * num_buffers * self.num_tokens) * next_power_of_two(head_dim) * itemsize


def next_power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << max(number - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    """`a / b`, rounded up."""
    return -(-a // b)


def device_capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a CUDA device; (8, 0) for others, on which kernels are interpreted."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


def shared_memory_limit_bytes(capability: tuple[int, int]) -> int:
    """What one CTA may use; the least of all for an architecture that is not in the table."""
    limits = SHARED_MEMORY_LIMITS_BYTES
    return limits.get(capability, min(limits.values()))


def prefill_tiles(capability: tuple[int, int], head_dim: int, itemsize: int, rows_per_sequence: int) -> AttentionTiles:
    """Tiles for prefill; `rows_per_sequence` is the mean number of queries times heads that share a KV head.

    There are three heights only, since each is compiled on its own.
    """
    if itemsize == 4:
        # Exact float32 products do not run on tensor cores: a thread computes them in its registers.
        return AttentionTiles(16 if head_dim > 128 else 32, 16, 4, 1)
    if rows_per_sequence <= 16:
        tiles = AttentionTiles(16, 64, 4, 3)
    elif rows_per_sequence <= 64:
        tiles = AttentionTiles(64, 64, 8 if head_dim > 128 else 4, 3)
    elif head_dim > 128 and capability[0] != 9:
        tiles = AttentionTiles(64, 64, 8, 3)
    else:
        tiles = AttentionTiles(128, 64, 4 if head_dim <= 64 else 8, 3)
    return _fitted(tiles, capability, head_dim, itemsize, num_ctas=1)


def decode_tiles(capability: tuple[int, int], head_dim: int, itemsize: int, group_size: int) -> AttentionTiles:
    """Tiles for decode: one row for each of `group_size` heads, padded to what tensor cores take.

    Decode waits for memory: the pipeline is deep, and two CTAs fit on a multiprocessor.
    """
    num_rows = max(16, next_power_of_two(group_size))
    if itemsize == 4:
        return AttentionTiles(num_rows, 16, 4, 1)
    return _fitted(AttentionTiles(num_rows, 64, 4, 5), capability, head_dim, itemsize, num_ctas=2)


def _fitted(
    tiles: AttentionTiles, capability: tuple[int, int], head_dim: int, itemsize: int, *, num_ctas: int
) -> AttentionTiles:
    """`tiles` with fewer tokens, until `num_ctas` CTAs fit into shared memory."""
    # The system takes 1 KiB of each CTA, and what reductions need comes on top of the estimate.
    limit = shared_memory_limit_bytes(capability) // num_ctas - 4096
    while tiles.shared_bytes(capability, head_dim, itemsize) > limit and tiles.num_tokens > 16:
        tiles = replace(tiles, num_tokens=tiles.num_tokens // 2)
    return tiles


def most_splits(num_work_items: int, context_tiles: int, num_units: int, *, ctas_per_unit: int = 2) -> int:
    """What `choose_splits` never exceeds; it grows with the context and the units, so it bounds smaller ones, too."""
    rounds = 4 * num_units * ctas_per_unit // max(num_work_items, 1)
    return max(1, min(context_tiles, MAX_SPLITS, rounds))


def choose_splits(num_work_items: int, context_tiles: int, num_units: int, *, ctas_per_unit: int = 2) -> int:
    """Into how many pieces each of `num_work_items` equal contexts of `context_tiles` tiles is cut; at least 1.

    The time is the number of rounds in which the CTAs fit on `num_units` multiprocessors, times the tiles of a piece
    and the fixed cost of a CTA; plus the merge, if there is more than one piece. Takes the smallest number of the
    fastest. It depends on sizes only, so that results repeat and a captured graph stays valid.
    """
    num_slots = num_units * ctas_per_unit
    best, best_cost = 1, cdiv(num_work_items, num_slots) * (context_tiles + _FIXED_TILES)
    most = most_splits(num_work_items, context_tiles, num_units, ctas_per_unit=ctas_per_unit)
    for splits in range(2, most + 1):
        rounds = cdiv(num_work_items * splits, num_slots)
        cost = rounds * (cdiv(context_tiles, splits) + _FIXED_TILES) + _MERGE_TILES
        if cost < best_cost:
            best, best_cost = splits, cost
    return best
