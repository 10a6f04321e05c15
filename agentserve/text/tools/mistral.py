"""Mistral: `[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]`, or `[TOOL_CALLS]name[ARGS]{...}` for each call."""

from __future__ import annotations

import re

from agentserve.text.tools.json_stream import JsonNormalizer, Status
from agentserve.text.tools.parser import JsonCallParser

CALLS, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_LONGEST_ID = 256
"""Characters, from `[CALL_ID]` to the end of `[ARGS]`."""
_NAME = re.compile(r"[A-Za-z0-9_.:/\-]+")


class MistralParser(JsonCallParser):
    """Both forms, and a lone object in place of the array."""

    _json: JsonNormalizer
    _is_array = False

    def _start(self) -> bool:
        self._state = self._text
        return True

    def _text(self) -> bool:
        if self._show_until([CALLS]) is None:
            return False
        self._markup = CALLS
        self._state = self._which_form
        return True

    def _which_form(self) -> bool:
        self._markup += self._skip_space()
        if not self._buffer:
            return self._no_call() if self._at_end else False
        self._is_array = self._buffer[0] == "["
        if self._is_array:
            self._expect_call(self._markup + self._take(1), self._between)
        elif self._buffer[0] == "{":
            self._expect_call(self._markup, self._to_text)
        else:
            self._state = self._named
        return True

    def _no_call(self) -> bool:
        self._show(self._markup)
        self._state = self._text
        return True

    def _to_text(self) -> bool:
        self._skip_space()
        if not self._buffer:
            return False
        self._state = self._text
        return True

    # ---- the array ----

    def _between(self) -> bool:
        self._skip_space()
        if not self._buffer:
            return False
        if self._buffer[0] == ",":
            self._expect_call(self._take(1), self._between)
            return True
        if self._buffer[0] == "]":
            self._take(1)
            self._state = self._to_text
        else:
            self._state = self._text
        return True

    # ---- name and arguments ----

    def _named(self) -> bool:
        name = _NAME.match(self._buffer)
        if name is None:
            return self._no_call()
        behind = self._buffer[name.end() :].lstrip()
        if not self._at_end and (not behind or _is_prefix(behind, (ARGS, CALL_ID))):
            return False
        if behind.startswith(CALL_ID):
            at = behind.find(ARGS, 0, _LONGEST_ID)
            if at < 0 and not self._at_end and len(behind) < _LONGEST_ID:
                return False
            behind = behind[at:] if at >= 0 else behind
        rest = behind.removeprefix(ARGS).lstrip()
        if not rest and not self._at_end:
            return False
        if not rest.startswith("{"):
            return self._no_call()
        self._take(len(self._buffer) - len(rest))
        self._begin_call(name.group())
        self._json = JsonNormalizer()
        self._state = self._in_arguments
        return True

    def _in_arguments(self) -> bool:
        output, num_taken = self._json.push(self._buffer)
        self._take(num_taken)
        self._add_arguments(output)
        if self._json.status is Status.DONE:
            self._end_call()
            self._state = self._to_text
            return True
        if self._json.status is Status.FAILED or self._at_end:
            self._end_call(complete=False)
            if self._json.status is Status.FAILED:
                self._show(self._json.pending)
            self._state = self._text
            return True
        return False


def _is_prefix(text: str, markers: tuple[str, ...]) -> bool:
    return any(marker.startswith(text) and marker != text for marker in markers)
