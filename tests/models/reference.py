"""A slow, obvious `Attention`: dense keys and values of each sequence, one sequence after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class DenseCache:
    """Keys and values by (sequence, layer), `[num_tokens, num_kv_heads, head_dim]` each."""

    def __init__(self) -> None:
        self.entries: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}

    def length(self, sequence: str) -> int:
        entry = self.entries.get((sequence, 0))
        return 0 if entry is None else entry[0].shape[0]

    def batch(self, *chunks: tuple[str, int]) -> DenseAttention:
        """The attention of a flat batch: (sequence, number of new tokens) for each chunk in order."""
        return DenseAttention(self, chunks)


class DenseAttention:
    """Satisfies `agentserve.models.interface.Attention`."""

    def __init__(self, cache: DenseCache, chunks: Sequence[tuple[str, int]]) -> None:
        self._cache = cache
        self._chunks = chunks

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        outputs = []
        start = 0
        for sequence, num_new in self._chunks:
            rows = slice(start, start + num_new)
            start += num_new
            keys, values = key[rows], value[rows]
            if (sequence, layer) in self._cache.entries:
                old_keys, old_values = self._cache.entries[sequence, layer]
                keys, values = torch.cat([old_keys, keys]), torch.cat([old_values, values])
            self._cache.entries[sequence, layer] = (keys, values)
            outputs.append(_attention(query[rows], keys, values))
        assert start == query.shape[0]
        return torch.cat(outputs)


def _attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention of the last `len(query)` tokens, written out."""
    num_new, num_heads, head_dim = query.shape
    group = num_heads // keys.shape[1]
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", query.float(), keys.float()) / head_dim**0.5
    key_position = torch.arange(keys.shape[0])
    query_position = torch.arange(keys.shape[0] - num_new, keys.shape[0])
    scores = scores.masked_fill(key_position[None, :] > query_position[:, None], float("-inf"))
    mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values.float())
    return mixed.reshape(num_new, num_heads * head_dim).to(query.dtype)


def flat_logits(model, cache: DenseCache, *chunks: tuple[str, Sequence[int]]) -> list[Tensor]:
    """Logits of each chunk (sequence, new token ids), computed as one flat batch that continues what is cached."""
    token_ids, positions = [], []
    for sequence, tokens in chunks:
        start = cache.length(sequence)
        token_ids += list(tokens)
        positions += range(start, start + len(tokens))
    with torch.inference_mode():
        attention = cache.batch(*[(sequence, len(tokens)) for sequence, tokens in chunks])
        hidden = model.forward(torch.tensor(token_ids), torch.tensor(positions), attention)
        return list(model.logits(hidden).split([len(tokens) for _, tokens in chunks]))
