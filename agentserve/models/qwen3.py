"""Qwen3 (dense): no biases; each query and key head is normalized before it is rotated; free choice of head size."""

from __future__ import annotations

from agentserve.models.decoder import Decoder, DecoderLayer
from agentserve.models.layers import HeadNorm, SelfAttention
from agentserve.models.weights import Weights


class Qwen3(Decoder):
    """A `DecoderModel`."""

    def make_layer(self, weights: Weights, index: int) -> DecoderLayer:
        config = self.config
        name = f"model.layers.{index}"
        head_norm = HeadNorm(
            weights.get(f"{name}.self_attn.q_norm.weight", config.head_dim),
            weights.get(f"{name}.self_attn.k_norm.weight", config.head_dim),
            config.num_heads,
            config.num_kv_heads,
            config.rms_norm_eps,
        )
        return DecoderLayer(
            input_norm=self.norm(weights, f"{name}.input_layernorm"),
            attention=SelfAttention(
                config,
                index,
                qkv=self.qkv(weights, f"{name}.self_attn", bias=False),
                output=self.attention_output(weights, f"{name}.self_attn"),
                head_norm=head_norm,
            ),
            post_attention_norm=self.norm(weights, f"{name}.post_attention_layernorm"),
            mlp=self.swiglu(weights, f"{name}.mlp"),
        )
