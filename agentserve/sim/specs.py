"""Workloads as the command line names them: `react`, `react:agents=4,scale=0.3`, a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from agentserve.errors import WorkloadError
from agentserve.sim.programs import Workload
from agentserve.sim.workloads import WORKLOADS, make_workload

DEFAULT_AGENTS = {"victim_attacker": 3}
"""The victim and two clients that send long prompts."""
_OPTIONS = {"agents": int, "programs": int, "scale": float, "rate": float}


@dataclass(frozen=True, slots=True)
class WorkloadSpec:
    """What a workload is made with. None: what the workload has by itself."""

    name: str
    """One of `WORKLOADS`, or a file."""
    agents: int | None = None
    programs: int | None = None
    scale: float | None = None
    rate: float | None = None

    @classmethod
    def parse(cls, text: str) -> WorkloadSpec:
        """`NAME` or `NAME:agents=4,programs=8,scale=0.3,rate=0.5`. Raises WorkloadError."""
        name, colon, options = text.rpartition(":")
        if not colon or "=" not in options:
            return cls(text)
        values: dict[str, int | float] = {}
        for option in filter(None, options.split(",")):
            key, _, value = option.partition("=")
            if key not in _OPTIONS:
                raise WorkloadError(f"{text}: there is no {key!r}; there are {', '.join(_OPTIONS)}")
            try:
                values[key] = _OPTIONS[key](value)
            except ValueError:
                raise WorkloadError(f"{text}: {key} must be a number, not {value!r}") from None
        return cls(name, **values)  # type: ignore[arg-type]  # the table of options says which is whole

    @property
    def path(self) -> Path | None:
        """The file, for what is no named workload."""
        return None if self.name in WORKLOADS else Path(self.name)

    def make(self, seed: int) -> Workload:
        """The named workload. Raises WorkloadError for what cannot be made."""
        return make_workload(
            self.name,
            num_agents=DEFAULT_AGENTS.get(self.name, 4) if self.agents is None else self.agents,
            num_programs=self.programs,
            scale=1.0 if self.scale is None else self.scale,
            seed=seed,
            rate=self.rate,
        )


def split_list(text: str) -> list[str]:
    """Splits a list at its commas, but not at those within the options of a workload: `a:x=1,y=2,b` is two items."""
    items: list[str] = []
    for piece in text.split(","):
        key, is_option, _ = piece.partition("=")
        if items and is_option and key in _OPTIONS and ":" in items[-1]:
            items[-1] += "," + piece
        else:
            items.append(piece)
    return items
