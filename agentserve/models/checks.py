"""Checks that every source of a configuration shares."""

from __future__ import annotations

from dataclasses import fields

from agentserve.errors import ModelFormatError, UnsupportedModelError
from agentserve.models.config import ModelConfig

ARCHITECTURES = ("llama", "qwen2", "qwen3")
_LONGEST_WINDOW = 1 << 24
"""A damaged file must not make us allocate tables for a nonsensical window."""


def check_architecture(architecture: str, where: str) -> str:
    """Returns `architecture`. Raises UnsupportedModelError if no model of ours is of that kind."""
    if architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{where} has architecture {architecture!r}; supported are {', '.join(ARCHITECTURES)}"
        )
    return architecture


def check_sizes(config: ModelConfig, where: str) -> None:
    """Raises ModelFormatError unless all sizes are positive and fit together."""
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, bool) or field.name == "bos_token_id":
            continue
        if isinstance(value, int | float) and not 0 < value < float("inf"):
            raise ModelFormatError(f"{where} has {field.name} {value}, which is not positive")
    if config.num_heads % config.num_kv_heads:
        raise ModelFormatError(
            f"{where} has {config.num_heads} heads, which {config.num_kv_heads} key-value heads do not divide"
        )
    if config.max_position_embeddings > _LONGEST_WINDOW:
        raise ModelFormatError(f"{where} has a window of {config.max_position_embeddings} tokens, which cannot be")
    if config.head_dim % 2:
        raise ModelFormatError(f"{where} has head_dim {config.head_dim}; rotary embedding needs an even one")
