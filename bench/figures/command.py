"""`bench/run.py figures`: pictures like those of the paper, and the numbers in them."""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from agentserve.cli.machine import commit, describe_machine
from bench.figures import data, tables
from bench.figures.live import live_runs, measure
from bench.figures.runs import Source
from bench.figures.shares import load_samples, measure_samples, measured_curves, save_samples, simulated_curves
from bench.figures.simulated import Device, simulated_runs
from bench.figures.variants import ABLATION_AGENTS

FIGURES = ("fig2", "fig3", "fig5", "fig6", "fig7", "controllers")
RUNS_NAME = "runs"
"""Where `--measure` keeps what it measured, below `--out`; `--live` reads it again."""


def main(argv: Sequence[str]) -> int:
    """Draws what was asked for and prints the paths. Raises AgentServeError for wrong options and unreadable files."""
    arguments = _parser().parse_args(argv)
    wanted = arguments.only or list(FIGURES)
    figures: list[data.Figure] = []
    if arguments.simulated or not (arguments.live or arguments.measure):
        figures += _simulated(arguments, wanted)
    if arguments.measure:
        asyncio.run(_measure(arguments, wanted))
    for directory in filter(None, (arguments.live, arguments.out / RUNS_NAME if arguments.measure else None)):
        figures += _live(directory, arguments, wanted)
    missing = [name for name in wanted if not any(figure["figure"] == name for figure in figures)]
    write(figures, arguments.out)
    if missing:
        print(f"no data for {', '.join(missing)}: --help says what each figure needs")
    return 0 if figures else 1


def write(figures: Sequence[data.Figure], out: Path) -> None:
    """Writes each figure as `NAME-SOURCE.png` and its data as JSON beside it."""
    from bench.figures.plots import draw  # noqa: PLC0415 - matplotlib must not be loaded while tokens are stamped

    out.mkdir(parents=True, exist_ok=True)
    for figure in figures:
        path = out / f"{figure['figure']}-{figure['source']}"
        text = json.dumps(figure, indent=1)
        path.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
        if figure["figure"] == "controllers":
            path = path.with_suffix(".md")
            path.write_text(tables.controllers(figure), encoding="utf-8")
        else:
            path = path.with_suffix(".png")
            draw(figure, path)
        print(path)


def _simulated(arguments: argparse.Namespace, wanted: Sequence[str]) -> list[data.Figure]:
    device = Device.load(arguments.gpu, arguments.model)
    source = simulated_runs(
        device,
        agents=arguments.agents,
        figures=wanted,
        scale=arguments.scale,
        num_programs=arguments.programs,
        seed=arguments.seed,
    )
    figures = _of_runs(source, wanted, arguments.agents)
    if "fig3" in wanted:
        figure = data.shares(device.conditions, "simulated", simulated_curves(device))
        figures += [figure] if figure else []
    return figures


async def _measure(arguments: argparse.Namespace, wanted: Sequence[str]) -> None:
    out, options = arguments.out / RUNS_NAME, shlex.split(arguments.serve_options)
    if "fig3" in wanted:
        # Before any daemon is started: nothing else may run meanwhile.
        conditions, samples = measure_samples(options, print)
        save_samples(f"{conditions}; {describe_machine()}, commit {commit()}", samples, out)
    await measure(
        figures=wanted,
        agents=arguments.agents,
        out=out.resolve(),
        scale=arguments.scale,
        num_programs=arguments.programs,
        seed=arguments.seed,
        options=options,
    )


def _live(directory: Path, arguments: argparse.Namespace, wanted: Sequence[str]) -> list[data.Figure]:
    source = live_runs(directory)
    figures = [] if source is None else _of_runs(source, wanted, arguments.agents)
    measured = load_samples(directory) if "fig3" in wanted else None
    if measured is not None:
        figure = data.shares(measured[0], "live", measured_curves(measured[1]))
        figures += [figure] if figure else []
    return figures


def _of_runs(source: Source, wanted: Sequence[str], agents: Sequence[int]) -> list[data.Figure]:
    found = {
        "fig2": data.timeline(source),
        "fig5": data.scaling(source, agents),
        "fig6": data.attainment(source, agents),
        "fig7": data.ablation(source, ABLATION_AGENTS),
        "controllers": data.controllers(source),
    }
    return [figure for name, figure in found.items() if name in wanted and figure is not None]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench/run.py figures",
        description=__doc__,
        epilog="What live figures need: 2 victim_attacker; 3 the samples of --measure; 5 and 6 the same workload with "
        f"several numbers of agents, 6 also with 1; 7 predictive, static and no-slots with {ABLATION_AGENTS} agents; "
        "controllers predictive, static, stream and chunked. --measure runs all of that.",
    )
    parser.add_argument("--out", type=Path, required=True, help="directory for pictures and their data")
    parser.add_argument("--only", action="append", choices=FIGURES, help="this figure; may be given several times")
    parser.add_argument("--simulated", action="store_true", help="from simulated timing; the default without a source")
    parser.add_argument("--live", type=Path, help="from results.json and samples.json in this directory and below it")
    parser.add_argument(
        "--measure", action="store_true", help="start our daemon in each configuration and run the workloads: long"
    )
    parser.add_argument("--gpu", default="rtx-5090", help="whose timing is simulated (default: %(default)s)")
    parser.add_argument("--model", default="qwen2.5-7b", help="model that is simulated (default: %(default)s)")
    parser.add_argument(
        "--agents",
        type=_numbers,
        default=(1, 2, 3, 4, 5, 6),
        help="numbers of agents in figures 5 and 6, default 1,2,3,4,5,6",
    )
    parser.add_argument("--programs", type=_positive, help="programs of a run (default: 12)")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on prompt lengths (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the workloads (default: %(default)s)")
    parser.add_argument(
        "--serve-options", default="", help="options of `agentserve serve` for --measure, such as '--model DIRECTORY'"
    )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(sorted({_positive(part) for part in text.split(",")}))
