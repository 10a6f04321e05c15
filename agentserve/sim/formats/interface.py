"""What a reader of a format returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from agentserve.sim.programs import Program
from agentserve.sim.records import Notes, Record, Source


@dataclass(frozen=True, slots=True)
class Trace:
    """The programs of a file, in its order, with their arrival times."""

    programs: tuple[Program, ...]
    notes: tuple[str, ...] = ()
    """What the file says, but the programs do not."""


Reader: TypeAlias = Callable[[Source, int | None], Trace]
"""Reads at most the first so many records of a source (None: all). Raises WorkloadError with file, line and field."""


def output_tokens(record: Record, name: str, notes: Notes) -> int:
    """The number of generated tokens; at least 1, since a request without one cannot be served. That is noted."""
    num_tokens = record.integer(name, 0)
    if num_tokens == 0:
        notes.add("requests without an output generate 1 token, so that their prompts are computed")
    return max(1, num_tokens)
