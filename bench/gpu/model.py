"""A model without weights that the daemon can serve: the published shape, and a tokenizer whose tokens are words.

Random weights choose any token of the vocabulary. With a vocabulary of words each of them has a text, and that text is
the same token again when a client sends it back: prefixes are found again as with a real model.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from agentserve.models.aliases import ALIASES
from agentserve.models.config import ModelConfig
from agentserve.text.chat import CHATML
from bench.load.words import WORDS

TINY = ModelConfig(
    architecture="qwen2",
    vocab_size=1024,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=4096,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    tie_word_embeddings=False,
    attention_bias=True,
)
"""For walking through the parts on any machine."""
_SPECIAL = ("<|im_start|>", "<|im_end|>")


def write_model(directory: Path, config: ModelConfig) -> Path:
    """Writes `config.json`, `tokenizer.json` and `tokenizer_config.json`; returns the directory.

    The weights are made by `--load-format dummy`. Raises OSError.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers  # noqa: PLC0415 - is not everywhere

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(_hf_config(config), indent=1), encoding="utf-8")
    # Words that are in the vocabulary are tokens as they are, so that no merges are needed.
    vocabulary = {token: index for index, token in enumerate(_tokens(config.vocab_size - len(_SPECIAL)))}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in _SPECIAL])
    tokenizer.save(str(directory / "tokenizer.json"))
    described = {"eos_token": _SPECIAL[1], "chat_template": CHATML}
    (directory / "tokenizer_config.json").write_text(json.dumps(described), encoding="utf-8")
    return directory


def dummy_model(directory: Path, name: str) -> Path:
    """The directory of a model with the shape of an alias. Raises KeyError for another name."""
    return write_model(directory / name, ALIASES[name].config)


def _tokens(num_tokens: int) -> list[str]:
    """All bytes, the words of the prompts, then made-up words; a word's token begins with its space."""
    from tokenizers.pre_tokenizers import ByteLevel  # noqa: PLC0415

    syllables = [consonant + vowel for consonant in "bcdfghjklmnpqrstvwz" for vowel in "aeiou"]
    made_up = ("".join(parts) for length in (3, 4) for parts in itertools.product(syllables, repeat=length))
    found = dict.fromkeys(sorted(ByteLevel.alphabet()))
    for word in itertools.chain(WORDS, made_up):
        if len(found) >= num_tokens:
            break
        found.setdefault(f"\u0120{word}")
    return list(found)[:num_tokens]


def _hf_config(config: ModelConfig) -> dict[str, object]:
    return {
        "model_type": config.architecture,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
    }
