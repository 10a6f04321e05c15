"""What all tool-call parsers share: a buffer, text that is shown as soon as it is certain, and the pieces of a call."""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar, Protocol

from agentserve.text.tools.json_call import JsonCallReader
from agentserve.text.tools.json_stream import Status
from agentserve.text.tools.spec import (
    Piece,
    TextPiece,
    ToolArgumentsDelta,
    ToolCallFinished,
    ToolCallStarted,
    ToolSpec,
)


class ToolCallParser(Protocol):
    """Finds tool calls in a text that arrives in pieces.

    However the text is cut, the pieces are the same once neighbouring ones of a kind are joined. What looks like a call
    and is none is shown as text. Raises nothing, whatever the model writes.
    """

    def push(self, text: str) -> list[Piece]:
        """What is certain with `text`."""
        ...

    def finish(self) -> list[Piece]:
        """The rest, at the end of the text. A call that is cut off ends with `complete=False`."""
        ...


def new_call_id() -> str:
    """`call_` and 24 hexadecimal digits."""
    return f"call_{secrets.token_hex(12)}"


class PlainParser:
    """The parser of an answer in which no calls are looked for."""

    def push(self, text: str) -> list[Piece]:
        return [TextPiece(text)] if text else []

    def finish(self) -> list[Piece]:
        return []


class BufferedParser(ABC):
    """A state machine over a buffer. A state is a method that says whether it got on; if not, it waits for more text.

    Space before and behind calls is markup, so that space at the end of a text is held back.
    """

    def __init__(self, tools: Sequence[ToolSpec], new_id: Callable[[], str] = new_call_id) -> None:
        self._tools = {tool.name: tool for tool in tools}
        self._new_id = new_id
        self._buffer = ""
        self._at_end = False
        self._pieces: list[Piece] = []
        self._space = ""
        self._num_calls = 0
        self._called = ""
        self._arguments: list[str] = []
        self._state: Callable[[], bool] = self._start

    def push(self, text: str) -> list[Piece]:
        self._buffer += text
        self._run()
        return self._drain()

    def finish(self) -> list[Piece]:
        self._at_end = True
        self._run()
        self._show(self._take(len(self._buffer)))
        if not self._num_calls and self._space:
            self._pieces.append(TextPiece(self._space))
        return self._drain()

    @abstractmethod
    def _start(self) -> bool:
        """The first state. At the end of the text every state takes all of the buffer or leaves it to be shown."""

    def _run(self) -> None:
        while self._state():
            pass

    def _drain(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces

    # ---- the buffer ----

    def _take(self, num_characters: int) -> str:
        taken, self._buffer = self._buffer[:num_characters], self._buffer[num_characters:]
        return taken

    def _skip_space(self) -> str:
        """Takes the space at the front of the buffer."""
        return self._take(len(self._buffer) - len(self._buffer.lstrip()))

    def _may_become(self, *markers: str) -> bool:
        """Whether more text could make the buffer start with one of `markers`, with which it does not start yet."""
        return not self._at_end and any(marker.startswith(self._buffer) for marker in markers)

    # ---- text ----

    def _show(self, text: str) -> None:
        text = self._space + text
        shown = text.rstrip()
        self._space = text[len(shown) :]
        if shown:
            self._pieces.append(TextPiece(shown))

    def _show_until(self, markers: Sequence[str]) -> str | None:
        """Shows text up to the first of `markers`, which is taken and returned; else all that cannot be part of one."""
        at, marker = find_first(self._buffer, markers)
        if marker is not None:
            self._show(self._take(at))
            return self._take(len(marker))
        num_held = 0 if self._at_end else longest_partial(self._buffer, markers)
        self._show(self._take(len(self._buffer) - num_held))
        return None

    # ---- calls ----

    def _begin_call(self, name: str) -> None:
        self._space = ""
        self._called = name
        self._arguments.clear()
        self._pieces.append(ToolCallStarted(self._num_calls, self._new_id(), name))

    def _add_arguments(self, text: str) -> None:
        if text:
            self._arguments.append(text)
            self._pieces.append(ToolArgumentsDelta(self._num_calls, text))

    def _end_call(self, *, complete: bool = True) -> None:
        arguments = "".join(self._arguments)
        self._pieces.append(ToolCallFinished(self._num_calls, self._called, arguments, complete))
        self._num_calls += 1


class JsonCallParser(BufferedParser):
    """For formats whose calls, or their arguments, are JSON objects."""

    _reader: JsonCallReader
    _markup = ""
    """What led to this call; it is shown if the call turns out to be none."""
    _after: Callable[[], bool]
    _has_begun = False

    def _expect_call(self, markup: str, after: Callable[[], bool], *, known_only: bool = False) -> None:
        """The next state reads a call, and goes on to `after`. `known_only`: the name must be that of a tool."""
        self._markup, self._after, self._has_begun = markup, after, False
        self._reader = JsonCallReader(self._tools.__contains__) if known_only else JsonCallReader()
        self._state = self._in_call

    def _in_call(self) -> bool:
        reader = self._reader
        arguments, num_taken = reader.push(self._buffer)
        self._take(num_taken)
        if reader.has_started and not self._has_begun:
            assert reader.name is not None
            self._has_begun = True
            self._begin_call(reader.name)
        if self._has_begun:
            self._add_arguments(arguments)
        if reader.status is Status.OPEN and not self._at_end:
            return False
        # Models forget the last brace: what there is of the call is whole all the same.
        if reader.is_whole:
            self._end_call()
            self._state = self._after
            return True
        self._state = self._text
        if not self._has_begun:
            self._show(self._markup + reader.raw)
        else:
            self._end_call(complete=False)
            if reader.status is Status.FAILED:
                self._show(reader.tail)
        return True

    @abstractmethod
    def _text(self) -> bool:
        """The state outside of calls."""


def find_first(text: str, markers: Iterable[str]) -> tuple[int, str | None]:
    """Where the first of `markers` is, and which; the longest of several at one place."""
    found = [(at, -len(marker), marker) for marker in markers if (at := text.find(marker)) >= 0]
    if not found:
        return -1, None
    at, _, marker = min(found)
    return at, marker


def longest_partial(text: str, markers: Iterable[str]) -> int:
    """The length of the longest end of `text` that one of `markers` starts with, and is longer."""
    longest = 0
    for marker in markers:
        for length in range(min(len(marker) - 1, len(text)), longest, -1):
            if text.endswith(marker[:length]):
                longest = length
                break
    return longest


class MarkedJsonParser(JsonCallParser):
    """For formats whose calls are JSON objects behind a marker. At the start of an answer it may be missing."""

    marker: ClassVar[str]

    @abstractmethod
    def _behind(self) -> bool:
        """The state behind a call."""

    def _start(self) -> bool:
        stripped = self._buffer.lstrip()
        if not stripped:
            return False
        if stripped.startswith("{"):
            self._expect_call(self._skip_space(), self._behind, known_only=True)
        else:
            self._state = self._text
        return True

    def _text(self) -> bool:
        marker = self._show_until([self.marker])
        if marker is None:
            return False
        self._expect_call(marker, self._behind)
        return True
