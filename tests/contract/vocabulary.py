"""A vocabulary as small as that of the tiny models, for grammars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

EOS = 150


class SmallTokenizer:
    """ASCII, a token for each character; the tokens behind it are special, and one of them ends a text."""

    vocab_size = 160
    eos_token_ids = (EOS,)
    bos_token_id: int | None = None
    special_tokens: Mapping[str, str] = MappingProxyType({})
    strips_leading_space = False

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        del add_special_tokens
        return list(text.encode("ascii", "replace"))

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        del skip_special_tokens
        return b"".join(self.token_bytes(token_id) for token_id in token_ids).decode()

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 128 else b""

    def is_special(self, token_id: int) -> bool:
        return token_id >= 128
