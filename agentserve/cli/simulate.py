"""`agentserve simulate`: what would another GPU, policy, number of agents or of instances do?"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from agentserve.errors import ConfigError
from agentserve.sim.cells import Cell, expand, flag, varying
from agentserve.sim.workloads import WORKLOADS

if TYPE_CHECKING:
    from agentserve.cli.types import Verbs
    from agentserve.sim.sweep import Plan, Result

RESULTS_NAME, TABLE_NAME = "results.json", "table.txt"
_TABLE_WIDTH = 240


def add_parser(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "simulate",
        help="predict what a workload would do on other hardware or with another policy",
        description="Runs a workload through the daemon's own control plane on a virtual clock, with the timing of a "
        "device profile. Every option but --tool-allow, --out and --jobs takes a list, as in --gpu rtx-5090,rtx-4090 "
        "--agents 1,2,4: then all combinations are simulated, and those that --out holds already are not simulated "
        "again. With a "
        "recording (`serve --record`) as the workload, options that are not given are those of the recorded daemon, "
        "and what was recorded is printed beside the prediction.",
        epilog="Workloads: " + "; ".join(f"{name}: {what}" for name, what in WORKLOADS.items()) + ".",
        allow_abbrev=False,
    )
    groups: dict[str, Any] = {}
    for option in dataclasses.fields(Cell):
        section = option.metadata["section"]
        group = groups.setdefault(section, parser.add_argument_group(section))
        default = "" if option.default is None else f" (default: {option.default})"
        text = option.metadata["help"] + default
        action = "store" if option.metadata["is_list"] else "append"
        group.add_argument(flag(option.name), dest=option.name, metavar="X", action=action, help=text)
    group = parser.add_argument_group("the run itself")
    group.add_argument("--out", type=Path, metavar="DIR", help="write results as JSON, a table and pictures to DIR")
    group.add_argument("--jobs", metavar="N", help="processes (default: the processor's cores); results are the same")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    num_jobs = _num_jobs(arguments.jobs)
    names = [option.name for option in dataclasses.fields(Cell)]
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    cells = expand({name: "\n".join(value) if isinstance(value, list) else value for name, value in given.items()})
    out: Path | None = arguments.out
    if out is not None and out.exists() and not out.is_dir():
        raise ConfigError(f"cannot write to {out}: it is not a directory")
    # Imported here, so that `--help` and wrong options answer at once.
    from agentserve.build.simulation import make_plans

    # Everything that is wrong comes up here, before anything is written.
    plans = make_plans(cells)
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    results = _simulate(plans, num_jobs, out, console)
    for note in dict.fromkeys(note for plan in plans for note in plan.notes):
        console.print(f"note: {note}")
    text = _report(plans, results, varying(cells))
    print(text, end="")
    if out is not None:
        _write(results, varying(cells), text, out, console)
    return 0


def _num_jobs(text: str | None) -> int:
    if text is None:
        return os.cpu_count() or 1
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"--jobs: must be a positive number, not {text!r}")
    return int(text)


def _simulate(plans: Sequence[Plan], num_jobs: int, out: Path | None, console: Console) -> list[Result]:
    from agentserve.build.simulation import run_plan
    from agentserve.sim.sweep import run_sweep

    if len(plans) > 1:
        with _progress(console, len(plans)) as advance:
            return run_sweep(plans, run_plan, num_jobs=num_jobs, directory=out, on_done=advance)
    (plan,) = plans
    with _progress(console, sum(len(program.turns) for program in plan.workload.programs)) as advance:
        return run_sweep(plans, lambda plan: run_plan(plan, advance), num_jobs=1, directory=out)


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Callable[[], None]]:
    """A bar on a terminal; nothing elsewhere."""
    if not console.is_terminal:
        yield lambda: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    with Progress(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)


# ---- what is said and kept ----


def _report(plans: Sequence[Plan], results: Sequence[Result], names: Sequence[str]) -> str:
    """The table, and for a recording the comparison, as text of a fixed width."""
    from agentserve.sim.report import comparison, refusals, table

    console = Console(width=_TABLE_WIDTH, color_system=None, highlight=False, markup=False, force_terminal=False)
    with console.capture() as capture:
        for line in dict.fromkeys(plan.conditions for plan in plans):
            console.print(line)
        for line in dict.fromkeys(f"{plan.title}: {plan.workload.description}" for plan in plans):
            console.print(line)
        console.print()
        console.print(table(results, names))
        for line in refusals(results, names):
            console.print(line)
        for result in results:
            if result["recorded"] is not None:
                label = ", ".join(f"{flag(name)[2:]} {result['parameters'][name]}" for name in names)
                console.print(f"\nthe recording beside the prediction{': ' * bool(label)}{label}")
                console.print(comparison(result))
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


def _write(results: Sequence[Result], names: Sequence[str], text: str, out: Path, console: Console) -> None:
    from agentserve.sim.report import is_comparable, without_series

    collected = json.dumps({"varying": list(names), "results": [without_series(r) for r in results]}, indent=1)
    from agentserve.sim.sweep import replace_file

    replace_file(out / RESULTS_NAME, collected + "\n")
    replace_file(out / TABLE_NAME, text)
    if importlib.util.find_spec("matplotlib") is None:
        console.print("note: no pictures, because matplotlib is not installed")
        return
    from agentserve.sim.plots import draw_all

    try:
        shown = [result for result in results if is_comparable(result, names)]
        if shown:
            draw_all(shown, names, out)
    except OSError as error:
        raise ConfigError(f"cannot write pictures to {out}: {error.strerror}") from None
    console.print(f"written: {out}")
