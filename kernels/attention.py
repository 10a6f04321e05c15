"""What prefill and decode share: the online softmax over pages, and the merge of splits.

The method is FlashAttention-2 (Dao, 2023) on a paged cache (Kwon et al., 2023); splitting the context and merging the
pieces by their log-sum-exp is Flash-Decoding (Dao et al., 2023). Exponents are base 2: `exp2` is one instruction.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from agentserve_kernels.checks import require
from agentserve_kernels.tuning import next_power_of_two

LOG2_E = 1.4426950408889634


class DecodeScratch:
    """Room for the partial results of a split attention. Owned by one lane: two kernels must never share it.

    Everything is allocated here; launchers use a prefix of it.
    """

    def __init__(self, num_rows: int, head_dim: int, *, device: torch.device | str) -> None:
        """`num_rows`: the largest `splits * num_sequences * num_heads`, see `decode.scratch_rows`."""
        require(num_rows >= 0, f"num_rows is {num_rows}, expected at least 0")
        self.num_rows = num_rows
        self.head_dim = head_dim
        self.partial = torch.empty((num_rows, head_dim), dtype=torch.float32, device=device)
        """Weighted means of values `[num_rows, head_dim]`."""
        self.lse = torch.empty((num_rows,), dtype=torch.float32, device=device)
        """Base-2 logarithms of the sums of weights `[num_rows]`; -inf where there was nothing to attend to."""

    @property
    def num_bytes(self) -> int:
        """What it takes of the device's memory."""
        return self.partial.nbytes + self.lse.nbytes

    def check(self, num_rows: int, head_dim: int, device: torch.device) -> None:
        """Raises KernelArgumentError if a launch that needs `num_rows` rows does not fit."""
        require(head_dim == self.head_dim, f"scratch is for head_dim {self.head_dim}, not {head_dim}")
        require(num_rows <= self.num_rows, f"scratch has {self.num_rows} rows, {num_rows} are needed")
        require(self.lse.device == device, f"scratch is on {self.lse.device}, expected {device}")


@triton.jit
def attend(
    query,
    accumulated,
    maximum,
    total,
    positions,
    start,
    end,
    k_base,
    v_base,
    table,
    stride_block,
    scale_log2,
    masked: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
    block_size: tl.constexpr,
    tile_tokens: tl.constexpr,
    precision: tl.constexpr,
    stages: tl.constexpr,
):
    """Attends from `query` `[rows, padded_dim]` to the tokens `start .. end`; returns the updated state.

    `masked`: tokens after a row's position, or at or beyond `end`, do not count; else all whole tiles do.
    """
    columns = tl.arange(0, tile_tokens)
    dims = tl.arange(0, padded_dim)
    for first in tl.range(start, end, tile_tokens, num_stages=stages):
        tokens = first + columns
        if masked:
            inside = tokens < end
            block = tl.load(table + tokens // block_size, mask=inside, other=0).to(tl.int64)
        else:
            block = tl.load(table + tokens // block_size).to(tl.int64)
        cells = (block * stride_block + (tokens % block_size) * head_dim)[:, None] + dims[None, :]
        if masked:
            keys = tl.load(k_base + cells, mask=inside[:, None] & (dims < head_dim)[None, :], other=0.0)
        elif head_dim == padded_dim:
            keys = tl.load(k_base + cells)
        else:
            keys = tl.load(k_base + cells, mask=(dims < head_dim)[None, :], other=0.0)
        scores = tl.dot(query, tl.trans(keys), input_precision=precision) * scale_log2
        if masked:
            scores = tl.where((tokens[None, :] <= positions[:, None]) & inside[None, :], scores, float("-inf"))
        peak = tl.maximum(maximum, tl.max(scores, 1))
        # A row that has seen nothing yet has -inf here; -inf minus -inf would not be a number.
        shift = tl.where(peak == float("-inf"), 0.0, peak)
        weights = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(maximum - shift)
        total = total * decay + tl.sum(weights, 1)
        accumulated = accumulated * decay[:, None]
        if masked:
            values = tl.load(v_base + cells, mask=inside[:, None] & (dims < head_dim)[None, :], other=0.0)
        elif head_dim == padded_dim:
            values = tl.load(v_base + cells)
        else:
            values = tl.load(v_base + cells, mask=(dims < head_dim)[None, :], other=0.0)
        accumulated = tl.dot(weights.to(values.dtype), values, accumulated, input_precision=precision)
        maximum = peak
    return accumulated, maximum, total


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def _merge_kernel(
    partial,
    lse,
    out,
    num_rows,
    num_splits,
    stride_out,
    num_heads: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
    padded_splits: tl.constexpr,
):
    """One row (a token and a head) a program: `[num_splits, num_rows, head_dim]` to `out`."""
    row = tl.program_id(0)
    splits = tl.arange(0, padded_splits)
    dims = tl.arange(0, padded_dim)
    rows = splits.to(tl.int64) * num_rows + row
    sums = tl.load(lse + rows, mask=splits < num_splits, other=float("-inf"))
    peak = tl.max(sums, 0)
    weights = tl.exp2(sums - tl.where(peak == float("-inf"), 0.0, peak))
    # Pieces without tokens were never written: they are not read.
    present = (sums > float("-inf"))[:, None] & (dims < head_dim)[None, :]
    parts = tl.load(partial + rows[:, None] * head_dim + dims[None, :], mask=present, other=0.0)
    total = tl.sum(weights, 0)
    result = tl.sum(parts * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    pointers = out + (row // num_heads).to(tl.int64) * stride_out + (row % num_heads) * head_dim + dims
    tl.store(pointers, result.to(out.dtype.element_ty), mask=dims < head_dim)


def merge(scratch: DecodeScratch, out: Tensor, num_splits: int) -> None:
    """Merges `num_splits` pieces in `scratch` into `out` `[n, num_heads, head_dim]`."""
    num_tokens, num_heads, head_dim = out.shape
    padded_splits, padded_dim = next_power_of_two(num_splits), next_power_of_two(head_dim)
    _merge_kernel[(num_tokens * num_heads,)](
        scratch.partial,
        scratch.lse,
        out,
        num_tokens * num_heads,
        num_splits,
        out.stride(0),
        num_heads=num_heads,
        head_dim=head_dim,
        padded_dim=padded_dim,
        padded_splits=padded_splits,
        num_warps=4 if padded_splits * padded_dim > 1024 else 1,
    )


def dot_precision(dtype: torch.dtype) -> str:
    """How products are computed: float32 exactly, which is slow and meant for comparisons."""
    return "ieee" if dtype is torch.float32 else "tf32"
