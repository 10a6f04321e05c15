"""Prepares an endpoint and runs workloads on it: model, calibration, warm-up, isolated targets, checks."""

from __future__ import annotations

import dataclasses
import os
import time
from dataclasses import dataclass

from agentserve.sim.metrics import Slo, isolated_slo, percentile
from agentserve.sim.programs import Workload
from bench.load.checks import StolenTime, find_doubts, find_theft
from bench.load.client import ChatClient
from bench.load.driver import LoadRun, RunOptions, run_workload, warm_up
from bench.load.errors import EndpointError
from bench.load.prompts import Calibration, calibrate
from bench.load.results import RunResult, ServerInfo

_NUM_ISOLATED_PROGRAMS, _NUM_ISOLATED_TURNS = 3, 4


@dataclass(frozen=True, slots=True)
class NamedWorkload:
    """A workload and the line that it is known by in results."""

    title: str
    workload: Workload


class Endpoint:
    """A server that answers. All its runs share one calibration."""

    def __init__(self, client: ChatClient, info: ServerInfo, calibration: Calibration) -> None:
        self.client = client
        self.info = info
        self.calibration = calibration

    @classmethod
    async def prepare(
        cls, client: ChatClient, info: ServerInfo, *, seed: int, calibration: Calibration | None = None
    ) -> Endpoint:
        """Asks for model and version, calibrates unless that has been done, warms up.

        Raises EndpointError, EndpointGoneError.
        """
        model = await client.find_model()
        version = await find_version(client)
        # The name of a model may be a path.
        info = dataclasses.replace(info, model=model.rsplit("/", 1)[-1], version=version)
        if calibration is None:
            calibration = await calibrate(client, seed)
        await warm_up(client, calibration, str(seed))
        return cls(client, info, calibration)

    async def run(
        self,
        named: NamedWorkload,
        *,
        round_index: int = 0,
        try_index: int = 0,
        slo: Slo | None = None,
        cut_after_s: float | None = 1.0,
    ) -> RunResult:
        """Runs a workload once. Each try has prompts of its own, of the same lengths: what the server keeps of another
        one is of no use to it."""
        workload = named.workload
        load_average, started_at = os.getloadavg()[0], time.strftime("%Y-%m-%dT%H:%M:%S%z")
        prompt_seed = f"{workload.seed}/{workload.name}/{round_index}" + (f"/{try_index}" if try_index else "")
        options = RunOptions(prompt_seed=prompt_seed, cut_after_s=cut_after_s)
        clock = StolenTime()
        run = await run_workload(workload, self.client, self.calibration, options)
        stolen_share = clock.share()
        return RunResult(
            server=self.info,
            workload=named.title,
            description=workload.description,
            round=round_index,
            seed=workload.seed,
            num_agents=workload.num_agents,
            slo=slo,
            calibration=self.calibration.to_json(),
            started_at=started_at,
            load_average=round(load_average, 2),
            duration_s=run.duration_ns / 1e9,
            client_lag_p99_ms=round(percentile(run.client_lag_ns or [0], 0.99) / 1e6, 3),
            work_classes=run.work_classes,
            doubts=(*find_doubts(run, workload), *find_theft(stolen_share)),
            records=tuple(run.records),
            stolen_share=stolen_share,
        )

    async def isolated_slo(self, named: NamedWorkload, factor: float) -> Slo:
        """Targets from a few of the workload's programs, one agent alone, with prompts that no other run has.

        Raises WorkloadError if none of the calls succeeded, EndpointError if the server has gone.
        """
        workload = isolated(named.workload)
        options = RunOptions(prompt_seed=f"{workload.seed}/{workload.name}/isolated", cut_after_s=None)
        run: LoadRun = await run_workload(workload, self.client, self.calibration, options)
        if run.aborted:
            raise EndpointError(f"the isolated run failed: {run.aborted}")
        return isolated_slo(run.records, factor)


def isolated(workload: Workload) -> Workload:
    """The first turns of the first programs of a workload, one after the other; of a mix with victims only the others.

    They share no prefix: a first prompt that is in the cache already would make the target impossible to meet.
    """
    chosen = [program for program in workload.programs if program.role != "victim"][:_NUM_ISOLATED_PROGRAMS]
    alone = tuple(
        dataclasses.replace(
            program,
            turns=program.turns[:_NUM_ISOLATED_TURNS],
            prefix_id=None,
            prefix_tokens=0,
            arrival_ms=None,
            depends_on=(),
        )
        for program in chosen
    )
    return dataclasses.replace(workload, programs=alone, num_agents=1)


async def find_version(client: ChatClient) -> str:
    """What the server says of its version on the routes that servers have for it, else `unknown`."""
    root = client.base_url.removesuffix("/v1")
    for path, field in (("/version", "version"), ("/props", "build_info"), ("/health", "version")):
        try:
            answer = await client.get_json(root + path)
        except EndpointError:
            continue  # this server has no such route: the next one
        if isinstance(answer, dict) and answer.get(field):
            return str(answer[field])
    return "unknown"
