"""`ModelConfig` from the metadata of a GGUF file. Needs neither torch nor the `gguf` package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from agentserve.errors import ModelFormatError, UnsupportedModelError
from agentserve.models.checks import check_architecture, check_sizes
from agentserve.models.config import ModelConfig, RopeScaling
from agentserve.models.gguf_file import GGUFHeader

_CONTROL = 3
"""`tokenizer.ggml.token_type` of special tokens."""
_END_OF_TURN = frozenset(
    {"<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"},
)
"""GGUF has room for one end token, models have several: those that end a turn are known by name."""

T = TypeVar("T")


def read_gguf_config(header: GGUFHeader) -> ModelConfig:
    """The shape that the header describes.

    Raises ModelFormatError when an entry is missing or has the wrong type, and UnsupportedModelError for another
    architecture or a feature that is not supported.
    """
    metadata = _Metadata(header)
    architecture = check_architecture(metadata.get("general.architecture", str), str(header.path))
    prefix = f"{architecture}."
    if metadata.get(prefix + "expert_count", int, 0) > 0:
        raise UnsupportedModelError(f"{header.path} is a mixture of experts, which is not supported")
    if metadata.get("split.count", int, 0) > 1:
        raise UnsupportedModelError(f"{header.path} is one of several parts; merge them into one file first")
    num_heads = metadata.get(prefix + "attention.head_count", int)
    hidden_size = metadata.get(prefix + "embedding_length", int)
    head_dim = metadata.get(prefix + "attention.key_length", int, hidden_size // max(num_heads, 1))
    if metadata.get(prefix + "rope.dimension_count", int, head_dim) != head_dim:
        raise UnsupportedModelError(f"{header.path} rotates only a part of each head, which is not supported")
    config = ModelConfig(
        architecture=architecture,
        vocab_size=_vocab_size(metadata, prefix, header),
        hidden_size=hidden_size,
        intermediate_size=metadata.get(prefix + "feed_forward_length", int),
        num_layers=metadata.get(prefix + "block_count", int),
        num_heads=num_heads,
        num_kv_heads=metadata.get(prefix + "attention.head_count_kv", int, num_heads),
        head_dim=head_dim,
        max_position_embeddings=metadata.get(prefix + "context_length", int),
        rms_norm_eps=metadata.get(prefix + "attention.layer_norm_rms_epsilon", float),
        rope_theta=metadata.get(prefix + "rope.freq_base", float, 10000.0),
        tie_word_embeddings="output.weight" not in header.tensors,
        eos_token_ids=end_token_ids(header.metadata),
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id", int, None),
        rope_scaling=_rope_scaling(metadata, prefix, header),
        attention_bias=architecture == "qwen2",
    )
    check_sizes(config, str(header.path))
    return config


def end_token_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """The tokens that end a turn, the one that the file names first, without duplicates."""
    named = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    tokens, types = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    pairs = zip(tokens, types, strict=False) if isinstance(tokens, list) and isinstance(types, list) else ()
    known = [index for index, (token, kind) in enumerate(pairs) if kind == _CONTROL and token in _END_OF_TURN]
    return tuple(dict.fromkeys(token_id for token_id in [*named, *known] if isinstance(token_id, int)))


_MISSING: Any = object()


class _Metadata:
    """Typed access, with errors that name the file and the key."""

    def __init__(self, header: GGUFHeader) -> None:
        self._header = header

    def get(self, key: str, kind: type[T], default: Any = _MISSING) -> T:
        value = self._header.metadata.get(key, default)
        if value is _MISSING:
            raise ModelFormatError(f"{self._header.path} has no metadata entry {key!r}")
        if value is default:
            return value  # type: ignore[no-any-return]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ModelFormatError(f"metadata entry {key!r} of {self._header.path} is {value!r:.60}")
        return value


def _vocab_size(metadata: _Metadata, prefix: str, header: GGUFHeader) -> int:
    # The embedding is what counts: the list of tokens may be shorter (padding) and the entry may be absent.
    embedding = header.tensors.get("token_embd.weight")
    if embedding is not None and len(embedding.shape) == 2:
        return embedding.shape[0]
    return metadata.get(prefix + "vocab_size", int)


def _rope_scaling(metadata: _Metadata, prefix: str, header: GGUFHeader) -> RopeScaling | None:
    # Llama 3 scaling is no metadata: it is the tensor `rope_freqs.weight`, which the loader applies.
    kind = metadata.get(prefix + "rope.scaling.type", str, "none")
    if kind == "none":
        return None
    if kind == "linear":
        return RopeScaling("linear", metadata.get(prefix + "rope.scaling.factor", float))
    raise UnsupportedModelError(f"{header.path} uses rotary scaling {kind!r}, which is not supported")
