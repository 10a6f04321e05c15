"""What all our decoders have in common: embedding, a stack of pre-norm layers, final norm, head."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from agentserve.models.config import ModelConfig
from agentserve.models.interface import (
    Attention,
    BatchAdapters,
    LayerAdapters,
    ProjectedAttention,
    RotaryTables,
)
from agentserve.models.layers import (
    JoinedSwiGLU,
    Linear,
    RMSNorm,
    Rotary,
    Rotation,
    SelfAttention,
    SwiGLU,
    joins_gate_up,
)
from agentserve.models.weights import Weights


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """Attention and MLP, each behind a norm and beside a residual connection."""

    input_norm: RMSNorm
    attention: SelfAttention
    post_attention_norm: RMSNorm
    mlp: SwiGLU | JoinedSwiGLU

    def __call__(
        self, hidden: Tensor, rotation: Rotation, attention: Attention, adapters: LayerAdapters | None
    ) -> Tensor:
        hidden = self.attention(self.input_norm(hidden), rotation, attention, hidden, adapters)
        return self.mlp(self.post_attention_norm(hidden), hidden, adapters)

    def fused(
        self,
        x: Tensor,
        residual: Tensor,
        tables: RotaryTables,
        attention: ProjectedAttention,
        next_norm: RMSNorm,
        *,
        adapters: LayerAdapters | None,
    ) -> Tensor:
        """The layer for normalized rows `x`, which are overwritten; returns them normalized for what comes next.

        `residual` is the stream beside them, added to in place. A norm and the addition before it are one kernel.
        """
        operations = attention.operations
        x = self.attention.fused(x, tables, attention, adapters)
        x = self.mlp.fused(self.post_attention_norm.after_adding(x, residual, operations), operations, adapters)
        return next_norm.after_adding(x, residual, operations)


class Decoder(ABC):
    """A `DecoderModel`; what is special about an architecture is in its `make_layer`."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        """Takes all weights out of `weights`. Raises what `weights.get` raises."""
        self.config = config
        self._embedding = weights.get("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
        self.dtype = self._embedding.dtype
        self.device = self._embedding.device
        # The layers first: a reader of a file then sees its tensors roughly in order, and progress is by layer.
        self._layers = [self.make_layer(weights, index) for index in range(config.num_layers)]
        self._norm = self.norm(weights, "model.norm")
        if config.tie_word_embeddings:
            # Lookup needs the plain matrix, the product a packed one.
            self._head = Linear(self._embedding).pack()
        else:
            self._head = self.linear(weights, "lm_head", config.vocab_size, config.hidden_size)
        self._rotary = Rotary(config, device=self.device, frequency_factors=weights.frequency_factors())

    @abstractmethod
    def make_layer(self, weights: Weights, index: int) -> DecoderLayer:
        """Layer `index`, from 0."""

    def forward(
        self, token_ids: Tensor, positions: Tensor, attention: Attention, adapters: BatchAdapters | None = None
    ) -> Tensor:
        """See `DecoderModel.forward`."""
        hidden = functional.embedding(token_ids, self._embedding)
        if isinstance(attention, ProjectedAttention):
            return self._forward_fused(hidden, self._rotary.tables(positions), attention, adapters)
        rotation = self._rotary.at(positions, self.dtype)
        for index, layer in enumerate(self._layers):
            hidden = layer(hidden, rotation, attention, None if adapters is None else adapters.layer(index))
        return self._norm(hidden)

    def _forward_fused(
        self, residual: Tensor, tables: RotaryTables, attention: ProjectedAttention, adapters: BatchAdapters | None
    ) -> Tensor:
        norms = [*(layer.input_norm for layer in self._layers), self._norm]
        x = norms[0](residual)
        for index, (layer, next_norm) in enumerate(zip(self._layers, norms[1:], strict=True)):
            own = None if adapters is None else adapters.layer(index)
            x = layer.fused(x, residual, tables, attention, next_norm, adapters=own)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """See `DecoderModel.logits`."""
        return self._head.wide(hidden)

    # ---- parts that several architectures share ----

    def linear(self, weights: Weights, name: str, num_outputs: int, num_inputs: int) -> Linear:
        """The linear layer `name`, without bias."""
        return Linear(weights.get(f"{name}.weight", num_outputs, num_inputs)).pack()

    def norm(self, weights: Weights, name: str) -> RMSNorm:
        """The norm `name` over the hidden size."""
        return RMSNorm(weights.get(f"{name}.weight", self.config.hidden_size), self.config.rms_norm_eps)

    def qkv(self, weights: Weights, name: str, *, bias: bool) -> Linear:
        """The projections to queries, keys and values of attention layer `name` as one."""
        config = self.config
        num_rows = {"q": config.num_heads, "k": config.num_kv_heads, "v": config.num_kv_heads}
        parts = {f"{name}.{part}_proj": heads * config.head_dim for part, heads in num_rows.items()}
        weight = torch.cat([weights.get(f"{part}.weight", rows, config.hidden_size) for part, rows in parts.items()])
        if not bias:
            return Linear(weight).pack()
        return Linear(weight, torch.cat([weights.get(f"{part}.bias", rows) for part, rows in parts.items()])).pack()

    def attention_output(self, weights: Weights, name: str) -> Linear:
        """The projection of attention layer `name` back to the hidden size."""
        config = self.config
        return self.linear(weights, f"{name}.o_proj", config.hidden_size, config.num_heads * config.head_dim)

    def swiglu(self, weights: Weights, name: str) -> SwiGLU | JoinedSwiGLU:
        """The MLP `name`."""
        hidden_size, intermediate_size = self.config.hidden_size, self.config.intermediate_size
        if joins_gate_up(self.device, self.dtype):
            gates, ups = (f"{name}.{part}_proj.weight" for part in ("gate", "up"))
            gate_up = torch.cat([weights.get(part, intermediate_size, hidden_size) for part in (gates, ups)])
            return JoinedSwiGLU(
                Linear(gate_up, is_gated=True).pack(),
                self.linear(weights, f"{name}.down_proj", hidden_size, intermediate_size),
            )
        return SwiGLU(
            gate=self.linear(weights, f"{name}.gate_proj", intermediate_size, hidden_size),
            up=self.linear(weights, f"{name}.up_proj", intermediate_size, hidden_size),
            down=self.linear(weights, f"{name}.down_proj", hidden_size, intermediate_size),
        )
