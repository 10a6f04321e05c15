"""`agentserve profile`: measure the device with a model, fit a profile to it and write that to a file."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from agentserve.cli.options import add_options, resolve_options
from agentserve.config import ServeConfig
from agentserve.errors import ConfigError

if TYPE_CHECKING:
    from agentserve.build import Measurable
    from agentserve.cli.types import Verbs
    from agentserve.profiles import ProfileOrigin
    from agentserve.profiles.fit import FitReport
    from agentserve.runtime.calibration import Progress as CalibrationProgress

OPTIONS = (
    "model",
    "load_format",
    "dtype",
    "max_model_len",
    "executor",
    "gpu",
    "max_num_seqs",
    "block_size",
    "kv_cache_memory",
    "seed",
)
"""Those of `agentserve serve` that matter to a measurement."""

_QUIET_SHARE = 0.05
"""Others that use less of the processor than this are not worth a word."""


def add_parser(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "profile",
        help="measure the device and write a profile for `serve --profile`",
        description="Runs batches of many shapes on every partition of the device, alone and side by side, fits the "
        "cost model to their durations and writes the result to a file. Nothing else should run meanwhile. Options "
        "that are shared with `serve` can be set where `serve` takes them from.",
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, default=Path("profile.json"), metavar="FILE", help="default: %(default)s")
    parser.add_argument("--force", action="store_true", help="overwrite FILE")
    parser.add_argument("--quick", action="store_true", help="what the daemon measures when it starts: seconds")
    add_options(parser, OPTIONS)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    # A profile that the daemon uses is none of our business: this verb is what makes it.
    config = dataclasses.replace(resolve_options(arguments, os.environ).config, profile=None)
    out: Path = arguments.out
    _check_writable(out, arguments.force)
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    # Imported here, so that `--help` and wrong options answer at once.
    from agentserve.build import build_executor
    from agentserve.cli.machine import Neighbours
    from agentserve.profiles import save_profile

    target = build_executor(config, report=console.print)
    try:
        neighbours = Neighbours()
        fit = _measure(target, arguments.quick, out.stem, console)
        disturbance = _disturbance(target, neighbours.share())
    finally:
        target.executor.close()
    for note in (*target.notes, *disturbance):
        console.print(f"note: {note}")
    origin = _origin(target, fit, disturbance, _command(config, arguments.quick, out))
    save_profile(out, fit.profile, origin, fit.residuals)
    print(f"Error of the fit, predicted / measured - 1, by kind of batch:\n{fit}\nwritten: {out}")
    return 0


def _check_writable(out: Path, force: bool) -> None:
    """Before minutes are spent. Raises ConfigError."""
    if out.is_dir():
        raise ConfigError(f"cannot write the profile {out}: it is a directory")
    if not out.parent.is_dir():
        raise ConfigError(f"cannot write the profile {out}: there is no directory {out.parent}")
    if out.exists() and not force:
        raise ConfigError(f"{out} exists; --force overwrites it")


def _measure(target: Measurable, quick: bool, name: str, console: Console) -> FitReport:
    from agentserve.runtime.calibration import calibrate
    from agentserve.runtime.calibration_grid import Grid

    capabilities = target.executor.capabilities()
    table = capabilities.partition_table()
    grid = (Grid.quick if quick else Grid.full)(table, target.limits)
    sheet = dataclasses.replace(target.sheet, name=name)
    if not capabilities.simulated:
        from agentserve.cli.machine import describe_processor

        sheet = dataclasses.replace(sheet, description=f"{capabilities.device}: {describe_processor()}")
    console.print(f"measuring {target.model_name} on {capabilities.device}: {len(grid.cases)} cases")
    with _progress(console) as report:
        return calibrate(target.executor, grid, sheet, target.model_shape, report)


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[CalibrationProgress], None]]:
    """A bar on a terminal, else a line for every tenth of the way."""
    if console.is_terminal:
        columns = (BarColumn(), TextColumn("{task.percentage:3.0f}%"), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.description}"), console=console, transient=True) as bar:
            task = bar.add_task("", total=None)
            yield lambda progress: bar.update(
                task, completed=progress.num_done, total=progress.num_cases, description=progress.label
            )
        return
    reached = -1

    def report(progress: CalibrationProgress) -> None:
        nonlocal reached
        tenths = 10 * progress.num_done // progress.num_cases
        if tenths > reached:
            reached = tenths
            console.print(f"{10 * tenths} % {progress.label}".rstrip())

    yield report


# ---- where the numbers come from ----


def _disturbance(target: Measurable, share: float) -> tuple[str, ...]:
    """What to say if the device was not ours alone."""
    if target.executor.capabilities().simulated or share < _QUIET_SHARE:
        return ()
    return (f"other processes used {share:.0%} of the processor during the measurement, which makes it unreliable",)


def _origin(target: Measurable, fit: FitReport, disturbance: tuple[str, ...], command: str) -> ProfileOrigin:
    from agentserve.cli.machine import commit, describe_machine
    from agentserve.profiles import ProfileOrigin

    simulated = target.executor.capabilities().simulated
    num_samples = sum(residual.num_samples for residual in fit.residuals)
    source = f"{num_samples} medians of timed batches" + (f" of simulated {target.sheet.name}" if simulated else "")
    medians = [residual.median for residual in fit.residuals]
    return ProfileOrigin(
        provenance="estimated" if simulated else "measured",
        source="; ".join((source, *disturbance)),
        expected_error=f"median {min(medians):.1%} to {max(medians):.1%} by kind of batch, "
        f"p95 up to {max(residual.p95 for residual in fit.residuals):.1%}",
        model=target.model_name,
        dtype=target.dtype,
        machine=describe_machine(),
        commit=commit(),
        command=command,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )


def _command(config: ServeConfig, quick: bool, out: Path) -> str:
    """What makes the file again, wherever the options came from."""
    words = ["agentserve", "profile"]
    for option in dataclasses.fields(ServeConfig):
        value = getattr(config, option.name)
        if option.name in OPTIONS and value != option.default:
            words += ["--" + option.name.replace("_", "-"), str(value)]
    return shlex.join([*words, *(["--quick"] if quick else []), "--out", out.name])
