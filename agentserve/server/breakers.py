"""What breaks a prefix: the first difference between two texts that should be the same, and what kind it is of."""

from __future__ import annotations

import re
from dataclasses import dataclass

from agentserve.server.prefix import common_length

_AROUND = 40
"""Characters of context on each side of a difference."""
_MAX_SHOWN = 120
_WINDOW = 80
"""Characters on each side of a difference in which its kind is looked for."""
_MONTH = r"(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)[a-z]*\.?"
_DATE = (
    r"\d{4}[-/.]\d{1,2}[-/.]\d{1,2}|\d{1,2}[-/.]\d{1,2}[-/.]\d{2,4}|"
    rf"\d{{1,2}}\.? {_MONTH} \d{{4}}|{_MONTH} \d{{1,2}}(?:, \d{{4}})?"
)
_TIME = r"\d{1,2}:\d{2}(?::\d{2}(?:[.,]\d+)?)?(?:Z|[+-]\d\d:?\d\d| ?[AP]M)?"
_KINDS = (
    ("uuid", r"[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}"),
    ("billing", r"\bcch=[0-9A-Za-z]+"),
    ("timestamp", rf"(?:(?:{_DATE})(?:T|,? |, at ))?{_TIME}"),
    ("timestamp", r"\b1[5-9]\d{8}(?:\d{3}|\.\d+)?\b"),
    ("date", _DATE),
    ("path", r"(?<![\w.])(?:~|\.{1,2}|[A-Za-z]:)?[/\\][^\s\"'<>]+"),
    ("hash", r"\b(?=[0-9a-f]*\d)(?=[0-9a-f]*[a-f])[0-9a-f]{7,64}\b"),
    ("counter", r"\d+(?:[.,]\d+)?%?"),
)
_COMPILED = tuple((kind, pattern, re.compile(pattern)) for kind, pattern in _KINDS)


@dataclass(frozen=True, slots=True)
class Difference:
    """Where two texts part, and why."""

    at: int
    """Characters that both begin with."""
    kind: str
    """`timestamp`, `date`, `uuid`, `hash`, `billing`, `path`, `counter`, or `text` for anything else."""
    old: str
    new: str
    """What stands there, cut to a length that can be shown."""
    before: str
    after: str
    """What stands around it in the new text."""
    pattern: str | None
    """A regular expression for what changes, None for `text`."""

    @property
    def place(self) -> str:
        """What stands before it, without digits: the same for the next change in the same place."""
        return re.sub(r"\d+", "#", self.before[-24:])


def find_difference(old: str, new: str) -> Difference | None:
    """The first difference, None if there is none. Linear in the texts; the search for a kind sees its line only."""
    if old == new:
        return None
    at = common_length(old, new)
    for kind, pattern, compiled in _COMPILED:
        old_span, new_span = _match_at(compiled, old, at), _match_at(compiled, new, at)
        if old_span is not None and new_span is not None and old_span[0] == new_span[0]:
            return _Pair(old, new, at).difference(kind, pattern, old_span, new_span)
    limit = min(len(old), len(new)) - at
    num_same = common_length(old[len(old) - limit :][::-1], new[len(new) - limit :][::-1])
    return _Pair(old, new, at).difference("text", None, (at, len(old) - num_same), (at, len(new) - num_same))


@dataclass(frozen=True, slots=True)
class _Pair:
    old: str
    new: str
    at: int

    def difference(self, kind: str, pattern: str | None, old: tuple[int, int], new: tuple[int, int]) -> Difference:
        """`old` and `new` are begin and end of what differs."""
        return Difference(
            at=self.at,
            kind=kind,
            old=_cut(self.old[slice(*old)]),
            new=_cut(self.new[slice(*new)]),
            before=self.new[max(0, new[0] - _AROUND) : new[0]],
            after=self.new[new[1] : new[1] + _AROUND],
            pattern=pattern,
        )


def _match_at(compiled: re.Pattern[str], text: str, at: int) -> tuple[int, int] | None:
    """The match that covers position `at`, or ends there."""
    low = max(0, at - _WINDOW)
    for match in compiled.finditer(text[low : at + _WINDOW]):
        if low + match.start() <= at <= low + match.end():
            return low + match.start(), low + match.end()
    return None


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."
