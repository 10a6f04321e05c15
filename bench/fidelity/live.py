"""Live runs for fidelity: a daemon that records for each cell and round, the load driver as its client."""

from __future__ import annotations

import dataclasses
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from agentserve.errors import AgentServeError
from bench.fidelity.disturbance import DISTURBED_SHARE, Others
from bench.fidelity.observed import CALIBRATION, HELD_OUT, Observation, observe
from bench.load.checks import find_doubts
from bench.load.client import ChatClient
from bench.load.driver import RunOptions, run_workload
from bench.load.endpoint import Endpoint, NamedWorkload
from bench.load.errors import BenchError, ServerFailedError
from bench.load.servers import ServerSpec, running
from bench.load.workloads import WorkloadSpec

_PROFILE_TIMEOUT_S = 1800.0
_MAX_TRIES = 3
"""Of a run that other processes disturb."""


@dataclass(frozen=True, slots=True)
class LiveCell:
    """A workload on a daemon with so much memory for the KV cache."""

    spec: WorkloadSpec
    kv_cache_memory: str | None
    """As `--kv-cache-memory` takes it; None leaves it to the daemon."""

    def make(self, seed: int) -> NamedWorkload:
        """Raises BenchError or WorkloadError for what cannot be made."""
        named = self.spec.make(seed)
        kv = "" if self.kv_cache_memory is None else f", KV {self.kv_cache_memory}"
        return NamedWorkload(named.title + kv, named.workload)


@dataclass(slots=True)
class LiveRuns:
    """What is run, and how."""

    cells: Sequence[LiveCell]
    profile: Path
    serve_options: Sequence[str]
    rounds: int
    seed: int
    directory: Path
    """For recordings, which hold all prompts, and logs."""
    timeout_s: float
    console: Console
    calibration_seeds: Sequence[int] = ()
    """Further runs of each cell and round, of other programs, to fit a profile to. They take turns with those that are
    predicted: a machine whose speed wanders is then calibrated in the same minutes."""

    async def run(self) -> tuple[list[Observation], list[str]]:
        """Observations, and sentences about runs that failed; the others go on.

        All rounds run the same programs, each on a fresh daemon: what differs between them is the machine. A run that
        other processes disturb is repeated up to `_MAX_TRIES` times, and the least disturbed one counts. Raises
        BenchError if no run succeeded.
        """
        roles = [*((seed, CALIBRATION) for seed in self.calibration_seeds), (self.seed, HELD_OUT)]
        observations: list[Observation] = []
        failures: list[str] = []
        for round_index in range(self.rounds):
            # Every other round in reverse: what warms up or wears off over a round favours no cell.
            forwards = round_index % 2 == 0
            runs = [(cell, seed, role) for cell in self.cells for seed, role in roles]
            for cell, seed, role in runs if forwards else reversed(runs):
                title = f"{cell.make(seed).title}, {role}"
                started_s = time.monotonic()
                try:
                    observations.append(await self._run_undisturbed(cell, round_index, seed, role))
                except (AgentServeError, OSError) as error:
                    failures.append(f"round {round_index}, {title}: {error}")
                    self.console.print(f"! {failures[-1]}", style="red", markup=False)
                else:
                    self.console.print(
                        f"round {round_index}, {title}: {len(observations[-1].records)} calls, "
                        f"{time.monotonic() - started_s:.1f} s with the daemon's start, other processes used "
                        f"{observations[-1].others_share or 0.0:.1%} of the processor",
                        highlight=False,
                        markup=False,
                    )
        if not observations:
            raise BenchError("no run succeeded:\n" + "\n".join(failures))
        return observations, failures

    async def _run_undisturbed(self, cell: LiveCell, round_index: int, seed: int, role: str) -> Observation:
        tries: list[Observation] = []
        while len(tries) < _MAX_TRIES:
            name = f"recording-{self.cells.index(cell)}-{round_index}-{seed}-{len(tries)}.jsonl"
            tries.append(await self._run_cell(cell, round_index, seed, self.directory / name))
            if (tries[-1].others_share or 0.0) <= DISTURBED_SHARE:
                break
        best = min(tries, key=lambda observation: observation.others_share or 0.0)
        notes = list(best.notes)
        if len(tries) > 1:
            shares = ", ".join(f"{observation.others_share or 0.0:.1%}" for observation in tries)
            notes.append(
                f"{best.cell}, round {round_index}, seed {seed}: other processes used {shares} of the processor; the "
                "least disturbed of these runs counts"
            )
        return dataclasses.replace(best, role=role, notes=tuple(notes))

    async def _run_cell(self, cell: LiveCell, round_index: int, seed: int, recording: Path) -> Observation:
        named = cell.make(seed)
        prompt_seed = f"{seed}/{named.workload.name}"
        spec = self._server(cell, recording)
        async with running(spec, {}, self.directory) as server:
            async with ChatClient(server.base_url, timeout_s=self.timeout_s) as client:
                # Also warms up: no measured call is the first of its kind.
                endpoint = await Endpoint.prepare(client, spec.info(), seed=seed)
                others = Others(None if server.process is None else server.process.pid)
                run = await run_workload(
                    named.workload, client, endpoint.calibration, RunOptions(prompt_seed=prompt_seed)
                )
                others_share = others.share()
            if run.aborted is not None or server.exit_code is not None:
                raise ServerFailedError(
                    f"{run.aborted or 'the daemon ended'}; the end of its log:\n{server.log_tail()}"
                )
        for doubt in (doubts := find_doubts(run, named.workload)):
            self.console.print(f"  ! {doubt}", style="yellow", markup=False)
        observation = observe(
            recording,
            cell=named.title,
            round_index=round_index,
            planned=named.workload,
            prompt_seed=prompt_seed,
            records=run.records,
            started_ns=run.started_ns,
            notes=[f"{named.title}, round {round_index}: {doubt}" for doubt in doubts],
        )
        return dataclasses.replace(observation, others_share=others_share)

    def _server(self, cell: LiveCell, recording: Path) -> ServerSpec:
        command = ["{python}", "-m", "agentserve", "serve", "--port", "{port}", "--record", str(recording)]
        command += ["--profile", str(self.profile), *self.serve_options]
        if cell.kv_cache_memory is not None:
            command += ["--kv-cache-memory", cell.kv_cache_memory]
        return ServerSpec(
            name=f"agentserve-{self.cells.index(cell)}",
            kind="agentserve",
            label="agentserve",
            setting="default",
            base_url="http://127.0.0.1:{port}/v1",
            command=tuple(command),
            ready="http://127.0.0.1:{port}/ready",
        )


def measure_profile(path: Path, options: Sequence[str], console: Console) -> None:
    """Profiles this machine with the daemon's own verb. `options` are those of `agentserve profile`.

    Raises ServerFailedError if it fails or takes longer than half an hour.
    """
    command = [sys.executable, "-m", "agentserve", "profile", "--out", str(path), *options]
    console.print("agentserve " + shlex.join(["profile", *options]), markup=False)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PROFILE_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise ServerFailedError(f"the profile was not ready after {_PROFILE_TIMEOUT_S:g} s") from None
    if done.returncode != 0:
        raise ServerFailedError(f"agentserve profile ended with exit code {done.returncode}:\n{done.stderr[-2000:]}")
