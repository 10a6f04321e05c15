"""The verbs of `bench/run.py`: load, compare, report; `figures` and `fidelity` have their own."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from agentserve.errors import AgentServeError
from agentserve.sim.metrics import Slo
from bench.load.client import ChatClient
from bench.load.compare import Comparison, with_targets
from bench.load.endpoint import Endpoint, NamedWorkload
from bench.load.errors import BenchError
from bench.load.results import ROOT, Results, ServerInfo, conditions, load, save
from bench.load.servers import PLACEHOLDERS, choose, placeholder_values, read_scenario
from bench.load.tables import make_console, print_dominance, print_tables
from bench.load.workloads import WorkloadSpec

_SCENARIO = ROOT / "bench" / "scenarios" / "cpu-compare.toml"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb; returns the exit code: 1 if something failed, 2 for wrong arguments."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["figures"]:
        from bench.figures import main as figures_main  # noqa: PLC0415 - the figures need much that a load run does not

        return figures_main(arguments[1:])
    if arguments[:1] == ["fidelity"]:
        from bench.fidelity import main as fidelity_main  # noqa: PLC0415 - the simulator is not needed for a load run

        return fidelity_main(arguments[1:])
    parsed = _parser().parse_args(arguments)
    console = make_console()
    try:
        code: int = parsed.run(parsed, console)
    except AgentServeError as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 1
    return code


# ---- arguments ----


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench/run.py", description="Load driver for any OpenAI-compatible endpoint.", allow_abbrev=False
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    one = verbs.add_parser("load", help="run a workload on an endpoint that is there", allow_abbrev=False)
    one.add_argument("--base-url", required=True, help="with the version: http://127.0.0.1:8177/v1")
    one.add_argument("--model", help="name in the requests (default: the first one that the server lists)")
    one.add_argument("--api-key", help="bearer token")
    one.add_argument("--label", default="server", help="what the server is called in table and figures")
    one.add_argument("--agents", type=int, help="programs that run at once")
    one.add_argument("--programs", type=int, help="number of programs")
    one.add_argument("--scale", type=float, help="factor on prompt lengths, for small models")
    one.add_argument("--rate", type=float, help="open loop: programs a second")
    one.add_argument("--whole-victims", action="store_true", help="do not cut a victim's stream after the attack")
    _add_common(one)
    one.set_defaults(run=_load)

    many = verbs.add_parser("compare", help="start servers one after the other and compare them", allow_abbrev=False)
    many.add_argument("--scenario", type=Path, default=_SCENARIO, help="TOML file of servers (default: %(default)s)")
    many.add_argument(
        "--server",
        action="append",
        required=True,
        metavar="NAME",
        help="name, group or pattern of names in the scenario, or NAME=URL for one that runs already; repeatable; "
        "the first one calibrates prompts and sets the targets of --slo-scale",
    )
    many.add_argument("--rounds", type=int, default=1, help="each server runs every workload so often")
    many.add_argument(
        "--tries",
        type=int,
        default=1,
        help="a run from which the hypervisor took more than 3 %% of the processor time is made again, up to so many "
        "times; the least disturbed one counts",
    )
    many.add_argument(
        "--together",
        action="store_true",
        help="start all servers of a round before its first run, so that the runs of one workload follow each other; "
        "for servers that do nothing while nobody calls",
    )
    many.add_argument("--frontier", action="store_true", help="plot p95 gap against cold TTFT; print who dominates")
    for name, help_text in PLACEHOLDERS.items():
        many.add_argument(f"--{name.replace('_', '-')}", metavar="PATH", help=f"{help_text} [BENCH_{name.upper()}]")
    _add_common(many)
    many.set_defaults(run=_compare)

    again = verbs.add_parser("report", help="print tables and draw plots of results again", allow_abbrev=False)
    again.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="with a results.json")
    again.add_argument("--out", type=Path, help="where the plots go (default: the first directory)")
    again.add_argument("--frontier", action="store_true", help="also the frontier")
    _add_targets(again)
    again.set_defaults(run=_report)

    verbs.add_parser("figures", help="the counterparts of the paper's figures; figures --help", add_help=False)
    verbs.add_parser("fidelity", help="the simulator against live runs; fidelity --help", add_help=False)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workload",
        action="append",
        required=True,
        metavar="W",
        help="name with options (react:agents=4,programs=8,scale=0.3,rate=0.5), a JSONL file of programs, or a "
        "recording of the daemon; repeatable",
    )
    parser.add_argument("--seed", type=int, default=0, help="of workloads and prompts; rounds add to it")
    parser.add_argument("--out", type=Path, required=True, help="directory for results.json, plots and logs")
    parser.add_argument("--timeout-s", type=float, default=600.0, help="a call that takes longer fails")
    parser.add_argument("--slo-scale", type=float, help="targets: so many times what one agent alone gets, measured")
    _add_targets(parser)


def _add_targets(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--slo-ttft-ms", type=float, help="target of the cold TTFT")
    parser.add_argument("--slo-tpot-ms", type=float, help="target of the time between tokens (p95 of a session)")


def _targets(arguments: argparse.Namespace) -> Slo | None:
    """Raises BenchError if only one of the two is given, or targets and a scale."""
    ttft_ms, tpot_ms = arguments.slo_ttft_ms, arguments.slo_tpot_ms
    if (ttft_ms is None) != (tpot_ms is None):
        raise BenchError("--slo-ttft-ms and --slo-tpot-ms belong together")
    if ttft_ms is None:
        return None
    if getattr(arguments, "slo_scale", None) is not None:
        raise BenchError("give either --slo-scale or the two targets")
    return Slo(ttft_ms * 1e6, tpot_ms * 1e6)


# ---- verbs ----


def _load(arguments: argparse.Namespace, console: Console) -> int:
    defaults = WorkloadSpec("", arguments.agents, arguments.programs, arguments.scale, arguments.rate)
    named = [WorkloadSpec.parse(text, defaults).make(arguments.seed) for text in arguments.workload]
    results = asyncio.run(_run_endpoint(arguments, named, _targets(arguments)))
    save(results, arguments.out)
    _show(results, arguments.out, console, frontier=False)
    return int(any(record.error is not None for run in results.runs for record in run.records))


async def _run_endpoint(arguments: argparse.Namespace, workloads: Sequence[NamedWorkload], slo: Slo | None) -> Results:
    shared = conditions()
    info = ServerInfo(arguments.label, arguments.label, kind=arguments.label)
    runs = []
    async with ChatClient(
        arguments.base_url, model=arguments.model, api_key=arguments.api_key, timeout_s=arguments.timeout_s
    ) as client:
        endpoint = await Endpoint.prepare(client, info, seed=arguments.seed)
        for named in workloads:
            targets = slo
            if arguments.slo_scale is not None:
                targets = await endpoint.isolated_slo(named, arguments.slo_scale)
            cut_after_s = None if arguments.whole_victims else 1.0
            runs.append(await endpoint.run(named, slo=targets, cut_after_s=cut_after_s))
    return Results(shared, tuple(runs))


def _compare(arguments: argparse.Namespace, console: Console) -> int:
    if arguments.rounds < 1:
        raise BenchError(f"--rounds must be at least 1, not {arguments.rounds}")
    if arguments.tries < 1:
        raise BenchError(f"--tries must be at least 1, not {arguments.tries}")
    started_s = time.monotonic()
    values = placeholder_values({name: getattr(arguments, name) for name in PLACEHOLDERS}, os.environ)
    servers, skipped = choose(read_scenario(arguments.scenario), arguments.server, values)
    for sentence in skipped:
        console.print(f"! {sentence}", style="yellow", markup=False)
    specs = [WorkloadSpec.parse(text) for text in arguments.workload]
    for spec in specs:
        spec.make(arguments.seed)  # what is wrong is said before a server is started
    comparison = Comparison(
        servers=servers,
        values=values,
        workloads=lambda round_index: [spec.make(arguments.seed + round_index) for spec in specs],
        rounds=arguments.rounds,
        out=arguments.out.resolve(),
        seed=arguments.seed,
        slo=_targets(arguments),
        slo_scale=arguments.slo_scale,
        timeout_s=arguments.timeout_s,
        tries=arguments.tries,
        together=arguments.together,
        console=console,
    )
    results = asyncio.run(comparison.run())
    _show(results, arguments.out, console, frontier=arguments.frontier)
    for failure in comparison.failures:
        console.print(f"! failed: {failure}", style="red", markup=False)
    minutes, seconds = divmod(round(time.monotonic() - started_s), 60)
    console.print(f"Total time: {minutes} min {seconds} s")
    return int(bool(comparison.failures))


def _report(arguments: argparse.Namespace, console: Console) -> int:
    results = load(arguments.directories)
    slo = _targets(arguments)
    if slo is not None:
        results = with_targets(results, slo)
    _show(results, arguments.out or arguments.directories[0], console, frontier=arguments.frontier)
    return 0


def _show(results: Results, out: Path, console: Console, *, frontier: bool) -> None:
    from bench.load.plots import draw_all  # noqa: PLC0415 - matplotlib must not be loaded while tokens are stamped

    print_tables(results, console)
    if frontier:
        for workload in results.workloads:
            print_dominance(results, workload, console)
    written = draw_all(results, out, frontier=frontier)
    console.print(f"Written to {out}: results.json, {', '.join(path.name for path in written)}", markup=False)
