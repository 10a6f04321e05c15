"""The kernels in plain torch: short, slow, on any device. What the tests compare with.

Arguments are those of the launchers. Everything is computed in float64 unless said otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention(query: Tensor, keys: Tensor, values: Tensor, *, scale: float) -> Tensor:
    """Causal attention of the last `n` tokens of a context of `m`.

    query `[n, num_heads, head_dim]`, keys and values `[m, num_kv_heads, head_dim]`; returns `[n, num_heads, head_dim]`
    float64.
    """
    num_queries, num_heads, _ = query.shape
    num_tokens, num_kv_heads, _ = keys.shape
    group_size = num_heads // num_kv_heads
    keys = keys.double().repeat_interleave(group_size, 1)
    values = values.double().repeat_interleave(group_size, 1)
    scores = torch.einsum("qhd,khd->hqk", query.double(), keys) * scale
    positions = torch.arange(num_tokens - num_queries, num_tokens, device=query.device)
    visible = torch.arange(num_tokens, device=query.device)[None, :] <= positions[:, None]
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, -torch.inf).softmax(-1), values)


def context(pages: Tensor, table: Tensor, num_tokens: int) -> Tensor:
    """The first `num_tokens` keys (or values) of a sequence in order, `[num_tokens, num_kv_heads, head_dim]`."""
    block_size = pages.shape[2]
    blocks = pages[table[: -(-num_tokens // block_size)].long()]
    return blocks.transpose(1, 2).flatten(0, 1)[:num_tokens]


def paged_prefill(
    query: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    out: Tensor,
    query_starts: Tensor,
    kv_lengths: Tensor,
    block_tables: Tensor,
    *,
    scale: float,
) -> None:
    """See `prefill.paged_prefill`."""
    starts, lengths = query_starts.tolist(), kv_lengths.tolist()
    for i, length in enumerate(lengths):
        keys, values = context(k_pages, block_tables[i], length), context(v_pages, block_tables[i], length)
        rows = slice(starts[i], starts[i + 1])
        out[rows] = attention(query[rows], keys, values, scale=scale).to(out.dtype)


def paged_decode(
    query: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    out: Tensor,
    kv_lengths: Tensor,
    block_tables: Tensor,
    *,
    scale: float,
) -> None:
    """See `decode.paged_decode`."""
    for i, length in enumerate(kv_lengths.tolist()):
        if length == 0:
            out[i] = 0
            continue
        keys, values = context(k_pages, block_tables[i], length), context(v_pages, block_tables[i], length)
        out[i] = attention(query[i : i + 1], keys, values, scale=scale)[0].to(out.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis, in float64."""
    wide = x.double()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.double()


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm (float64) and the new residual (in its dtype)."""
    total = (x.float() + residual.float()).to(residual.dtype)
    return rms_norm(total, weight, eps), total


def silu_mul(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` in float64."""
    gate, up = gate_up.double().chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotary embedding of `[n, num_heads, head_dim]` by `[n, head_dim / 2]`, in float64."""
    low, high = heads.double().chunk(2, -1)
    c, s = cos.double()[:, None], sin.double()[:, None]
    return torch.cat((low * c - high * s, high * c + low * s), -1)


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
    """See `rope.rope_and_write`."""
    num_tokens, num_heads, head_dim = query_out.shape
    _, num_kv_heads, block_size, _ = k_pages.shape
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    heads = qkv.reshape(num_tokens, -1, head_dim)
    query, keys, values = heads.split([num_heads, num_kv_heads, num_kv_heads], 1)
    if q_weight is not None and k_weight is not None:
        query, keys = rms_norm(query, q_weight, eps), rms_norm(keys, k_weight, eps)
    query_out.copy_(rotate(query, cos, sin).to(query_out.dtype))
    keys = rotate(keys, cos, sin).to(k_pages.dtype)
    for i, slot in enumerate(slots.tolist()):
        if slot >= 0:
            k_pages[slot // block_size, :, slot % block_size] = keys[i]
            v_pages[slot // block_size, :, slot % block_size] = values[i]


def draw(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, uniform: float) -> int:
    """One token from one row of logits `[vocab_size]`, see `sampling.sample`."""
    if temperature == 0.0:
        return int((logits == logits.max()).nonzero()[0])
    weights = ((logits.double() - logits.max()) / temperature).exp()
    token_ids = torch.arange(len(logits), device=logits.device)
    limited = 0 < top_k < len(logits)
    if limited or top_p < 1.0 or min_p > 0.0:
        weights, token_ids = weights.sort(descending=True, stable=True)
        kept = top_k if limited else len(logits)
        sums = weights[:kept].cumsum(0)
        if top_p < 1.0:
            kept = min(kept, int((sums < top_p * sums[-1]).sum()) + 1)
        if min_p > 0.0:
            kept = min(kept, int((weights >= min_p * weights[0]).sum()))
        weights = weights[: max(kept, 1)]
    sums = weights.cumsum(0)
    return int(token_ids[int(torch.searchsorted(sums, sums[-1] * uniform, right=True))])
