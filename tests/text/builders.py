"""Tokenizers for tests."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from agentserve.text.tokenizer import Tokenizer, load_tokenizer


def gguf_source(metadata: dict[str, Any], eos_token_ids: tuple[int, ...] = ()) -> Any:
    """A `TextSource` with this GGUF metadata."""
    return SimpleNamespace(
        name="fake",
        kind="gguf",
        path=Path("fake.gguf"),
        config=SimpleNamespace(eos_token_ids=eos_token_ids),
        gguf_metadata=lambda: metadata,
    )


def hf_source(path: Path | None, eos_token_ids: tuple[int, ...] = ()) -> Any:
    """A `TextSource` of a Hugging Face directory."""
    return SimpleNamespace(name="fake", kind="hf", path=path, config=SimpleNamespace(eos_token_ids=eos_token_ids))


def sentencepiece_metadata() -> dict[str, Any]:
    """A little vocabulary in the manner of Llama 2: three special tokens, all bytes, a few pieces with scores."""
    pieces = ["\u2581", "a", "b", "c", "\u2581a", "ab", "\u2581ab", "bc", "abc"]
    scores = [-9.0, -9.0, -9.0, -9.0, -3.0, -2.0, -4.0, -1.0, -5.0]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], *pieces],
        "tokenizer.ggml.scores": [0.0] * 259 + scores,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def sentencepiece_tokenizer() -> Tokenizer:
    return load_tokenizer(gguf_source(sentencepiece_metadata()))
