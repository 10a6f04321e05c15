"""Hermes and Qwen: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`."""

from __future__ import annotations

from agentserve.text.tools.parser import MarkedJsonParser

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class HermesParser(MarkedJsonParser):
    """Calls without the opening tag at the start of an answer and without the closing tag are accepted, too."""

    marker = OPEN

    def _behind(self) -> bool:
        self._skip_space()
        if self._buffer.startswith(CLOSE) or (self._at_end and CLOSE.startswith(self._buffer)):
            self._take(len(CLOSE))
        elif self._may_become(CLOSE):
            return False
        self._state = self._text
        return True
