"""Hermes and Qwen: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`."""

from __future__ import annotations

from agentserve.text.tools.parser import JsonCallParser

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class HermesParser(JsonCallParser):
    """Calls without the opening tag at the start of an answer and without the closing tag are accepted, too."""

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
        marker = self._show_until([OPEN])
        if marker is None:
            return False
        self._expect_call(marker, self._behind)
        return True

    def _behind(self) -> bool:
        self._skip_space()
        if self._buffer.startswith(CLOSE) or (self._at_end and CLOSE.startswith(self._buffer)):
            self._take(len(CLOSE))
        elif self._may_become(CLOSE):
            return False
        self._state = self._text
        return True
