"""What figures are made of: the records of runs, simulated or live."""

from __future__ import annotations

from dataclasses import dataclass

from agentserve.sim.metrics import TurnRecord


@dataclass(frozen=True, slots=True)
class Run:
    """One workload on one server or configuration."""

    key: str
    """Which one: a variant's key, or the name of a server in live results."""
    label: str
    workload: str
    num_agents: int
    records: tuple[TurnRecord, ...]
    setting: str = "default"
    """Of a server in live results that is none of our variants."""
    rounds: tuple[tuple[TurnRecord, ...], ...] = ()
    """The records of each round where there were several."""


@dataclass(frozen=True, slots=True)
class Source:
    """Runs of one origin, and the sentence that figures carry about it."""

    kind: str
    """`simulated` or `live`: the first word of the file names."""
    conditions: str
    """Machine or device, model, workload's scale, seed: what somebody needs to repeat it."""
    runs: tuple[Run, ...]

    def select(self, *, workload: str | None = None, key: str | None = None) -> list[Run]:
        """Runs of a workload or configuration, by number of agents."""
        found = [r for r in self.runs if workload in (None, r.workload) and key in (None, r.key)]
        return sorted(found, key=lambda run: run.num_agents)

    def keys(self, workload: str) -> list[str]:
        """Configurations that ran this workload, in the order of the runs."""
        return list(dict.fromkeys(run.key for run in self.runs if run.workload == workload))
