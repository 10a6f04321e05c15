"""`bench/run.py fidelity`: live runs and their simulations side by side, or a recording against its simulation."""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from agentserve.profiles import load_profile
from agentserve.sim.recorded import read_recording
from bench.fidelity.calibrated import score_both
from bench.fidelity.live import LiveCell, LiveRuns, measure_profile
from bench.fidelity.observed import Observation
from bench.fidelity.report import draw, print_report
from bench.fidelity.score import score
from bench.fidelity.steps import read_batches
from bench.load.errors import BenchError
from bench.load.results import conditions
from bench.load.workloads import WorkloadSpec

RESULTS_NAME, TABLE_NAME, FIGURE_NAME = "fidelity.json", "fidelity.txt", "fidelity.png"
_WORKLOADS = (
    "react:agents=1,programs=3,scale=0.33",
    "react:agents=4,programs=6,scale=0.33",
    "plan_execute:agents=2,programs=4,scale=0.33",
    "plan_execute:agents=6,programs=6,scale=0.33",
    "victim_attacker:agents=3,scale=0.33",
    "coding_agent:agents=2,programs=2,scale=0.03",
)
_TABLE_WIDTH = 180


def main(argv: Sequence[str]) -> int:
    """Measures or reads, simulates, prints and writes; 1 if a run failed.

    Raises AgentServeError for wrong options, unreadable files and if no run succeeded.
    """
    arguments = _parser().parse_args(argv)
    console = Console(width=_TABLE_WIDTH)
    _check(arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.recording:
        observations = [_of_recording(path, arguments.seed) for path in arguments.recording]
        shared = {**conditions(), "profile": _profile_line(observations[0])}
        failures: list[str] = []
    else:
        observations, failures, shared = _measure(arguments, console)
    scored = score_both(observations) if arguments.calibration_seed else score(observations)
    result = {"conditions": {**shared, "failures": failures}, **scored}
    _write(result, arguments.out, console)
    return int(bool(failures))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench/run.py fidelity",
        description="Runs workloads on the daemon, simulates the same programs with the recorded engine configuration "
        "and a profile of this machine, and reports the signed errors beside the spread of the live rounds.",
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help=f"for {RESULTS_NAME}, table and picture")
    parser.add_argument(
        "--recording", type=Path, action="append", metavar="FILE",
        help="no live run: a file of `serve --record`, its arrivals again in the simulator; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--workload", action="append", metavar="W",
        help=f"as for `load`; repeatable (default: {' '.join(_WORKLOADS)})",
    )  # fmt: skip
    parser.add_argument(
        "--kv-cache-memory", action="append", metavar="X",
        help="every workload also with so much memory for the KV cache, as `serve` takes it, such as 64MiB; `default` "
        "is the daemon's own; repeatable (default: default)",
    )  # fmt: skip
    parser.add_argument("--profile", type=Path, metavar="FILE", help="written by `agentserve profile`; else made first")
    parser.add_argument("--model", metavar="X", help="as for `serve`")
    parser.add_argument("--serve-options", default="", metavar="'...'", help="further options of the daemon")
    parser.add_argument("--rounds", type=int, metavar="N", help="live runs of each cell (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="of workloads and prompts")
    parser.add_argument(
        "--calibration-seed", type=int, action="append", metavar="N",
        help="run each cell with this seed, too, fit a profile to these runs, and predict the others with it; "
        "repeatable",
    )  # fmt: skip
    parser.add_argument("--timeout-s", type=float, metavar="S", help="a call that takes longer fails (default: 600)")
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="keep recordings, which hold all prompts, and logs of the daemons here"
    )
    return parser


