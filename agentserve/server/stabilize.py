"""`--stabilize REGEX`: what matches in a system prompt stays what it was when the session began."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import regex  # type: ignore[import-untyped]

from agentserve.errors import ConfigError

logger = logging.getLogger(__name__)
_TIMEOUT_S = 0.1
"""For one pattern and one text. A pattern that needs more is given up."""
_MAX_TEXTS = 4096
_MAX_MATCHES = 64
_MAX_LENGTH = 1024
"""Matches beyond these stay as they are."""


@dataclass(frozen=True, slots=True)
class _Match:
    pattern: int
    value: str


_Part = str | _Match


class Stabilizer:
    """Replaces what patterns match by what they matched first in the same session. May be used from any thread.

    The n-th match of a pattern gets the value of the n-th match in the first text that was the same but for its
    matches; so prompts of several agents in one session do not get each other's values. Bounded: the texts that were
    seen longest ago are forgotten.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        """Raises ConfigError for what is no regular expression, or matches the empty text."""
        self._sources = tuple(patterns)
        self._patterns = [_compile(pattern) for pattern in patterns]
        self._given_up: set[int] = set()
        self._lock = threading.Lock()
        self._first_values: OrderedDict[tuple[object, bytes], list[str]] = OrderedDict()
        self.num_replaced = 0
        """Matches that were replaced by another value."""

    @property
    def is_active(self) -> bool:
        return len(self._given_up) < len(self._patterns)

    def apply(self, scope: object, text: str) -> str:
        """The text as it is to be read. `scope` is hashable and names the session."""
        if not text or not self.is_active:
            return text
        parts: list[_Part] = [text]
        for index in range(len(self._patterns)):
            parts = self._split(index, parts)
        values = [part.value for part in parts if isinstance(part, _Match)]
        if not values:
            return text
        key = (scope, _shape(parts))
        with self._lock:
            first = self._first_values.setdefault(key, values)
            self._first_values.move_to_end(key)
            if len(self._first_values) > _MAX_TEXTS:
                self._first_values.popitem(last=False)
            self.num_replaced += sum(old != new for old, new in zip(first, values, strict=True))
        frozen = iter(first)
        return "".join(next(frozen) if isinstance(part, _Match) else part for part in parts)

    def _split(self, index: int, parts: list[_Part]) -> list[_Part]:
        """The same with the matches of a pattern taken out of the literal parts."""
        if index in self._given_up:
            return parts
        split: list[_Part] = []
        num_matches = 0
        try:
            for part in parts:
                if isinstance(part, _Match):
                    split.append(part)
                    continue
                at = 0
                for match in self._patterns[index].finditer(part, timeout=_TIMEOUT_S, concurrent=True):
                    num_matches += 1
                    if match.start() == match.end() or len(match[0]) > _MAX_LENGTH or num_matches > _MAX_MATCHES:
                        continue
                    split += [part[at : match.start()], _Match(index, match[0])]
                    at = match.end()
                split.append(part[at:])
        except TimeoutError:
            self._given_up.add(index)
            logger.warning("--stabilize %r takes too long for a system prompt and is given up", self._sources[index])
            return parts
        return split


def _shape(parts: list[_Part]) -> bytes:
    """The same for texts that differ in their matches only."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        text = f"\0{part.pattern}\0" if isinstance(part, _Match) else f"{len(part)}:{part}"
        digest.update(text.encode("utf-8", "replace"))
    return digest.digest()


def _compile(pattern: str) -> Any:
    try:
        compiled = regex.compile(pattern)
        matches_nothing = compiled.fullmatch("", timeout=_TIMEOUT_S) is not None
    except (regex.error, TimeoutError, RecursionError, OverflowError) as error:
        raise ConfigError(f"--stabilize {pattern!r} is no regular expression: {error}") from None
    if not pattern or matches_nothing:
        raise ConfigError(f"--stabilize {pattern!r} matches the empty text")
    return compiled
