"""What is kept of a run: `results.json` with the conditions, every call and every token's time."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentserve import __version__
from agentserve.cli.machine import commit, describe_machine
from agentserve.errors import WorkloadError
from agentserve.sim.metrics import Slo, Summary, TurnRecord, summarize
from bench.load.errors import BenchError

ROOT = Path(__file__).resolve().parents[2]
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """A server in one setting."""

    name: str
    """Unique in a comparison."""
    label: str
    """What it is called in tables and figures."""
    kind: str
    """Servers of one kind differ in their settings only: a colour in the figures."""
    setting: str = "default"
    command: str = ""
    """Empty if the bench did not start it."""
    version: str = "unknown"
    model: str = ""

    @property
    def title(self) -> str:
        return self.label if self.setting == "default" else f"{self.label} {self.setting}"


@dataclass(frozen=True, slots=True)
class RunResult:
    """One workload on one server."""

    server: ServerInfo
    workload: str
    """Its name and what it was made with, in one line: runs of the same line are compared."""
    description: str
    round: int
    seed: int
    num_agents: int | None
    slo: Slo | None
    calibration: Mapping[str, float]
    started_at: str
    """Wall-clock time, ISO 8601."""
    load_average: float
    """Of the machine over the minute before the run."""
    duration_s: float
    client_lag_p99_ms: float
    work_classes: Mapping[str, int]
    """Calls by the class that the server gave them; empty if it does not say."""
    doubts: tuple[str, ...]
    records: tuple[TurnRecord, ...]
    stolen_share: float | None = None
    """Of this machine's processor time during the run, what its hypervisor gave to others; None if it does not say."""

    @property
    def summary(self) -> Summary:
        return summarize(self.records, slo=self.slo)

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(sorted({record.role for record in self.records}))

    def of_role(self, role: str) -> Summary:
        """The metrics of one role's calls alone."""
        return summarize([record for record in self.records if record.role == role], slo=self.slo)

    def to_json(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return values | {
            "server": dataclasses.asdict(self.server),
            "slo": dataclasses.asdict(self.slo) if self.slo else None,
            "summary": self.summary.to_json(),
            "records": [record.to_json() for record in self.records],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RunResult:
        """Raises BenchError if fields are missing or unknown. The summary is computed again from the records."""
        try:
            fields = {name: item for name, item in value.items() if name != "summary"}
            return cls(
                **fields
                | {
                    "server": ServerInfo(**value["server"]),
                    "slo": Slo(**value["slo"]) if value["slo"] else None,
                    "doubts": tuple(value["doubts"]),
                    "records": tuple(TurnRecord.from_json(record) for record in value["records"]),
                }
            )
        except (TypeError, KeyError, WorkloadError) as error:
            raise BenchError(f"not the result of a run: {error}") from None


@dataclass(frozen=True, slots=True)
class Results:
    """Runs, and the conditions that they share."""

    conditions: Mapping[str, Any]
    runs: tuple[RunResult, ...]

    @property
    def workloads(self) -> tuple[str, ...]:
        """In the order in which they first ran."""
        return tuple(dict.fromkeys(run.workload for run in self.runs))

    @property
    def servers(self) -> tuple[ServerInfo, ...]:
        """In the order in which they first ran, those of a kind together."""
        found: dict[str, ServerInfo] = {}
        for run in self.runs:
            found.setdefault(run.server.name, run.server)
        kinds = list(dict.fromkeys(server.kind for server in found.values()))
        return tuple(sorted(found.values(), key=lambda server: kinds.index(server.kind)))

    def of(self, workload: str, server: str | None = None) -> list[RunResult]:
        return [run for run in self.runs if run.workload == workload and server in (None, run.server.name)]

    def caption(self, workload: str) -> str:
        """The conditions of a figure, in one or two lines."""
        runs = self.of(workload)
        rounds = len({run.round for run in runs})
        # Servers name the same weights in different ways; the first one stands for all.
        return (
            f"{workload}, {rounds} round{'s' * (rounds != 1)}. {runs[0].server.model} on "
            f"{self.conditions['machine']}, commit {self.conditions['commit']}, {self.conditions['date']}"
        )


def save(results: Results, directory: Path) -> Path:
    """Writes `results.json`: a line for each call, so that differences can be read. Raises OSError."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "results.json"
    parts = []
    for run in results.runs:
        value = run.to_json()
        records = ",\n   ".join(json.dumps(record, separators=(",", ":")) for record in value.pop("records"))
        parts.append(json.dumps(value, indent=1)[:-2] + f',\n "records": [\n   {records}\n ]}}')
    conditions = json.dumps(results.conditions, indent=1)
    text = f'{{"format": {_FORMAT},\n"conditions": {conditions},\n"runs": [\n' + ",\n".join(parts) + "\n]}\n"
    # Written in full or not at all: a run of hours must not be lost to an interruption here.
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    return path


def load(paths: Iterable[Path]) -> Results:
    """Reads the `results.json` of one or several directories as one comparison.

    The conditions are those of the first; runs of the same server, workload and round must not occur twice. Raises
    BenchError.
    """
    conditions: Mapping[str, Any] | None = None
    runs: dict[tuple[str, str, int], RunResult] = {}
    for given in paths:
        path = given / "results.json" if given.is_dir() else given
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            if value["format"] != _FORMAT:
                raise BenchError(f"{path} has format {value['format']}, not {_FORMAT}")
            conditions = conditions or value["conditions"]
            for entry in value["runs"]:
                run = RunResult.from_json(entry)
                key = (run.server.name, run.workload, run.round)
                if key in runs:
                    raise BenchError(f"{path} repeats round {run.round} of {run.server.name} on {run.workload}")
                runs[key] = run
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BenchError(f"cannot read {path}: {error!r}") from None
    if conditions is None or not runs:
        raise BenchError("there are no runs in these results")
    return Results(conditions, tuple(runs.values()))


def conditions() -> dict[str, Any]:
    """Machine, cores, commit, command, date: what must be known to judge a number."""
    # Paths of this machine say nothing to others.
    arguments = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    return {
        "command": "bench/run.py " + shlex.join(arguments),
        "commit": commit() or "unknown",
        "machine": describe_machine(),
        "num_cores": os.cpu_count(),
        "matrix_extensions": matrix_extensions(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "agentserve": __version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def matrix_extensions() -> list[str]:
    """Extensions of the processor that decide how fast it multiplies matrices; empty where nothing says so."""
    flags = re.search(r"flags\s*: (.*)", _cpuinfo())
    known = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
    return [name for name in known if flags and name in flags[1].split()]


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8") if path.exists() else ""
