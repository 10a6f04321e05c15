"""Workloads as the command line names them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from agentserve.errors import WorkloadError
from agentserve.sim import specs
from agentserve.sim.formats import detect_format, load_workload
from agentserve.sim.programs import Workload
from agentserve.sim.workloads import WORKLOADS, make_workload
from bench.load.endpoint import NamedWorkload
from bench.load.errors import BenchError


@dataclass(frozen=True, slots=True)
class WorkloadSpec:
    """What a workload is made with. None: what the workload has by itself."""

    name: str
    """One of `WORKLOADS`, or a file of any of the simulator's formats: programs, a daemon's recording, a trace."""
    agents: int | None = None
    programs: int | None = None
    scale: float | None = None
    rate: float | None = None

    @classmethod
    def parse(cls, text: str, defaults: WorkloadSpec | None = None) -> WorkloadSpec:
        """`NAME` or `NAME:agents=4,programs=8,scale=0.3,rate=0.5`. Raises BenchError."""
        try:
            spec = specs.WorkloadSpec.parse(text)
        except WorkloadError as error:
            raise BenchError(str(error)) from None
        options = {name: getattr(spec, name) for name in ("agents", "programs", "scale", "rate")}
        given = {name: value for name, value in options.items() if value is not None}
        return dataclasses.replace(defaults or cls(spec.name), name=spec.name, **given)

    def make(self, seed: int) -> NamedWorkload:
        """Raises BenchError or WorkloadError for what cannot be made."""
        if self.name not in WORKLOADS:
            return self._from_file(seed)
        agents = self.agents or specs.DEFAULT_AGENTS.get(self.name, 4)
        workload = make_workload(
            self.name,
            num_agents=agents,
            num_programs=self.programs,
            scale=1.0 if self.scale is None else self.scale,
            seed=seed,
            rate=self.rate,
        )
        parts = [f"{agents} agents" if self.rate is None else f"{self.rate:g} programs/s"]
        parts.append(f"{len(workload.programs)} programs")
        if self.scale is not None:
            parts.append(f"scale {self.scale:g}")
        return NamedWorkload(f"{self.name} ({', '.join(parts)})", workload)

    def _from_file(self, seed: int) -> NamedWorkload:
        path = Path(self.name)
        if not path.is_file():
            raise BenchError(f"{self.name} is neither a file nor a workload; there are {', '.join(WORKLOADS)}")
        if any(value is not None for value in (self.programs, self.scale, self.rate)):
            raise BenchError(f"{self.name}: programs, scale and rate are for named workloads; a file says it all")
        is_recording = detect_format(path) == "recording"
        if is_recording and self.agents is not None:
            raise BenchError(f"{self.name}: a recording has arrival times; leave the number of agents out")
        workload = load_workload(path, num_agents=self.agents, seed=seed)
        if self.agents is None and not any(program.arrival_ms is not None for program in workload.programs):
            workload = dataclasses.replace(workload, num_agents=1)
        _check_linear(self.name, workload)
        agents, count = workload.num_agents, len(workload.programs)
        if is_recording:
            return NamedWorkload(f"{path.name} ({count} programs)", workload)
        how = "open loop" if agents is None else f"{agents} agent{'s' * (agents != 1)}"
        return NamedWorkload(f"{path.name} ({how}, {count} programs)", workload)


def _check_linear(name: str, workload: Workload) -> None:
    """A live server gets words, and its own answers come back to it. Raises BenchError for what that cannot express."""
    for program in workload.programs:
        if not program.is_linear:
            raise BenchError(
                f"{name}: program {program.program_id!r} has block_ids, keep_tokens, dependency_gaps_ms or a turn with "
                "an arrival_ms; only the simulator can run those"
            )
