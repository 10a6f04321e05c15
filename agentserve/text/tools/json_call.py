"""A call as a JSON object, `{"name": ..., "arguments": {...}}`, read while it arrives."""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import Enum

from agentserve.text.tools.json_stream import JsonNormalizer, Status

_SPACE = " \t\n\r"
_NAME_KEYS = ("name", "function")
_ARGUMENT_KEYS = ("arguments", "parameters", "args")


class _State(Enum):
    OPEN = "{"
    KEY = "key"
    IN_KEY = "in key"
    COLON = ":"
    VALUE = "value"
    IN_VALUE = "in value"


class JsonCallReader:
    """Reads one call. Keys may come in any order; those that are not about the call are passed over."""

    def __init__(self, accepts: Callable[[str], bool] = bool) -> None:
        """`accepts`: whether a name is that of a tool; the call fails if it is not."""
        self.status = Status.OPEN
        self.name: str | None = None
        self.raw = ""
        """All that was taken."""
        self.tail = ""
        """After a failure: what was taken and is neither name nor arguments that were returned."""
        self._accepts = accepts
        self._state = _State.OPEN
        self._json = JsonNormalizer()
        self._key = ""
        self._value: list[str] = []
        self._kept = ""
        """Arguments that came before the name."""
        self._has_arguments = False
        self._arguments_done = False

    @property
    def is_whole(self) -> bool:
        """Whether name and arguments are complete, even if what is around them is not."""
        return self.name is not None and self._arguments_done

    @property
    def has_started(self) -> bool:
        """Whether it is certain that this is a call, and of what: then its arguments are returned at once."""
        return self.name is not None and self._has_arguments

    def push(self, text: str) -> tuple[str, int]:
        """Takes characters until the call ends; returns the next arguments and how many characters were taken."""
        arguments: list[str] = []
        taken = 0
        while taken < len(text) and self.status is Status.OPEN:
            if self._state in {_State.IN_KEY, _State.IN_VALUE}:
                output, num_taken = self._json.push(text[taken:])
                taken += num_taken
                self._inside(output, arguments)
            else:
                taken += self._outside(text[taken], arguments)
        self.raw += text[:taken]
        if self.status is Status.FAILED:
            self.tail = self._json.pending
        return "".join(arguments), taken

    def _outside(self, character: str, arguments: list[str]) -> int:
        if character in _SPACE:
            return 1
        state = self._state
        if state is _State.OPEN and character == "{":
            self._state = _State.KEY
        elif state is _State.KEY and character == ",":
            pass
        elif state is _State.KEY and character == "}":
            self._end(arguments)
        elif state is _State.COLON and character == ":":
            self._state = _State.VALUE
        elif state is _State.KEY and character in "\"'":
            self._begin(_State.IN_KEY)
            return 0
        elif state is _State.VALUE and self._fits(character):
            self._begin(_State.IN_VALUE)
            return 0
        else:
            self.status = Status.FAILED
            return 0
        return 1

    def _fits(self, character: str) -> bool:
        if self._key in _NAME_KEYS:
            return character in "\"'"
        # Arguments: an object, null, or an object that was put into a string.
        return self._key not in _ARGUMENT_KEYS or (character in "{nN\"'" and not self._has_arguments)

    def _begin(self, state: _State) -> None:
        self._state = state
        self._json = JsonNormalizer()
        self._value.clear()

    def _inside(self, output: str, arguments: list[str]) -> None:
        is_object = self._state is _State.IN_VALUE and self._key in _ARGUMENT_KEYS and self._is_object(output)
        if is_object:
            self._has_arguments = True
            if self.name is None:
                self._kept += output
            else:
                arguments.append(output)
        if not is_object or not self._value:
            self._value.append(output)  # of an object only the beginning matters
        if self._json.status is Status.FAILED:
            self.status = Status.FAILED
        elif self._json.status is Status.DONE:
            self._value_done(arguments)

    def _is_object(self, output: str) -> bool:
        return (self._value[0] if self._value else output).startswith("{")

    def _value_done(self, arguments: list[str]) -> None:
        value = "".join(self._value)
        if self._state is _State.IN_KEY:
            self._key = json.loads(value)
            self._state = _State.COLON
            return
        self._state = _State.KEY
        if self._key in _ARGUMENT_KEYS and self._has_arguments:
            self._arguments_done = True
            self._json = JsonNormalizer()
        elif self._key in _NAME_KEYS:
            name: str = json.loads(value)
            if not self._accepts(name):
                self.status = Status.FAILED
                return
            self.name = name
            arguments.append(self._kept)
            self._kept = ""
        elif self._key in _ARGUMENT_KEYS:
            self._take_scalar(value, arguments)

    def _take_scalar(self, value: str, arguments: list[str]) -> None:
        decoded = json.loads(value)
        text = "{}" if decoded is None else _as_object(decoded)
        if text is None:
            self.status = Status.FAILED
            return
        self._has_arguments = self._arguments_done = True
        if self.name is None:
            self._kept = text
        else:
            arguments.append(text)

    def _end(self, arguments: list[str]) -> None:
        if self.name is None:
            self.status = Status.FAILED
            return
        if not self._has_arguments:
            self._has_arguments = self._arguments_done = True
            arguments.append("{}")
        self.status = Status.DONE


def _as_object(text: object) -> str | None:
    """An object that was written as JSON into a string."""
    if not isinstance(text, str):
        return None
    try:
        value = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        return None
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else None
