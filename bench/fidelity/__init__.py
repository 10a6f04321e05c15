"""`bench/run.py fidelity`: how far the simulator is from the daemon, measured on the same programs."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from agentserve.errors import AgentServeError


def main(argv: Sequence[str]) -> int:
    """The verb `fidelity` of `bench/run.py`; returns the exit code. See `bench.fidelity.command`."""
    # Imported here: the parts of this package are used without the command line, too.
    from bench.fidelity.command import main as run  # noqa: PLC0415

    try:
        return run(argv)
    except AgentServeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
