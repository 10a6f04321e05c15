"""JSON that arrives in pieces, written the way models write it, as JSON the way parsers want it."""

from __future__ import annotations

import json
import re
from enum import Enum

_SPACE = " \t\n\r"
_WORDS = {"true": "true", "false": "false", "null": "null", "True": "true", "False": "false", "None": "null"}
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_WORD_CHARACTER = re.compile(r"[A-Za-z0-9+.\-]")
_ESCAPES = '"\\/bfnrt'
_HEX = "0123456789abcdefABCDEF"


class Status(Enum):
    """How far a value is."""

    OPEN = "open"
    DONE = "done"
    FAILED = "failed"


class _Expect(Enum):
    VALUE = "value"
    VALUE_OR_END = "value or ]"
    KEY = "key"
    KEY_OR_END = "key or }"
    COLON = "colon"
    NEXT = "comma or end"


class JsonNormalizer:
    """Passes one JSON value through, character by character, and mends what models often get wrong.

    Mended are raw control characters in strings, unknown escapes, single quotes, Python's `True`, `False` and `None`,
    and commas before a closing bracket. What has been returned so far is always the beginning of valid JSON. A value
    that cannot be mended ends in `Status.FAILED`; the characters that are not in the output by then are in `pending`.

    A number or a word at the top level ends only with the character behind it.
    """

    def __init__(self) -> None:
        self.status = Status.OPEN
        self.pending = ""
        """Characters that were taken and are not in the output yet."""
        self._stack: list[str] = []
        self._expect = _Expect.VALUE
        self._quote = ""
        self._in_key = False
        self._escape = ""
        self._word = ""
        self._comma = ""
        """A comma and the space behind it, kept until it is known that something follows."""
        self._out: list[str] = []

    def push(self, text: str) -> tuple[str, int]:
        """Takes characters until the value ends; returns the output and how many characters were taken."""
        taken = 0
        while taken < len(text) and self.status is Status.OPEN:
            taken += self._take(text[taken])
        output = "".join(self._out)
        self._out.clear()
        return output, taken

    def _take(self, character: str) -> int:
        """1 if the character was taken, 0 if it is to be looked at again or does not belong to the value."""
        if self._quote:
            return self._in_string(character)
        if self._word:
            if _WORD_CHARACTER.match(character):
                self._word += character
                self.pending += character
                return 1
            self._end_word()
            return 0
        if character in _SPACE:
            if self._comma:
                self._comma += character
                self.pending += character
            else:
                self._out.append(character)
            return 1
        return self._structure(character)

    def _structure(self, character: str) -> int:
        expect = self._expect
        if character in "}]" and self._closes(character):
            self._comma = self.pending = ""
            self._stack.pop()
            self._out.append(character)
            self._value_done()
        elif expect is _Expect.NEXT and character == ",":
            self._comma = self.pending = ","
            self._expect = _Expect.KEY if self._stack[-1] == "{" else _Expect.VALUE
        elif expect is _Expect.COLON and character == ":":
            self._out.append(":")
            self._expect = _Expect.VALUE
        elif expect in {_Expect.KEY, _Expect.KEY_OR_END} and character in "\"'":
            self._open_string(character, is_key=True)
        elif expect in {_Expect.VALUE, _Expect.VALUE_OR_END}:
            return self._begin_value(character)
        else:
            self.status = Status.FAILED
            return 0
        return 1

    def _closes(self, character: str) -> bool:
        if not self._stack or (self._stack[-1] == "{") != (character == "}"):
            return False
        return bool(self._comma) or self._expect in {_Expect.NEXT, _Expect.KEY_OR_END, _Expect.VALUE_OR_END}

    def _begin_value(self, character: str) -> int:
        if character in "{[":
            self._release_comma()
            self._stack.append(character)
            self._out.append(character)
            self._expect = _Expect.KEY_OR_END if character == "{" else _Expect.VALUE_OR_END
        elif character in "\"'":
            self._open_string(character, is_key=False)
        elif _WORD_CHARACTER.match(character):
            self._word = character
            self.pending += character
        else:
            self.status = Status.FAILED
            return 0
        return 1

    def _open_string(self, quote: str, *, is_key: bool) -> None:
        self._release_comma()
        self._quote, self._in_key = quote, is_key
        self._out.append('"')

    def _release_comma(self) -> None:
        self._out.append(self._comma)
        self._comma = self.pending = ""

    def _end_word(self) -> None:
        word = _WORDS.get(self._word) or (self._word if _NUMBER.fullmatch(self._word) else None)
        if word is None:
            self.status = Status.FAILED
            return
        self._word = ""
        self._release_comma()
        self._out.append(word)
        self._value_done()

    def _value_done(self) -> None:
        self._expect = _Expect.NEXT
        if not self._stack:
            self.status = Status.DONE

    def _in_string(self, character: str) -> int:
        if self._escape:
            return self._in_escape(character)
        if character == "\\":
            self._escape = self.pending = character
        elif character == self._quote:
            self._quote = ""
            self._out.append('"')
            if self._in_key:
                self._expect = _Expect.COLON
            else:
                self._value_done()
        elif character == '"' or character < " ":
            self._out.append(json.dumps(character)[1:-1])
        else:
            self._out.append(character)
        return 1

    def _in_escape(self, character: str) -> int:
        escape = self._escape + character
        if len(escape) == 2 and character in _ESCAPES:
            self._end_escape(escape)
            return 1
        if len(escape) == 2 and character == "'":
            self._end_escape("'")
            return 1
        if (len(escape) == 2 and character == "u") or (len(escape) > 2 and character in _HEX):
            self._escape = self.pending = escape
            if len(escape) == 6:
                self._end_escape(escape)
            return 1
        # No escape after all: the backslash stands for itself.
        self._end_escape("\\\\" + self._escape[1:])
        return 0

    def _end_escape(self, output: str) -> None:
        self._out.append(output)
        self._escape = self.pending = ""
