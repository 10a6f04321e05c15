"""Several servers side by side: one at a time, in interleaved rounds, so that drift of the machine hits all alike.

Started one after the other, or all before the first run, so that those of one workload follow each other at once.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
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
    together: bool = False
    """All servers of a round are up at once, and take turns with each workload. They must leave the machine alone while
    nobody calls, and fit its memory together."""
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
            for group in [order] if self.together else [[spec] for spec in order]:
                await self._run_servers(group, round_index, runs)
                if runs:
                    shared["total_s"] = round(time.monotonic() - started_s, 1)
                    shared["failures"] = list(self.failures)
                    save(Results(shared, tuple(runs)), self.out)
        if not runs:
            raise BenchError("no server gave a result:\n" + "\n".join(self.failures))
        return Results(shared, tuple(runs))

    async def _run_servers(self, specs: Sequence[ServerSpec], round_index: int, runs: list[RunResult]) -> None:
        """Starts servers, has each of them run each workload in turn, and stops them."""
        started_s = time.monotonic()
        async with AsyncExitStack() as stack:
            up: list[tuple[ServerSpec, RunningServer, Endpoint]] = []
            for spec in specs:
                with self._failing(spec, round_index):
                    start_s = time.monotonic()
                    server = await stack.enter_async_context(running(spec, self.values, self.out / "logs"))
                    client = await stack.enter_async_context(ChatClient(server.base_url, timeout_s=self.timeout_s))
                    self._say(f"round {round_index}, {spec.name}: ready after {time.monotonic() - start_s:.1f} s")
                    with _last_words(server):
                        endpoint = await Endpoint.prepare(
                            client, spec.info(), seed=self.seed, calibration=self._calibration
                        )
                    self._calibration = endpoint.calibration
                    up.append((spec, server, endpoint))
            for named in self.workloads(round_index):
                for spec, server, endpoint in list(up):
                    with self._failing(spec, round_index), _last_words(server):
                        runs.append(await self._run_workload(endpoint, named, round_index))
                        continue
                    up.remove((spec, server, endpoint))  # it has gone; the others go on
            for spec, server, _ in up:
                with self._failing(spec, round_index), _last_words(server):
                    if server.exit_code is not None:
                        raise EndpointGoneError(f"it ended with exit code {server.exit_code}")
        self._say(
            f"round {round_index}, {', '.join(s.name for s in specs)}: {time.monotonic() - started_s:.1f} s in all"
        )

    @contextmanager
    def _failing(self, spec: ServerSpec, round_index: int) -> Iterator[None]:
        """Notes what goes wrong with a server; the others go on."""
        try:
            yield
        except (BenchError, OSError) as error:
            self.failures.append(f"round {round_index}, {spec.name}: {error}")
            self.console.print(f"! {self.failures[-1]}", style="red", markup=False)

    async def _run_workload(self, endpoint: Endpoint, named: NamedWorkload, round_index: int) -> RunResult:
        slo = await self._targets(endpoint, named)
        tries: list[RunResult] = []
        while len(tries) < self.tries and (not tries or find_theft(tries[-1].stolen_share)):
            tries.append(await endpoint.run(named, round_index=round_index, try_index=len(tries), slo=slo))
            self._describe(endpoint, named, tries[-1])
        return min(tries, key=lambda result: result.stolen_share or 0.0)

    def _describe(self, endpoint: Endpoint, named: NamedWorkload, result: RunResult) -> None:
        good = sum(record.error is None for record in result.records)
        self._say(
            f"  {endpoint.info.name}, {named.title}: {good} of {len(result.records)} calls in {result.duration_s:.1f} s"
        )
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


@contextmanager
def _last_words(server: RunningServer) -> Iterator[None]:
    """Adds the end of its log to what is said of a server that has gone."""
    try:
        yield
    except EndpointGoneError as error:
        tail = server.log_tail()
        raise ServerFailedError(f"{error}; the end of its log:\n{tail}" if tail else str(error)) from None


def with_targets(results: Results, slo: Slo) -> Results:
    """The same runs judged by other targets."""
    return dataclasses.replace(results, runs=tuple(dataclasses.replace(run, slo=slo) for run in results.runs))
