"""Thinking in a model's text: what stands between `<think>` and `</think>` at the start of an answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from agentserve.text.tools.parser import find_first, longest_partial
from agentserve.text.tools.spec import Piece, ReasoningPiece, TextPiece


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """How a model marks its thinking."""

    name: str
    open: str
    close: str

    def is_open_in(self, prompt: str) -> bool:
        """Whether the prompt ends with the opening tag, so that the answer starts with thinking."""
        return prompt.rstrip().endswith(self.open)


THINK = ReasoningFormat("think", "<think>", "</think>")
MISTRAL_THINK = ReasoningFormat("mistral", "[THINK]", "[/THINK]")


class ReasoningParser:
    """Splits a text that arrives in pieces into thinking and the rest, however it is cut.

    The tags and the blank lines next to them belong to neither. An opening tag counts only at the start of the text.
    """

    def __init__(self, format: ReasoningFormat, *, is_open: bool) -> None:
        """`is_open`: the prompt has opened the block already."""
        self._format = format
        self._buffer = ""
        self._at_end = False
        self._pieces: list[Piece] = []
        self._newlines = ""
        """At the end of the thinking so far: dropped if it ends there."""
        self._has_thought = False
        self._state: Callable[[], bool] = self._begin if is_open else self._start

    def push(self, text: str) -> list[Piece]:
        """`ReasoningPiece`s and `TextPiece`s that are certain by now."""
        self._buffer += text
        while self._state():
            pass
        pieces, self._pieces = self._pieces, []
        return pieces

    def finish(self) -> list[Piece]:
        """The rest, at the end of the text."""
        self._at_end = True
        return self.push("")

    def _take(self, num_characters: int) -> str:
        taken, self._buffer = self._buffer[:num_characters], self._buffer[num_characters:]
        return taken

    def _start(self) -> bool:
        stripped = self._buffer.lstrip()
        tag = self._format.open
        if stripped.startswith(tag):
            self._buffer = stripped[len(tag) :]
            self._state = self._begin
        elif not self._at_end and tag.startswith(stripped):
            return False
        else:
            self._state = self._text
        return True

    def _begin(self) -> bool:
        self._buffer = self._buffer.lstrip("\n")
        # A model that opens the block although the prompt did.
        tag = self._format.open
        if not self._at_end and tag.startswith(self._buffer) and self._buffer != tag:
            return False
        self._buffer = self._buffer.removeprefix(tag)
        self._state = self._thinking
        return True

    def _thinking(self) -> bool:
        close = self._format.close
        at, marker = find_first(self._buffer, [close])
        if marker is not None:
            self._think(self._take(at))
            self._take(len(close))
            self._state = self._behind
            return True
        num_held = 0 if self._at_end else longest_partial(self._buffer, [close])
        self._think(self._take(len(self._buffer) - num_held))
        return False

    def _think(self, text: str) -> None:
        text = self._newlines + text if self._has_thought else text.lstrip("\n")
        shown = text.rstrip("\n")
        self._newlines = text[len(shown) :]
        if shown:
            self._has_thought = True
            self._pieces.append(ReasoningPiece(shown))

    def _behind(self) -> bool:
        self._buffer = self._buffer.lstrip("\n")
        if not self._buffer:
            return False
        self._state = self._text
        return True

    def _text(self) -> bool:
        if self._buffer:
            self._pieces.append(TextPiece(self._take(len(self._buffer))))
        return False
