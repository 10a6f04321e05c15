"""A tokenizer from the metadata of a GGUF file.

GGUF states the vocabulary and the merges, but how text is split before merging only as a name; what the name means is
public knowledge from the models' own `tokenizer.json`. `transformers` can convert such files, too, but takes seconds,
does not know `smollm`, and merges whole words that Llama 3 takes as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from agentserve.errors import ModelFormatError, UnsupportedModelError

_CONTROL, _USER_DEFINED = 3, 4
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_2 = _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
_LLAMA_3_NAMES = ("llama3", "llama-v3", "llama-bpe")
_QWEN_2_NAMES = ("qwen2", "deepseek-r1-qwen")
_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def build_gguf_tokenizer(metadata: Mapping[str, Any]) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer, and its special tokens by the names that chat templates use.

    Raises ModelFormatError when something is missing or inconsistent, UnsupportedModelError for a kind of tokenizer
    that is not known.
    """
    tokens = _strings(metadata, "tokens")
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer = _byte_level(metadata, vocabulary)
    elif kind == "llama":
        tokenizer = _sentencepiece(metadata, vocabulary)
    else:
        raise UnsupportedModelError(f"the GGUF file has a tokenizer of kind {kind!r}; supported are gpt2 and llama")
    types = _list(metadata, "token_type") if "tokenizer.ggml.token_type" in metadata else []
    typed = list(zip(tokens, types, strict=False))
    # Both kinds are matched whole before text is split; they have ids already.
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, k in typed if k == _CONTROL])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t, k in typed if k == _USER_DEFINED])
    special = {name: _token(metadata, tokens, key) for name, key in _SPECIAL.items()}
    present = {name: token for name, token in special.items() if token is not None}
    default = kind == "llama" or metadata.get("tokenizer.ggml.pre") in _LLAMA_3_NAMES
    if metadata.get("tokenizer.ggml.add_bos_token", default) and "bos_token" in present:
        bos = present["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])]
        )
    return tokenizer, present


def _byte_level(metadata: Mapping[str, Any], vocabulary: dict[str, int]) -> Tokenizer:
    merges = _merges(metadata)
    name = metadata.get("tokenizer.ggml.pre", "default")
    tokenizer = _bpe(vocab=vocabulary, merges=merges, ignore_merges=name in _LLAMA_3_NAMES)
    if name == "smollm":
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    elif name in _LLAMA_3_NAMES or name in _QWEN_2_NAMES:
        split = Regex(_LLAMA_3 if name in _LLAMA_3_NAMES else _QWEN_2)
        steps = [
            pre_tokenizers.Split(split, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    elif name in {"default", "gpt-2"}:
        steps = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    else:
        raise UnsupportedModelError(f"the GGUF file splits text in the way {name!r}, which is not supported")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if name in _QWEN_2_NAMES:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: Mapping[str, Any], vocabulary: dict[str, int]) -> Tokenizer:
    """BPE over whole texts with byte fallback; merges follow from the scores where the file has none."""
    merges = _merges(metadata) if "tokenizer.ggml.merges" in metadata else _merges_by_score(metadata, vocabulary)
    unknown = _token(metadata, _strings(metadata, "tokens"), "unknown_token_id")
    tokenizer = _bpe(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    prefixed = metadata.get("tokenizer.ggml.add_space_prefix", True)
    prefix = [normalizers.Prepend("\u2581")] if prefixed else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "\u2581")])
    strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _bpe(**arguments: Any) -> Tokenizer:
    try:
        return Tokenizer(models.BPE(**arguments))
    except Exception as error:  # the library has no class of its own for a merge that is not in the vocabulary
        raise ModelFormatError(f"the tokenizer of the GGUF file is inconsistent: {error}") from error


def _merges(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    merges: list[tuple[str, str]] = []
    for merge in _strings(metadata, "merges"):
        left, space, right = merge.partition(" ")
        if not space:
            raise ModelFormatError(f"the tokenizer of the GGUF file is inconsistent: {merge!r} is no merge")
        merges.append((left, right))
    return merges


def _merges_by_score(metadata: Mapping[str, Any], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """SentencePiece joins the pair whose result has the best score: that is a list of merges in order of score."""
    scores = _list(metadata, "scores")
    if len(scores) < len(vocabulary) or not all(isinstance(score, float) for score in scores):
        raise ModelFormatError("the tokenizer of the GGUF file has neither merges nor a score for each token")
    found = [
        (-scores[token_id], vocabulary[token[:cut]], vocabulary[token[cut:]], token[:cut], token[cut:])
        for token, token_id in vocabulary.items()
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    return [(left, right) for _, _, _, left, right in sorted(found)]


def _list(metadata: Mapping[str, Any], key: str) -> list[Any]:
    value = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(value, list):
        raise ModelFormatError(f"the GGUF file has no list tokenizer.ggml.{key}")
    return value


def _strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    value = _list(metadata, key)
    if not all(isinstance(item, str) for item in value):
        raise ModelFormatError(f"tokenizer.ggml.{key} of the GGUF file is no list of strings")
    return value


def _token(metadata: Mapping[str, Any], tokens: list[str], key: str) -> str | None:
    token_id = metadata.get(f"tokenizer.ggml.{key}")
    if token_id is None:
        return None
    if not isinstance(token_id, int) or not 0 <= token_id < len(tokens):
        raise ModelFormatError(f"tokenizer.ggml.{key} of the GGUF file is {token_id!r}, which is no token")
    return tokens[token_id]
