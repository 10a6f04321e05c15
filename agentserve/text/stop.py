"""Stop strings in a stream of text."""

from __future__ import annotations

from collections.abc import Iterable


class StopStringMatcher:
    """Finds the first stop string in a text that arrives in pieces, however it is cut.

    The first one is the one that is complete first; of several that end together, the longest. Text that may be the
    beginning of a stop string is held back, and nothing else.

    Each character is looked at once for each stop string (the automaton of Knuth, Morris and Pratt).
    """

    def __init__(self, stops: Iterable[str], include: bool = False) -> None:
        """`include` keeps the stop string at the end of the text. Empty stop strings are our own bug."""
        # The longest first, so that it wins when several end together.
        self._stops = sorted(set(stops), key=len, reverse=True)
        assert all(self._stops), "an empty stop string"
        self._fallbacks = [_fallbacks(stop) for stop in self._stops]
        self._num_matched = [0] * len(self._stops)
        self._include = include
        self._held = ""
        self._is_done = False

    def push(self, text: str) -> tuple[str, str | None]:
        """Takes more text; returns what may be shown by now, and the stop string once one is complete.

        After a match, nothing is returned any more.
        """
        if self._is_done:
            return "", None
        pending = self._held + text
        for position, character in enumerate(text, start=len(self._held) + 1):
            stop = self._advance(character)
            if stop is not None:
                self._is_done = True
                self._held = ""
                return pending[: position if self._include else position - len(stop)], stop
        num_held = max(self._num_matched, default=0)
        num_safe = len(pending) - num_held
        self._held = pending[num_safe:]
        return pending[:num_safe], None

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        self._is_done = True
        return held

    def _advance(self, character: str) -> str | None:
        for index, stop in enumerate(self._stops):
            matched = self._num_matched[index]
            while matched and stop[matched] != character:
                matched = self._fallbacks[index][matched - 1]
            if stop[matched] == character:
                matched += 1
            self._num_matched[index] = matched
            if matched == len(stop):
                return stop
        return None


def _fallbacks(stop: str) -> list[int]:
    """For each prefix of `stop`, the length of the longest proper prefix of it that is also its suffix."""
    lengths = [0]
    matched = 0
    for character in stop[1:]:
        while matched and stop[matched] != character:
            matched = lengths[matched - 1]
        if stop[matched] == character:
            matched += 1
        lengths.append(matched)
    return lengths
