"""Several servers side by side: one at a time, in interleaved rounds, so that drift of the machine hits all alike."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from agentserve.sim.metrics import Slo
from bench.load.checks import find_theft
from bench.load.client import ChatClient
from bench.load.endpoint import Endpoint, NamedWorkload
from bench.load.errors import BenchError, EndpointGoneError, ServerFailedError
from bench.load.prompts import Calibration
from bench.load.results import Results, RunResult, conditions, save
from bench.load.servers import RunningServer, ServerSpec, running

WorkloadMaker = Callable[[int], Sequence[NamedWorkload]]
"""The workloads of a round."""


@dataclass(slots=True)
class Comparison:
    """What is compared, and how."""

    servers: Sequence[ServerSpec]
    """The first one calibrates the prompts and, with `slo_scale`, sets the targets for all."""
    values: Mapping[str, str]
    workloads: WorkloadMaker
    rounds: int
    out: Path
    seed: int
    slo: Slo | None = None
    slo_scale: float | None = None
    timeout_s: float = 600.0
    tries: int = 1
    """A run from which the hypervisor took too much time is made again, up to so many times; the one that had most of
    its time counts."""
    console: Console = field(default_factory=Console)
    failures: list[str] = field(default_factory=list)
    """Sentences about servers that did not start or died; the others go on."""
    _calibration: Calibration | None = None
    _slos: dict[str, Slo] = field(default_factory=dict)

    async def run(self) -> Results:
        """Runs everything; results are saved after each server, so that an interruption loses little.

        Raises BenchError if no server gave a result.
        """
        started_s = time.monotonic()
        runs: list[RunResult] = []
        shared = conditions()
        for round_index in range(self.rounds):
            # Every other round in reverse: what warms up or wears off over a round favours nobody.
            order = self.servers if round_index % 2 == 0 else list(reversed(self.servers))
            for spec in order:
                try:
                    await self._run_server(spec, round_index, runs)
                except (BenchError, OSError) as error:
                    self.failures.append(f"round {round_index}, {spec.name}: {error}")
                    self.console.print(f"! {self.failures[-1]}", style="red", markup=False)
                if runs:
                    shared["total_s"] = round(time.monotonic() - started_s, 1)
                    shared["failures"] = list(self.failures)
                    save(Results(shared, tuple(runs)), self.out)
        if not runs:
            raise BenchError("no server gave a result:\n" + "\n".join(self.failures))
        return Results(shared, tuple(runs))

    async def _run_server(self, spec: ServerSpec, round_index: int, runs: list[RunResult]) -> None:
        started_s = time.monotonic()
        async with running(spec, self.values, self.out / "logs") as server:
            ready_s = time.monotonic() - started_s
            async with ChatClient(server.base_url, timeout_s=self.timeout_s) as client:
                try:
                    await self._run_workloads(client, spec, round_index, runs)
                except EndpointGoneError as error:
                    raise ServerFailedError(f"{error}{_last_words(server)}") from None
            if server.exit_code is not None:
                raise ServerFailedError(f"it ended with exit code {server.exit_code}{_last_words(server)}")
        total_s = time.monotonic() - started_s
        self._say(f"round {round_index}, {spec.name}: ready after {ready_s:.1f} s, {total_s:.1f} s in all")

    async def _run_workloads(
        self, client: ChatClient, spec: ServerSpec, round_index: int, runs: list[RunResult]
    ) -> None:
        endpoint = await Endpoint.prepare(client, spec.info(), seed=self.seed, calibration=self._calibration)
        self._calibration = endpoint.calibration
        for named in self.workloads(round_index):
            slo = await self._targets(endpoint, named)
            tries: list[RunResult] = []
            while len(tries) < self.tries and (not tries or find_theft(tries[-1].stolen_share)):
                tries.append(await endpoint.run(named, round_index=round_index, try_index=len(tries), slo=slo))
                self._describe(named, tries[-1])
            runs.append(min(tries, key=lambda result: result.stolen_share or 0.0))

    def _describe(self, named: NamedWorkload, result: RunResult) -> None:
        good = sum(record.error is None for record in result.records)
        self._say(f"  {named.title}: {good} of {len(result.records)} calls in {result.duration_s:.1f} s")
        for doubt in result.doubts:
            self.console.print(f"  ! {doubt}", style="yellow", markup=False)

    async def _targets(self, endpoint: Endpoint, named: NamedWorkload) -> Slo | None:
        """Those that were given, or those that the reference server has set for this workload in the first round."""
        if self.slo_scale is None or endpoint.info.name != self.servers[0].name:
            return self._slos.get(named.title, self.slo)
        if named.title not in self._slos:
            self._slos[named.title] = await endpoint.isolated_slo(named, self.slo_scale)
        return self._slos[named.title]

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False)


def _last_words(server: RunningServer) -> str:
    tail = server.log_tail()
    return f"; the end of its log:\n{tail}" if tail else ""


def with_targets(results: Results, slo: Slo) -> Results:
    """The same runs judged by other targets."""
    return dataclasses.replace(results, runs=tuple(dataclasses.replace(run, slo=slo) for run in results.runs))
