"""Token ids to text while they arrive."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from agentserve.text.tokenizer import Tokenizer

_LONGEST_CHARACTER = 4
"""Bytes of UTF-8."""


class IncrementalDetokenizer:
    """The text of one growing sequence, in pieces that never change later.

    What `push` and `flush` return adds up to `tokenizer.decode` of all tokens. Half a character is held back until its
    other half comes. The time for a token depends on its own bytes only.

    (SentencePiece tokenizers decode a run of byte tokens that is no UTF-8 to one U+FFFD a byte, which is known only at
    the end of the run; here it is one for each ill-formed sequence, as for byte-level tokenizers.)
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, prompt_token_ids: Sequence[int] = ()
    ) -> None:
        """`prompt_token_ids` come before the first pushed token; their own text is not returned.

        They matter when the prompt ends within a character, and for tokenizers that drop a leading space.
        """
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = tokenizer.strips_leading_space
        tail = b""
        for token_id in reversed(prompt_token_ids):
            tail = self._bytes(token_id) + tail
            if len(tail) >= _LONGEST_CHARACTER:
                break
        if tail:
            self._at_start = False
            self._decoder.decode(tail)

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; may be empty."""
        return self._trim(self._decoder.decode(self._bytes(token_id)))

    def flush(self) -> str:
        """What is left at the end of the sequence: U+FFFD for half a character, else nothing."""
        return self._trim(self._decoder.decode(b"", final=True))

    def _bytes(self, token_id: int) -> bytes:
        if self._skip_special_tokens and self._tokenizer.is_special(token_id):
            return b""
        return self._tokenizer.token_bytes(token_id)

    def _trim(self, text: str) -> str:
        if self._at_start and text:
            self._at_start = False
            return text.removeprefix(" ")
        return text
