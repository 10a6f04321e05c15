"""Tokenizers for tests."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models, pre_tokenizers, trainers

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


_CORPUS = [
    "the quick brown fox jumps over the lazy dog and then the other fox, it's 1234 12345 67890 times",
    "def main(argument): return argument + 1  # a comment about the argument\n\n\n    indented text here",
    "Größe über naïve cafés, 中文字符 and 日本語, the the the and and and to to to of of",
]


class _TrainedBPE:
    """A small byte-level vocabulary, trained once; `vocabulary` and `merges` are for references."""

    def __init__(self) -> None:
        trained = RustTokenizer(models.BPE())
        trained.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=alphabet)
        trained.train_from_iterator(_CORPUS, trainer)
        model = json.loads(trained.to_str())["model"]
        self.vocabulary: dict[str, int] = dict(sorted(model["vocab"].items(), key=lambda item: item[1]))
        self.vocabulary["zq"] = len(self.vocabulary)
        self.merges = [tuple(merge) for merge in model["merges"]]

    def __call__(self, pre: str, *, add_bos: bool | None = None) -> Tokenizer:
        """As a GGUF file with `tokenizer.ggml.pre` would give it, with three special tokens and one user-defined."""
        special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
        tokens = [*self.vocabulary, *special, "<my tool>"]
        metadata: dict[str, Any] = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.merges": [" ".join(merge) for merge in self.merges],
            "tokenizer.ggml.token_type": [1] * len(self.vocabulary) + [3, 3, 3, 4],
            "tokenizer.ggml.bos_token_id": tokens.index("<|im_start|>"),
            "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
        }
        if add_bos is not None:
            metadata["tokenizer.ggml.add_bos_token"] = add_bos
        return load_tokenizer(gguf_source(metadata))


trained_bpe = _TrainedBPE()
