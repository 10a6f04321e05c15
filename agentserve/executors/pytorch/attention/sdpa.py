"""Attention over dense mirrors with torch's `scaled_dot_product_attention`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from agentserve.core.batch import ScheduledChunk
from agentserve.executors.pytorch.kv_store import Mirror


class SdpaAttention:
    """Implements `models.interface.Attention` for one batch.

    Every view of a mirror that a layer needs is made here, for all layers at once: a decode step has little to compute
    per sequence and layer, and making views one by one would take longer than the attention.
    """

    def __init__(self, chunks: Sequence[ScheduledChunk], mirrors: Sequence[Mirror], num_kv_heads: int) -> None:
        """`mirrors` are those of the chunks, valid up to each chunk's start and with room for it."""
        self._sizes = [chunk.num_tokens for chunk in chunks]
        sequences = [_Sequence(chunk, mirror, num_kv_heads) for chunk, mirror in zip(chunks, mirrors, strict=True)]
        self._sequences = sequences
        # [layer][sequence], first where new keys go, then where new values go.
        key_targets = zip(*(sequence.key_targets for sequence in sequences), strict=True)
        value_targets = zip(*(sequence.value_targets for sequence in sequences), strict=True)
        self._targets = [[*keys, *values] for keys, values in zip(key_targets, value_targets, strict=True)]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `models.interface.Attention.attend`."""
        sizes = self._sizes
        torch._foreach_copy_(self._targets[layer], [*torch.split(key, sizes), *torch.split(value, sizes)])
        queries = torch.split(query, sizes)
        outputs = [sequence.attend(layer, rows) for sequence, rows in zip(self._sequences, queries, strict=True)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


class _Sequence:
    """One chunk of a batch: views of its mirror, one a layer."""

    def __init__(self, chunk: ScheduledChunk, mirror: Mirror, num_kv_heads: int) -> None:
        assert mirror.buffer is not None and mirror.length == chunk.start
        start, end = chunk.start, chunk.end
        self._num_tokens = chunk.num_tokens
        self._num_kv_heads = num_kv_heads
        self._mask = None
        self._is_causal = start == 0
        if chunk.num_tokens > 1 and start > 0:
            self._mask = _causal_mask(start, end, mirror.buffer)
        # One call makes the views of all layers: keys and values [1, num_kv_heads, end, head_dim], targets
        # [num_tokens, num_kv_heads, head_dim].
        self._keys = mirror.buffer[:, 0, None, :, :end].unbind(0)
        self._values = mirror.buffer[:, 1, None, :, :end].unbind(0)
        self.key_targets = mirror.buffer[:, 0, :, start:end].transpose(1, 2).unbind(0)
        self.value_targets = mirror.buffer[:, 1, :, start:end].transpose(1, 2).unbind(0)

    def attend(self, layer: int, query: Tensor) -> Tensor:
        """`query` `[num_tokens, num_heads, head_dim]` -> `[num_tokens, num_heads * head_dim]`."""
        if self._num_tokens == 1:
            # The heads that share keys stand in the place of query positions. The token sees all that is there, so no
            # mask is needed, and keys are read once per group instead of once per head.
            grouped = query.view(1, self._num_kv_heads, -1, query.shape[-1])
            output = functional.scaled_dot_product_attention(grouped, self._keys[layer], self._values[layer])
            return output.reshape(1, -1)
        output = functional.scaled_dot_product_attention(
            query.transpose(0, 1).unsqueeze(0),
            self._keys[layer],
            self._values[layer],
            attn_mask=self._mask,
            is_causal=self._is_causal,
            enable_gqa=True,
        )
        return output[0].transpose(0, 1).reshape(self._num_tokens, -1)


def _causal_mask(start: int, end: int, like: Tensor) -> Tensor:
    """`[end - start, end]`: 0 where the token at position `start + row` sees `column`, else minus infinity."""
    mask = torch.full((end - start, end), float("-inf"), dtype=like.dtype, device=like.device)
    return mask.triu_(start + 1)
