"""Qwen2 and Qwen2.5: Llama's layers with biases on queries, keys and values (not on the output)."""

from __future__ import annotations

from agentserve.models.decoder import Decoder, DecoderLayer
from agentserve.models.layers import SelfAttention
from agentserve.models.weights import Weights


class Qwen2(Decoder):
    """A `DecoderModel`."""

    def make_layer(self, weights: Weights, index: int) -> DecoderLayer:
        name = f"model.layers.{index}"
        return DecoderLayer(
            input_norm=self.norm(weights, f"{name}.input_layernorm"),
            attention=SelfAttention(
                self.config,
                index,
                qkv=self.qkv(weights, f"{name}.self_attn", bias=True),
                output=self.attention_output(weights, f"{name}.self_attn"),
            ),
            post_attention_norm=self.norm(weights, f"{name}.post_attention_layernorm"),
            mlp=self.swiglu(weights, f"{name}.mlp"),
        )
