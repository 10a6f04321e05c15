"""`agentserve replay FILE`: decide a recording again and say whether the decisions are identical."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from agentserve.runtime.replay import replay

if TYPE_CHECKING:
    from agentserve.cli.types import Verbs


def add_parser(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "replay",
        help="reproduce every decision of a recording",
        description="Runs a recording made with `serve --record FILE` through a fresh control plane and compares "
        "what it decides. Exit code 0: identical; 1: a decision differs; 2: the file cannot be read.",
        allow_abbrev=False,
    )
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    report = replay(arguments.file)
    what = f"{report.num_decisions} decisions in {report.num_steps} steps, {report.num_requests} requests ended"
    if report.divergence is not None:
        print(f"different: after {what}\n{report.divergence}")
        return 1
    note = " (the last line of the recording is cut off)" if report.truncated else ""
    print(f"identical: {what}{note}")
    return 0
