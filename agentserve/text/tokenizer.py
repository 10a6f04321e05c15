"""Tokenizers: the protocol, the one of a model's own files, and one that needs no files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

from tokenizers import Tokenizer as RustTokenizer

from agentserve.errors import InvalidRequestError, UnknownModelError, UnsupportedModelError
from agentserve.text.gguf_tokenizer import build_gguf_tokenizer
from agentserve.text.hf_tokenizer import build_hf_tokenizer
from agentserve.text.source import TextSource


class Tokenizer(Protocol):
    """Text to token ids and back. All methods may be called from any thread."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids: valid ones are `0 <= id < vocab_size`."""
        ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a generation."""
        ...

    @property
    def bos_token_id(self) -> int | None: ...

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """What chat templates call `bos_token`, `eos_token` and the like."""
        ...

    @property
    def strips_leading_space(self) -> bool:
        """Whether `decode` drops one space at the start of a text."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of `text`. Special tokens that are written out in `text` are recognized.

        `add_special_tokens` puts the model's begin-of-text token in front, if it wants one; rendered chat templates
        have it already. Raises InvalidRequestError for text that is no Unicode (a lone surrogate).
        """
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`. Ids without a token have no text; bytes that are no UTF-8 become U+FFFD."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to a text, special or not. Half a character is possible."""
        ...

    def is_special(self, token_id: int) -> bool: ...


class FastTokenizer:
    """A `Tokenizer` over the `tokenizers` library."""

    def __init__(
        self, tokenizer: RustTokenizer, *, eos_token_ids: Iterable[int] = (), special_tokens: Mapping[str, str]
    ) -> None:
        """`eos_token_ids` in addition to `special_tokens["eos_token"]`.

        Raises UnsupportedModelError if the tokens' text does not follow from each token alone.
        """
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._is_byte_level, self.strips_leading_space = _decoder_kind(tokenizer)
        self._special_ids = frozenset(
            token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special
        )
        self._bytes: dict[int, bytes] = {}
        self.special_tokens = MappingProxyType(dict(special_tokens))
        # Not the number of tokens: ids may have gaps.
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.bos_token_id = self._id_of("bos_token")
        own = self._id_of("eos_token")
        self.eos_token_ids = tuple(dict.fromkeys([*eos_token_ids, *([] if own is None else [own])]))

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        try:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:  # what the library raises for a str that has no UTF-8 form
            check_text(text)
            raise AssertionError("the tokenizer refused a valid text") from error

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        known = self._bytes.get(token_id)
        if known is None:
            token = self._tokenizer.id_to_token(token_id)
            known = b"" if token is None else self._to_bytes(token)
            self._bytes[token_id] = known
        return known

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def _id_of(self, key: str) -> int | None:
        token = self.special_tokens.get(key)
        return None if token is None else self._tokenizer.token_to_id(token)

    def _to_bytes(self, token: str) -> bytes:
        if self._is_byte_level:
            try:
                return bytes([_BYTE_OF[character] for character in token])
            except KeyError:  # an added token with, say, a space in it stands for itself
                return token.encode()
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace("\u2581", " ").encode()


class ByteTokenizer:
    """One token a byte, and three special ones: for simulated runs without any files."""

    SPECIAL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")

    vocab_size = 256 + len(SPECIAL)
    eos_token_ids = (257, 258)
    bos_token_id: int | None = None
    special_tokens: Mapping[str, str] = MappingProxyType({"eos_token": "<|im_end|>"})
    strips_leading_space = False

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        del add_special_tokens  # there is no begin-of-text token
        check_text(text)
        token_ids: list[int] = []
        while text:
            found = [(at, index) for index, token in enumerate(self.SPECIAL) if (at := text.find(token)) >= 0]
            at, index = min(found, default=(len(text), -1))
            token_ids += text[:at].encode()
            if index < 0:
                break
            token_ids.append(256 + index)
            text = text[at + len(self.SPECIAL[index]) :]
        return token_ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return b"".join(
            self.token_bytes(token_id)
            for token_id in token_ids
            if not (skip_special_tokens and self.is_special(token_id))
        ).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        if token_id < 256:
            return bytes([token_id])
        return self.SPECIAL[token_id - 256].encode() if token_id < self.vocab_size else b""

    def is_special(self, token_id: int) -> bool:
        return 256 <= token_id < self.vocab_size


def load_tokenizer(source: TextSource) -> Tokenizer:
    """The tokenizer of a model's files.

    Raises UnknownModelError when there are no files, ModelFormatError or UnsupportedModelError when they cannot be
    used.
    """
    if source.path is None:
        raise UnknownModelError(f"no tokenizer of {source.name} was found on this machine")
    if source.kind == "gguf":
        tokenizer, special_tokens = build_gguf_tokenizer(source.gguf_metadata())
    else:
        tokenizer, special_tokens = build_hf_tokenizer(source.path)
    eos_token_ids = () if source.config is None else source.config.eos_token_ids
    return FastTokenizer(tokenizer, eos_token_ids=eos_token_ids, special_tokens=special_tokens)


def check_text(text: str) -> None:
    r"""Raises InvalidRequestError for a lone surrogate, which JSON can hide in `\ud800`."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(f"the text is no valid Unicode: lone surrogate at character {error.start}") from error


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-ins that GPT-2's byte-level vocabularies use for bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(others)}


_BYTE_OF: Mapping[str, int] = MappingProxyType(_byte_alphabet())


def _decoder_kind(tokenizer: RustTokenizer) -> tuple[bool, bool]:
    """Whether tokens are byte-level, and whether a leading space is dropped."""
    state = tokenizer.decoder.__getstate__() if tokenizer.decoder is not None else b"null"
    decoder: Any = json.loads(state) or {}
    steps = decoder.get("decoders", [decoder]) if decoder else []
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return True, False
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and kinds[3:] in ([], ["Strip"]):
        return False, kinds[3:] == ["Strip"]
    raise UnsupportedModelError(f"the tokenizer decodes with {' + '.join(kinds) or 'nothing'}, which is not supported")
