"""The command line: one module a verb.

Exit codes: 0 done, 1 the verb's answer is no (a replay that differs, a machine that lacks something), 2 wrong usage or
input, in one line.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from agentserve import __version__
from agentserve.cli import doctor, env, profile, replay, serve, simulate
from agentserve.errors import AgentServeError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code."""
    arguments = _parser().parse_args(argv)
    if arguments.run is None:
        _parser().print_help()
        return 2
    try:
        return int(arguments.run(arguments))
    except AgentServeError as error:
        print(f"agentserve: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    # Abbreviated options would make every new option a possible break.
    parser = argparse.ArgumentParser(
        prog="agentserve", description="A serving daemon for local agents.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"agentserve {__version__}")
    parser.set_defaults(run=None)
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND")
    serve.add_parser(verbs)
    profile.add_parser(verbs)
    replay.add_parser(verbs)
    simulate.add_parser(verbs)
    doctor.add_parser(verbs)
    env.add_parser(verbs)
    return parser
