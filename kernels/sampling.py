"""Tokens from logits on the device, without a synchronization.

The distribution is that of the engine's sampler for the CPU: temperature, then top-k, top-p and min-p, then the
cumulative distribution is inverted at a uniform number, in float64. Rows without a filter are laid out by token id and
drawn by two small kernels; rows with one are laid out by falling probability and drawn by torch's sort.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from agentserve_kernels.checks import check_tensor, require
from agentserve_kernels.tuning import cdiv, next_power_of_two

_CHUNK = 4096
"""Logits that one program looks at."""

_FLOATS = (torch.float32, torch.float64)


class SampleScratch:
    """Maxima and sums of chunks of the vocabulary. Owned by one lane: two calls in flight must not share it."""

    def __init__(self, max_rows: int, vocab_size: int, *, device: torch.device | str) -> None:
        """Room for `max_rows` rows of `vocab_size` logits."""
        self.max_rows = max_rows
        self.num_chunks = cdiv(vocab_size, _CHUNK)
        shape = (max_rows, self.num_chunks)
        self.maxima = torch.empty(shape, dtype=torch.float32, device=device)
        self.token_ids = torch.empty(shape, dtype=torch.int32, device=device)
        self.sums = torch.empty(shape, dtype=torch.float64, device=device)


@triton.jit
def _has_filter(top_k, top_p, min_p, vocab_size):
    return ((top_k > 0) & (top_k < vocab_size)) | (top_p < 1.0) | (min_p > 0.0)


@triton.jit
def _chunk_kernel(
    logits,
    temperature,
    maxima,
    token_ids,
    sums,
    vocab_size,
    num_chunks,
    stride_logits,
    chunk_size: tl.constexpr,
):
    """Programs `(row, chunk)`: the largest logit, its first token, and the sum of weights relative to it."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    tokens = chunk * chunk_size + tl.arange(0, chunk_size)
    inside = tokens < vocab_size
    values = tl.load(logits + row * stride_logits + tokens, mask=inside, other=float("-inf"))
    # A maximum may pass over NaN; infinity is refused just the same.
    values = tl.where(values != values, float("inf"), values)  # noqa: PLR0124 - true of NaN only
    peak, index = tl.max(values, 0, return_indices=True)
    cell = row * num_chunks + chunk
    tl.store(maxima + cell, peak)
    tl.store(token_ids + cell, chunk * chunk_size + index)
    warmth = tl.load(temperature + row).to(tl.float64)
    if (warmth > 0.0) & (tl.abs(peak) < float("inf")):
        weights = tl.exp((values.to(tl.float64) - peak.to(tl.float64)) / warmth)
        tl.store(sums + cell, tl.sum(weights, 0))
    else:
        tl.store(sums + cell, tl.zeros([], tl.float64))


@triton.jit
def _select_kernel(
    logits,
    temperature,
    top_k,
    top_p,
    min_p,
    uniform,
    maxima,
    token_ids,
    sums,
    out_tokens,
    non_finite,
    vocab_size,
    num_chunks,
    stride_logits,
    chunk_size: tl.constexpr,
    padded_chunks: tl.constexpr,
):
    """One row a program: the most likely token, or the one at `uniform`; and whether the logits are finite numbers."""
    row = tl.program_id(0).to(tl.int64)
    chunks = tl.arange(0, padded_chunks)
    peaks = tl.load(maxima + row * num_chunks + chunks, mask=chunks < num_chunks, other=float("-inf"))
    peak, best = tl.max(peaks, 0, return_indices=True)
    finite = tl.abs(peak) < float("inf")
    token = tl.load(token_ids + row * num_chunks + best)
    warmth = tl.load(temperature + row).to(tl.float64)
    filters = _has_filter(tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row), vocab_size)
    if finite & (warmth > 0.0) & (filters == 0):
        parts = tl.load(sums + row * num_chunks + chunks, mask=chunks < num_chunks, other=0.0)
        top = peak.to(tl.float64)
        weights = parts * tl.exp((peaks.to(tl.float64) - top) / warmth)
        target = tl.load(uniform + row).to(tl.float64) * tl.sum(weights, 0)
        chunk = tl.sum((tl.cumsum(weights, 0) <= target).to(tl.int32), 0)
        # Sums in another order may differ in the last bit: never step over the last token that has a weight.
        chunk = tl.minimum(chunk, tl.max(tl.where(weights > 0.0, chunks, 0), 0))
        before = tl.sum(tl.where(chunks < chunk, weights, 0.0), 0)
        columns = tl.arange(0, chunk_size)
        tokens = chunk * chunk_size + columns
        values = tl.load(logits + row * stride_logits + tokens, mask=tokens < vocab_size, other=float("-inf"))
        inner = tl.exp((values.to(tl.float64) - top) / warmth)
        index = tl.sum((before + tl.cumsum(inner, 0) <= target).to(tl.int32), 0)
        index = tl.minimum(index, tl.max(tl.where(inner > 0.0, columns, 0), 0))
        token = chunk * chunk_size + index
    tl.store(out_tokens + row, token.to(tl.int64))
    tl.store(non_finite + row, tl.where(finite, 0, 1).to(tl.int32))


