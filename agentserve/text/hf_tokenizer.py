"""A tokenizer from a Hugging Face directory."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from agentserve.errors import ModelFormatError

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


def build_hf_tokenizer(directory: Path) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer, and its special tokens by the names that chat templates use.

    `tokenizer.json` is read as it is; a directory with older files only is left to transformers. Raises
    ModelFormatError when there are no such files or they are damaged.
    """
    path = directory / "tokenizer.json"
    tokenizer = _read(path) if path.is_file() else _convert(directory)
    config = read_tokenizer_config(directory)
    special: dict[str, str] = {}
    for key in _SPECIAL:
        value = config.get(key)
        token = value.get("content") if isinstance(value, dict) else value
        if isinstance(token, str):
            special[key] = token
    return tokenizer, special


def read_tokenizer_config(directory: Path) -> dict[str, Any]:
    """`tokenizer_config.json`, empty if there is none. Raises ModelFormatError if it is damaged."""
    path = directory / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFormatError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise ModelFormatError(f"{path} does not hold a JSON object")
    return value


def _read(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise ModelFormatError(f"cannot read {path}: {error}") from error


def _convert(directory: Path) -> Tokenizer:
    transformers = importlib.import_module("transformers")  # takes seconds and is seldom needed
    try:
        loaded = transformers.AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
        backend = getattr(loaded, "backend_tokenizer", None)
    except Exception as error:  # converters of many kinds, errors of many kinds
        reason = " ".join(str(error).split())[:200]
        raise ModelFormatError(f"{directory} holds no usable tokenizer: {reason}") from error
    if not isinstance(backend, Tokenizer):
        raise ModelFormatError(f"{directory} holds no usable tokenizer: it has no tokenizer.json")
    return backend
