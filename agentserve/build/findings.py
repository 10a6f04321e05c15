"""What the doctor says: lines with a sign."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    """How much a finding matters."""

    OK = "ok"
    NOTE = "note"  # good to know
    WARNING = "warning"  # something that a user would want is missing
    PROBLEM = "problem"  # `serve` cannot start


@dataclass(frozen=True, slots=True)
class Finding:
    """A line of the report."""

    topic: str
    severity: Severity
    text: str
    """What was found and what that means."""
    advice: str = ""
    """What to do about it; empty if nothing needs doing."""


def gib(num_bytes: int) -> str:
    """`1.5` for 1.5 GiB."""
    return f"{num_bytes / 2**30:.1f}"


def dotted(version: tuple[int, int]) -> str:
    """`13.0`."""
    return f"{version[0]}.{version[1]}"
