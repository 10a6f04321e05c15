"""`agentserve doctor`: what this machine can do, what is missing, and what `serve` would do."""

from __future__ import annotations

import argparse
import json
import os
import textwrap
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from agentserve.cli.options import add_options, resolve_options

if TYPE_CHECKING:
    from agentserve.build.doctor import Diagnosis
    from agentserve.cli.types import Verbs

OPTIONS = ("model", "load_format", "dtype", "executor", "gpu", "host", "port")
"""Those of `agentserve serve` that decide what it would do."""

_STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "problem": "bold red"}
_SUMMARIES = (
    "Nothing is missing.",
    "It serves, but something that you may want is missing: see the warnings.",
    "It cannot serve: see the problems.",
)


def add_parser(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "doctor",
        help="say what this machine can do and what is missing",
        description="Looks at driver, GPUs, Python packages, processor, memory, models and the address, says what "
        "that means and what to do, and what `serve` would choose with the same options. Nothing is installed, "
        "downloaded or changed. Exit code 0: nothing is missing; 1: there are warnings; 2: `serve` cannot start.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="findings and the facts behind them as JSON")
    add_options(parser, OPTIONS)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    config = resolve_options(arguments, os.environ).config
    # Imported here, so that `--help` and wrong options answer at once.
    from agentserve.build.doctor import diagnose
    from agentserve.build.probe import SystemProbe

    diagnosis = diagnose(config, SystemProbe())
    if arguments.json:
        print(json.dumps(diagnosis.to_json(), indent=1))
    else:
        _print(diagnosis)
    return diagnosis.exit_code


def _print(diagnosis: Diagnosis) -> None:
    console = Console(soft_wrap=True, highlight=False, markup=False)
    width = max(len(finding.topic) for finding in diagnosis.findings)
    indent = " " * (len("problem") + 2 + width + 2)
    for finding in diagnosis.findings:
        sign = Text(f"{finding.severity.value:<9}", style=_STYLES[finding.severity.value])
        console.print(sign + Text(f"{finding.topic:<{width}}  {' '.join(finding.text.split())}"))
        if finding.advice:
            console.print(Text(textwrap.indent(f"-> {finding.advice}", indent), style="dim"))
    console.print(f"\n{_SUMMARIES[diagnosis.exit_code]}")
