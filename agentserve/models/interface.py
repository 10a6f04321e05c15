"""What an executor needs of a model, and a model of an executor.

A model computes on a flat batch: the tokens of all chunks one after the other, with no batch dimension and no padding.
It knows nothing of requests, blocks or lanes; `Attention` hides them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
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


class FusedOperations(Protocol):
    """What lies between the matrix products of a layer, each as one kernel."""

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """`residual += x`, then the RMSNorm of the sum, in the memory of `x`; `x`, `residual` `[n, width]`."""
        ...

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """`silu(gate) * up` of `[n, 2 * width]`, gates first: `[n, width]`, perhaps in the memory of the gates."""
        ...


class ProjectedAttention(ABC):
    """An `Attention` that takes queries, keys and values as they come from the projection.

    On a GPU one kernel then does what would be half a dozen small ones, each of which takes longer to launch and to
    start than to run. Where it is so, the rest of a layer is fused as well: with `operations`.
    """

    operations: FusedOperations

    @abstractmethod
    def attend_projected(
        self, layer: int, projected: Tensor, rotary: RotaryTables, head_norm: HeadNormWeights | None
    ) -> Tensor:
        """As `attend`, with norm of heads and rotation before it.

        `projected` `[num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]`: queries, keys and values side by side.
        """


class Product(Enum):
    """Matrix products of a decoder layer, as they are computed: some of them for several linear layers at once."""

    QKV = ("q_proj", "k_proj", "v_proj")
    OUTPUT = ("o_proj",)
    GATE = ("gate_proj",)
    UP = ("up_proj",)
    GATE_UP = ("gate_proj", "up_proj")
    DOWN = ("down_proj",)


class LayerAdapters(Protocol):
    """The LoRA adapters of a batch, in one layer."""

    def add(self, product: Product, x: Tensor, y: Tensor, first_row: int = 0) -> None:
        """`y += s (x A^T) B^T`, in place and for each row with its adapter, if it has one.

        Args:
            product: of which `y` is the result.
            x: `[n, num_inputs]`, what went into it.
            y: `[n, num_outputs]`; those of several linear layers lie side by side.
            first_row: of the batch that `x` begins with.
        """
        ...


class BatchAdapters(Protocol):
    """The LoRA adapters of a batch."""

    def layer(self, index: int) -> LayerAdapters:
        """Those of a layer, from 0."""
        ...


class DecoderModel(Protocol):
    """A decoder-only language model."""

    config: ModelConfig
    dtype: torch.dtype
    """Of activations, and so of keys and values."""

    def forward(
        self, token_ids: Tensor, positions: Tensor, attention: Attention, adapters: BatchAdapters | None = None
    ) -> Tensor:
        """Final hidden states (normalized) `[num_tokens, hidden_size]`; the tensors are `[num_tokens]` int64."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `[n, vocab_size]` in float32 of hidden states `[n, hidden_size]`."""
        ...
