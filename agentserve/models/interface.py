"""What an executor needs of a model, and a model of an executor.

A model computes on a flat batch: the tokens of all chunks one after the other, with no batch dimension and no padding.
It knows nothing of requests, blocks or lanes; `Attention` hides them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from agentserve.models.config import ModelConfig


class Attention(Protocol):
    """The KV cache and the attention over it, for one batch."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Stores `key` and `value` of the batch's tokens and returns the attention of `query` over each sequence.

        Args:
            layer: from 0.
            query: `[num_tokens, num_heads, head_dim]`, rotary embedding applied.
            key: `[num_tokens, num_kv_heads, head_dim]`, rotary embedding applied.
            value: `[num_tokens, num_kv_heads, head_dim]`.

        Returns:
            `[num_tokens, num_heads * head_dim]`. Causal: a token sees itself and what comes before it in its sequence.
        """
        ...


@dataclass(frozen=True, slots=True)
class RotaryTables:
    """Rotary embedding of a batch, for an attention that applies it; the half-split layout."""

    cos: Tensor
    """`[max_positions, head_dim / 2]` float32, as is `sin`."""
    sin: Tensor
    positions: Tensor
    """`[num_tokens]` int64"""


@dataclass(frozen=True, slots=True)
class HeadNormWeights:
    """RMSNorm of each head before the rotation (Qwen3)."""

    query: Tensor
    """`[head_dim]`, as is `key`."""
    key: Tensor
    eps: float


class ProjectedAttention(ABC):
    """An `Attention` that takes queries, keys and values as they come from the projection.

    On a GPU one kernel then does what would be half a dozen small ones, each of which takes longer to launch and to
    start than to run.
    """

    @abstractmethod
    def attend_projected(
        self, layer: int, projected: Tensor, rotary: RotaryTables, head_norm: HeadNormWeights | None
    ) -> Tensor:
        """As `attend`, with norm of heads and rotation before it.

        `projected` `[num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]`: queries, keys and values side by side.
        """


class DecoderModel(Protocol):
    """A decoder-only language model."""

    config: ModelConfig
    dtype: torch.dtype
    """Of activations, and so of keys and values."""

    def forward(self, token_ids: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """Final hidden states (normalized) `[num_tokens, hidden_size]`; both arguments are `[num_tokens]` int64."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `[n, vocab_size]` in float32 of hidden states `[n, hidden_size]`."""
        ...
