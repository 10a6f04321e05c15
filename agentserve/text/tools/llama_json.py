"""Llama 3.1 and later: `{"name": ..., "parameters": {...}}`, perhaps behind `<|python_tag|>`, several behind `;`."""

from __future__ import annotations

from agentserve.text.tools.parser import MarkedJsonParser

TAG = "<|python_tag|>"
_SEPARATORS = ";,"


class LlamaJsonParser(MarkedJsonParser):
    """Without the tag a call is recognized at the start of an answer only, by the name of a known tool."""

    marker = TAG
    _pending = ""
    """What stood between two calls, if there are two."""

    def _behind(self) -> bool:
        """After a call: another one, or text."""
        self._pending += self._skip_space()
        if not self._buffer:
            if self._at_end:  # a separator with nothing behind it
                self._pending = ""
            return False
        if self._buffer[0] in _SEPARATORS and not self._pending.strip():
            self._pending += self._take(1)
            return True
        if self._may_become(TAG):
            return False
        markup, self._pending = self._pending, ""
        if self._buffer.startswith(TAG):
            self._expect_call(markup + self._take(len(TAG)), self._behind)
        elif self._buffer.startswith("{"):
            self._expect_call(markup, self._behind, known_only=True)
        else:
            self._show(markup)
            self._state = self._text
        return True