def num_candidates(
    temperatures: Sequence[float],
    top_ks: Sequence[int],
    top_ps: Sequence[float],
    min_ps: Sequence[float],
    vocab_size: int,
) -> int | None:
    """What `sample` needs to know of a batch: None if no row filters, else how many of the most likely tokens matter.

    That is the largest top-k of the rows that filter, as a power of two; the whole vocabulary if one of them has none.
    """
    largest = None
    for temperature, top_k, top_p, min_p in zip(temperatures, top_ks, top_ps, min_ps, strict=True):
        has_top_k = 0 < top_k < vocab_size
        if temperature > 0.0 and (has_top_k or top_p < 1.0 or min_p > 0.0):
            largest = max(largest or 0, next_power_of_two(top_k) if has_top_k else vocab_size)
    return None if largest is None else min(largest, vocab_size)


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniform: Tensor,
    out_tokens: Tensor,
    non_finite: Tensor,
    scratch: SampleScratch,
    *,
    num_candidates: int | None,
) -> None:
    """Chooses a token for each row of `logits`.

    logits          [n, vocab_size] float32, any stride in axis 0; not changed
    temperature     [n] float32 or float64; 0: the most likely token, the first of equals
    top_k           [n] int32; 0, or at least vocab_size: off
    top_p, min_p    [n] float32 or float64; 1 and 0: off
    uniform         [n] float32 or float64 in [0, 1)
    out_tokens      [n] int64
    non_finite      [n] int32: becomes 1 where the largest logit is no finite number (the token is then meaningless)

    `num_candidates` is what the function of that name says of the batch. With None nothing is allocated; otherwise
    torch sorts, and allocates its results on the current stream (inside a capture: in the graph's pool). The same
    batch gives the same tokens. Raises KernelArgumentError.
    """
    num_rows, vocab_size = logits.shape
    device = logits.device
    check_tensor("logits", logits, (None, None), (torch.float32,))
    check_tensor("top_k", top_k, (num_rows,), (torch.int32,), device)
    numbers = {"temperature": temperature, "top_p": top_p, "min_p": min_p, "uniform": uniform}
    for name, tensor in numbers.items():
        check_tensor(name, tensor, (num_rows,), _FLOATS, device)
    check_tensor("out_tokens", out_tokens, (num_rows,), (torch.int64,), device)
    check_tensor("non_finite", non_finite, (num_rows,), (torch.int32,), device)
    chunks = cdiv(vocab_size, _CHUNK)
    fits = num_rows <= scratch.max_rows and chunks <= scratch.num_chunks and scratch.sums.device == device
    require(fits, f"scratch is too small, or elsewhere, for {num_rows} rows of {vocab_size} logits on {device}")
    in_range = num_candidates is None or 1 <= num_candidates <= vocab_size
    require(in_range, f"num_candidates is {num_candidates}, expected at most {vocab_size}")
    if num_rows == 0:
        return
    shared = (scratch.maxima, scratch.token_ids, scratch.sums)
    _chunk_kernel[(num_rows, chunks)](
        logits, temperature, *shared, vocab_size, chunks, logits.stride(0), chunk_size=_CHUNK, num_warps=8
    )
    _select_kernel[(num_rows,)](
        logits,
        temperature,
        top_k,
        top_p,
        min_p,
        uniform,
        *shared,
        out_tokens,
        non_finite,
        vocab_size,
        chunks,
        logits.stride(0),
        chunk_size=_CHUNK,
        padded_chunks=next_power_of_two(chunks),
        num_warps=8,
    )
    if num_candidates is not None:
        drawn = draw_filtered(logits, temperature, top_k, top_p, min_p, uniform, num_candidates)
        limited = (top_k > 0) & (top_k < vocab_size)
        filters = (limited | (top_p < 1.0) | (min_p > 0.0)) & (temperature > 0.0)
        torch.where(filters, drawn, out_tokens, out=out_tokens)


def draw_filtered(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniform: Tensor,
    num_candidates: int,
) -> Tensor:
    """Tokens `[n]` int64 of rows that filter, laid out by falling probability; other rows get some token.

    Arguments as for `sample`. Only torch operations that do not synchronize.
    """
    vocab_size = logits.shape[1]
    if num_candidates < vocab_size:
        values, token_ids = logits.topk(num_candidates)
    else:
        values, token_ids = logits.sort(dim=-1, descending=True, stable=True)
    warmth = torch.where(temperature > 0.0, temperature, 1.0).double()[:, None]
    # The largest exponent is 0, however small the temperature.
    weights = ((values.double() - values[:, :1]) / warmth).exp_()
    limits = torch.where((top_k > 0) & (top_k < vocab_size), top_k, num_candidates).long()
    weights *= torch.arange(values.shape[1], device=logits.device) < limits[:, None]
    sums = weights.cumsum(-1)
    # The smallest number of tokens whose probabilities sum to top_p.
    reached = (sums < top_p.double()[:, None] * sums[:, -1:]).sum(-1) + 1
    kept = torch.where(top_p < 1.0, torch.minimum(limits, reached), limits)
    likely = (weights >= min_p.double()[:, None] * weights[:, :1]).sum(-1)
    kept = torch.where(min_p > 0.0, torch.minimum(kept, likely), kept)
    last = (kept.clamp(min=1) - 1)[:, None]
    targets = sums.gather(1, last) * uniform.double()[:, None]
    indices = torch.searchsorted(sums, targets, right=True)
    return token_ids.gather(1, torch.minimum(indices, last)).squeeze(1)
