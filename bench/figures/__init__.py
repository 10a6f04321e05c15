"""Counterparts of the figures of AgentServe's paper, from simulated timing and from live runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from agentserve.errors import AgentServeError


def main(argv: Sequence[str]) -> int:
    """The verb `figures` of `bench/run.py`; returns the exit code. See `bench.figures.command`."""
    # Imported here: the parts of this package are used without matplotlib, too.
    from bench.figures.command import main as run  # noqa: PLC0415

    try:
        return run(argv)
    except AgentServeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
