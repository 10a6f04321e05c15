"""Qwen3-Coder: `<tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>`."""

from __future__ import annotations

import json

from agentserve.text.tools.parser import BufferedParser, find_first, longest_partial
from agentserve.text.tools.types import coerce, property_types

OPEN, CLOSE = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"
VALUE_ENDS = ("\n" + PARAMETER_END, PARAMETER_END, "\n" + PARAMETER, "\n" + FUNCTION_END)
"""Models forget the closing tag of a value; what follows counts as its end only at the start of a line."""


class QwenXmlParser(BufferedParser):
    """Values get the types that the tool's schema says. Values of type string are passed on while they arrive, others
    when they are complete."""

    _markup = ""
    _key = ""
    _value = ""
    _types: frozenset[str] = frozenset()

    def _start(self) -> bool:
        self._state = self._text
        return True

    def _text(self) -> bool:
        marker = self._show_until([OPEN, FUNCTION])
        if marker is None:
            return False
        self._markup = marker
        self._state = self._name if marker == FUNCTION else self._opened
        return True

    def _opened(self) -> bool:
        self._markup += self._skip_space()
        if self._may_become(FUNCTION):
            return False
        if self._buffer.startswith(FUNCTION):
            self._markup += self._take(len(FUNCTION))
            self._state = self._name
        else:
            self._no_call()
        return True

    def _no_call(self) -> None:
        self._show(self._markup)
        self._state = self._text

    def _name(self) -> bool:
        """The rest of the tag with the function's name, which is one line."""
        name, end, _ = self._buffer.partition(">")
        if "\n" in name or "<" in name or (not end and self._at_end) or (end and not name.strip()):
            self._no_call()
            return True
        if not end:
            return False
        self._take(len(name) + 1)
        self._begin_call(name.strip())
        self._state = self._between
        return True

    def _between(self) -> bool:
        """Within a call, outside of values."""
        self._skip_space()
        if self._buffer.startswith(PARAMETER):
            return self._open_parameter()
        if self._may_become(PARAMETER, FUNCTION_END, CLOSE, OPEN, FUNCTION):
            return False
        is_whole = self._buffer.startswith((FUNCTION_END, CLOSE, OPEN, FUNCTION))
        if self._buffer.startswith(FUNCTION_END):
            self._take(len(FUNCTION_END))
        elif self._at_end and not is_whole:
            self._take(len(self._buffer))  # a part of a tag that was cut off
        if is_whole:
            self._add_arguments("}" if self._arguments else "{}")
        self._end_call(complete=is_whole)
        self._state = self._behind if is_whole else self._text
        return True

    def _behind(self) -> bool:
        self._skip_space()
        if self._buffer.startswith(CLOSE) or (self._at_end and CLOSE.startswith(self._buffer)):
            self._take(len(CLOSE))
        elif self._may_become(CLOSE):
            return False
        self._state = self._text
        return True

    # ---- values ----

    def _open_parameter(self) -> bool:
        key, end, rest = self._buffer[len(PARAMETER) :].partition(">")
        if not end or not rest:  # the value's first character decides
            if self._at_end:
                self._cut_off()
            return self._at_end
        self._take(len(PARAMETER) + len(key) + 1)
        if rest[0] == "\n":
            self._take(1)
        self._key = key.strip()
        self._value = ""
        tool = self._tools.get(self._called)
        self._types = property_types(None if tool is None else tool.parameters, self._key)
        opening = f"{', ' if self._arguments else '{'}{json.dumps(self._key, ensure_ascii=False)}: "
        self._add_arguments(opening + ('"' if self._is_text else ""))
        self._state = self._in_value
        return True

    @property
    def _is_text(self) -> bool:
        return self._types == {"string"}

    def _in_value(self) -> bool:
        at, marker = find_first(self._buffer, VALUE_ENDS)
        if marker is None:
            num_held = 0 if self._at_end else longest_partial(self._buffer, VALUE_ENDS)
            self._add_value(self._take(len(self._buffer) - num_held))
            if self._at_end:
                self._cut_off()
            return self._at_end
        self._add_value(self._take(at))
        self._take(len(marker) if marker.endswith(PARAMETER_END) else 1)
        self._add_arguments('"' if self._is_text else coerce(self._value, self._types))
        self._state = self._between
        return True

    def _add_value(self, text: str) -> None:
        if self._is_text:
            self._add_arguments(json.dumps(text, ensure_ascii=False)[1:-1])
        else:
            self._value += text

    def _cut_off(self) -> None:
        self._take(len(self._buffer))
        self._end_call(complete=False)
        self._state = self._text