def _check(arguments: argparse.Namespace) -> None:
    """Raises BenchError for options that would have no effect and values that make no sense."""
    live = ("workload", "kv_cache_memory", "profile", "model", "serve_options", "rounds", "timeout_s", "keep")
    live += ("calibration_seed",)
    if arguments.recording and (given := [name for name in live if getattr(arguments, name)]):
        raise BenchError(f"--{given[0].replace('_', '-')} is for live runs, and --recording makes none")
    if arguments.rounds is not None and arguments.rounds < 1:
        raise BenchError(f"--rounds must be at least 1, not {arguments.rounds}")
    seeds = [*(arguments.calibration_seed or ()), arguments.seed]
    if len(set(seeds)) < len(seeds):
        raise BenchError(f"--calibration-seed must differ from each other and from --seed {arguments.seed}")
    if arguments.out.exists() and not arguments.out.is_dir():
        raise BenchError(f"cannot write to {arguments.out}: it is not a directory")


# ---- live ----


def _measure(arguments: argparse.Namespace, console: Console) -> tuple[list[Observation], list[str], dict[str, Any]]:
    memories = [None if text == "default" else text for text in arguments.kv_cache_memory or ["default"]]
    specs = [WorkloadSpec.parse(text) for text in arguments.workload or _WORKLOADS]
    cells = [LiveCell(spec, memory) for spec in specs for memory in memories]
    titles = [cell.make(arguments.seed).title for cell in cells]  # what is wrong is said before a daemon is started
    if len(set(titles)) < len(titles):
        raise BenchError("the same workload with the same memory is there twice; --rounds repeats")
    shared = conditions()
    with tempfile.TemporaryDirectory(prefix="fidelity-") as temporary:
        directory = (arguments.keep or Path(temporary)).resolve()
        directory.mkdir(parents=True, exist_ok=True)
        model_options = [] if arguments.model is None else ["--model", arguments.model]
        if arguments.profile is None:
            profile = arguments.out.resolve() / "profile.json"
            measure_profile(profile, [*model_options, "--force"], console)
        else:
            profile = arguments.profile.resolve()
        device = load_profile(str(profile))
        shared["profile"] = f"{profile.name}: {device.description}; {device.provenance}"
        runs = LiveRuns(
            cells=cells,
            profile=profile,
            serve_options=[*model_options, *shlex.split(arguments.serve_options)],
            rounds=2 if arguments.rounds is None else arguments.rounds,
            seed=arguments.seed,
            calibration_seeds=arguments.calibration_seed or (),
            directory=directory,
            timeout_s=600.0 if arguments.timeout_s is None else arguments.timeout_s,
            console=console,
        )
        observations, failures = asyncio.run(runs.run())
    return observations, failures, shared


# ---- recordings ----


def _of_recording(path: Path, seed: int) -> Observation:
    """A recording as a run of its own: arrivals and gaps as recorded, times as the engine had them."""
    traffic = read_recording(path, seed=seed)
    recorded, notes = read_batches(path)
    return Observation(
        cell=path.name,
        round=0,
        header=traffic.header,
        workload=traffic.workload,
        records=traffic.records,
        recorded=recorded,
        notes=(*traffic.workload.notes, *notes),
    )


def _profile_line(observation: Observation) -> str:
    device = observation.header.device
    return "none" if device is None else f"{device.description}, as recorded: {device.provenance}"


# ---- results ----


def _write(result: dict[str, Any], out: Path, console: Console) -> None:
    """Prints the report and writes it with the numbers and the figure. Raises BenchError if that is not possible."""
    print_report(result, console)
    plain = Console(width=_TABLE_WIDTH, color_system=None, force_terminal=False)
    with plain.capture() as capture:
        print_report(result, plain)
    text = "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"
    try:
        (out / RESULTS_NAME).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (out / TABLE_NAME).write_text(text, encoding="utf-8")
        draw(result, out / FIGURE_NAME)
    except OSError as error:
        raise BenchError(f"cannot write to {out}: {error.strerror}") from None
    console.print(f"Written to {out}: {RESULTS_NAME}, {TABLE_NAME}, {FIGURE_NAME}", highlight=False, markup=False)
