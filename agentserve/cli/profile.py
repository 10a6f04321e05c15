"""`agentserve profile`: measure the device with a model, fit a profile to it and write that to a file."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
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
    from agentserve.runtime.recorded_batches import RecordedRuns

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
    parser.add_argument(
        "--recording", type=Path, action="append", metavar="FILE",
        help="a file of `serve --record` with this model on this device: its batches are fitted, too, and the waits "
        "between them, which only a daemon has; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--no-grid", action="store_true",
        help="measure nothing: fit to the recordings alone, starting from the profile that their daemon had",
    )  # fmt: skip
    add_options(parser, OPTIONS)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    runs = _read_runs(arguments)
    # A profile that the daemon uses is none of our business: this verb is what makes it.
    config = dataclasses.replace(resolve_options(arguments, os.environ).config, profile=None)
    out: Path = arguments.out
    _check_writable(out, arguments.force)
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    if arguments.no_grid:
        assert runs is not None, "checked above"
        return _fit_alone(runs, arguments, out)
    # Imported here, so that `--help` and wrong options answer at once.
    from agentserve.build import build_executor
    from agentserve.cli.machine import Neighbours
    from agentserve.profiles import save_profile

    target = build_executor(config, report=console.print)
    try:
        if runs is not None and runs.model != target.model_shape:
            raise ConfigError(f"{arguments.recording[0]} was recorded with another model than {target.model_name}")
        neighbours = Neighbours()
        fit = _measure(target, arguments.quick, out.stem, console, runs)
        disturbance = _disturbance(target, neighbours.share())
    finally:
        target.executor.close()
    for note in (*target.notes, *disturbance):
        console.print(f"note: {note}")
    command = _command(config, arguments.quick, out, arguments.recording or ())
    origin = _origin(target, fit, disturbance, command, 0 if runs is None else len(runs.samples))
    save_profile(out, fit.profile, origin, fit.residuals)
    _print_fit(fit, out)
    return 0


def _print_fit(fit: FitReport, out: Path) -> None:
    print(f"Error of the fit, predicted / measured - 1, by kind of batch:\n{fit}\nwritten: {out}")


def _read_runs(arguments: argparse.Namespace) -> RecordedRuns | None:
    """The recordings, before minutes are spent. Raises ConfigError for options that contradict each other."""
    from agentserve.runtime.recorded_batches import read_runs

    if arguments.no_grid:
        if not arguments.recording:
            raise ConfigError("--no-grid needs --recording: there would be nothing to fit to")
        measured = [name for name in ("quick", "model_argument", *OPTIONS) if getattr(arguments, name)]
        if measured:
            option = "a model" if measured[0] == "model_argument" else f"--{measured[0].replace('_', '-')}"
            raise ConfigError(f"{option} is for a measurement, and --no-grid makes none")
    return read_runs(arguments.recording) if arguments.recording else None


def _fit_alone(runs: RecordedRuns, arguments: argparse.Namespace, out: Path) -> int:
    from agentserve.profiles import save_profile
    from agentserve.runtime.recorded_batches import fit_runs

    header = runs.header
    if header.device is None:
        raise ConfigError(f"{arguments.recording[0]} has no profile of its device to start from")
    fit = fit_runs(runs, dataclasses.replace(header.device, name=out.stem))
    origin = _made(
        fit,
        is_measured=header.executor != "simulated",
        source=f"{len(runs.samples)} samples of recorded batches",
        model=header.model,
        dtype="",
        command=shlex.join(["agentserve", "profile", *_recording_words(arguments.recording), "--no-grid"]),
    )
    save_profile(out, fit.profile, origin, fit.residuals)
    _print_fit(fit, out)
    return 0


def _check_writable(out: Path, force: bool) -> None:
    """Before minutes are spent. Raises ConfigError."""
    if out.is_dir():
        raise ConfigError(f"cannot write the profile {out}: it is a directory")
    if not out.parent.is_dir():
        raise ConfigError(f"cannot write the profile {out}: there is no directory {out.parent}")
    if out.exists() and not force:
        raise ConfigError(f"{out} exists; --force overwrites it")


def _measure(target: Measurable, quick: bool, name: str, console: Console, runs: RecordedRuns | None) -> FitReport:
    from agentserve.profiles.fit import fit_profile
    from agentserve.runtime.calibration import measure
    from agentserve.runtime.calibration_grid import Grid
    from agentserve.runtime.recorded_batches import fit_runs

    capabilities = target.executor.capabilities()
    table = capabilities.partition_table()
    grid = (Grid.quick if quick else Grid.full)(table, target.limits)
    sheet = dataclasses.replace(target.sheet, name=name)
    if not capabilities.simulated:
        from agentserve.cli.machine import describe_processor

        sheet = dataclasses.replace(sheet, description=f"{capabilities.device}: {describe_processor()}")
    console.print(f"measuring {target.model_name} on {capabilities.device}: {len(grid.cases)} cases")
    with _progress(console) as report:
        samples = measure(target.executor, grid, report)
    return fit_profile(samples, sheet, target.model_shape) if runs is None else fit_runs(runs, sheet, samples)


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


def _origin(
    target: Measurable, fit: FitReport, disturbance: tuple[str, ...], command: str, num_recorded: int
) -> ProfileOrigin:
    simulated = target.executor.capabilities().simulated
    num_samples = sum(residual.num_samples for residual in fit.residuals) - num_recorded
    source = f"{num_samples} medians of timed batches" + (f" of simulated {target.sheet.name}" if simulated else "")
    if num_recorded:
        source += f" and {num_recorded} samples of recorded batches"
    return _made(
        fit,
        is_measured=not simulated,
        source="; ".join((source, *disturbance)),
        model=target.model_name,
        dtype=target.dtype,
        command=command,
    )


def _made(fit: FitReport, *, is_measured: bool, source: str, model: str, dtype: str, command: str) -> ProfileOrigin:
    """Here, today and with this version."""
    from agentserve.cli.machine import commit, describe_machine
    from agentserve.profiles import ProfileOrigin

    medians = [residual.median for residual in fit.residuals]
    return ProfileOrigin(
        provenance="measured" if is_measured else "estimated",
        source=source,
        expected_error=f"median {min(medians):.1%} to {max(medians):.1%} by kind of batch, "
        f"p95 up to {max(residual.p95 for residual in fit.residuals):.1%}",
        model=model,
        dtype=dtype,
        machine=describe_machine(),
        commit=commit(),
        command=command,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )


def _recording_words(recordings: Sequence[Path]) -> list[str]:
    return [word for path in recordings for word in ("--recording", path.name)]


def _command(config: ServeConfig, quick: bool, out: Path, recordings: Sequence[Path]) -> str:
    """What makes the file again, wherever the options came from."""
    words = ["agentserve", "profile"]
    for option in dataclasses.fields(ServeConfig):
        value = getattr(config, option.name)
        if option.name in OPTIONS and value != option.default:
            words += ["--" + option.name.replace("_", "-"), str(value)]
    words += _recording_words(recordings)
    return shlex.join([*words, *(["--quick"] if quick else []), "--out", out.name])
