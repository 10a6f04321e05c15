"""Tool Simulator (AgentServeSim, section 3): how long a tool runs between two turns.

Recorded gaps are replayed as they are: they stand in the turns. `with_tool_times` draws them anew by the name of the
tool, from a profile. What is drawn depends on the seed, the program and the turn alone: not on the order, on other
programs or on how many there are.

A profile is a JSON file; a tool has one of these forms, times in milliseconds:

    {"name": "mine", "provenance": "where the numbers are from", "tools": {
        "sed": {"p50_ms": 60, "p99_ms": 300},                log-normal
        "git": {"mean_ms": 760, "deviation_ms": 2900},       log-normal
        "pip": {"samples_ms": [900, 4100, 61000]},           empirical; "fit": "log-normal" fits one
        "cat": {"quantiles": [[0, 20], [0.5, 170], [1, 3000]]}   empirical, linear between the points
     }, "mix": {"sed": 0.7, "pip": 0.3},    optional: how often each is used where a turn names no tool
     "default": {...}}                      optional: for tools that are not in the list
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import json
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import Protocol

from agentserve.core.events import HUMAN
from agentserve.errors import WorkloadError
from agentserve.sim.programs import Program, Turn, Workload
from agentserve.sim.records import Notes, Record

_NORMAL = statistics.NormalDist()
_Z99 = _NORMAL.inv_cdf(0.99)
_MIN_MS = 1e-3
"""Shorter samples count as this in a log-normal fit: the logarithm needs a number above 0."""


class ToolTimes(Protocol):
    """The distribution of a tool's run time."""

    def quantile_ms(self, probability: float) -> float:
        """The time that so large a share of the calls stays below; `probability` lies in [0, 1)."""
        ...

    @property
    def mean_ms(self) -> float: ...


@dataclass(frozen=True, slots=True)
class LogNormal:
    """The logarithm of the time in milliseconds is normally distributed. Raises WorkloadError for other numbers."""

    mu: float
    sigma: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mu) and math.isfinite(self.sigma) and self.sigma >= 0.0):
            raise WorkloadError(f"log-normal: expected finite numbers and sigma of at least 0, not {self}")

    @classmethod
    def of_quantiles(cls, p50_ms: float, p99_ms: float) -> LogNormal:
        """The one with this median and 99th percentile."""
        if not 0.0 < p50_ms <= p99_ms:
            raise WorkloadError(f"p50_ms, p99_ms: expected 0 < p50 <= p99, not {p50_ms} and {p99_ms}")
        return cls(math.log(p50_ms), math.log(p99_ms / p50_ms) / _Z99)

    @classmethod
    def of_moments(cls, mean_ms: float, deviation_ms: float) -> LogNormal:
        """The one with this mean and standard deviation."""
        if not (mean_ms > 0.0 and deviation_ms >= 0.0):
            raise WorkloadError(
                f"mean_ms, deviation_ms: expected more than 0 and at least 0, not {mean_ms} and {deviation_ms}"
            )
        variance = math.log1p((deviation_ms / mean_ms) ** 2)
        return cls(math.log(mean_ms) - variance / 2.0, math.sqrt(variance))

    @classmethod
    def fit(cls, samples_ms: Iterable[float]) -> LogNormal:
        """The most likely one for these samples: mean and deviation of their logarithms."""
        logs = [math.log(max(sample, _MIN_MS)) for sample in _checked(samples_ms)]
        return cls(statistics.fmean(logs), statistics.pstdev(logs))

    def quantile_ms(self, probability: float) -> float:
        # The lowest probability is a draw of exactly 0, for which there is no time.
        return math.exp(self.mu + self.sigma * _NORMAL.inv_cdf(max(probability, 2.0**-54)))

    @property
    def mean_ms(self) -> float:
        return math.exp(self.mu + self.sigma**2 / 2.0)


@dataclass(frozen=True, slots=True)
class Empirical:
    """A distribution function through given points, linear between them.

    Raises WorkloadError unless probabilities rise from 0 to 1 and the times do not fall.
    """

    points: tuple[tuple[float, float], ...]
    """(share of the calls, time in milliseconds that they stay below)."""

    def __post_init__(self) -> None:
        shares, times = [p for p, _ in self.points], [t for _, t in self.points]
        rises = len(shares) >= 2 and all(a < b for a, b in itertools.pairwise(shares))
        if not (rises and shares[0] == 0.0 and shares[-1] == 1.0):
            raise WorkloadError(f"quantiles: expected shares that rise from 0 to 1, not {shares}")
        _checked(times)
        if any(a > b for a, b in itertools.pairwise(times)):
            raise WorkloadError(f"quantiles: expected times that do not fall, not {times}")

    @classmethod
    def of_samples(cls, samples_ms: Iterable[float]) -> Empirical:
        """Through the samples in their order, the least at 0 and the greatest at 1; a single one is always drawn."""
        times = sorted(_checked(samples_ms))
        times *= 1 + (len(times) == 1)
        return cls(tuple((index / (len(times) - 1), time) for index, time in enumerate(times)))

    def quantile_ms(self, probability: float) -> float:
        index = bisect.bisect_right(self.points, probability, key=lambda point: point[0])
        if index == len(self.points):
            return self.points[-1][1]
        (low, start), (high, end) = self.points[index - 1], self.points[index]
        return start + (end - start) * (probability - low) / (high - low)

    @property
    def mean_ms(self) -> float:
        pairs = itertools.pairwise(self.points)
        return sum((high - low) * (start + end) / 2.0 for (low, start), (high, end) in pairs)


def _checked(times_ms: Iterable[float]) -> list[float]:
    times = list(times_ms)
    if not times or not all(math.isfinite(time) and time >= 0.0 for time in times):
        raise WorkloadError("times: expected at least one, each in milliseconds, 0 or more")
    return times


@dataclass(frozen=True, slots=True)
class ToolProfile:
    """Run times by the name of the tool. Raises WorkloadError for a mix of unknown tools or without weight."""

    name: str
    tools: Mapping[str, ToolTimes]
    mix: Mapping[str, float] = field(default_factory=dict)
    """How often each tool is called where the workload does not say which one; any scale. Empty: such gaps stay."""
    default: ToolTimes | None = None
    """For tools that are not in `tools`. None: they are an error."""
    provenance: str = ""

    def __post_init__(self) -> None:
        for name, weight in self.mix.items():
            if name not in self.tools:
                raise WorkloadError(f"mix: there is no tool {name!r}; there are {', '.join(self.tools)}")
            if not (math.isfinite(weight) and weight >= 0.0):
                raise WorkloadError(f"mix: {name}: expected a weight of at least 0, not {weight}")
        if self.mix and not any(self.mix.values()):
            raise WorkloadError("mix: expected a tool with a weight above 0")

    def times_of(self, tool_name: str) -> ToolTimes:
        """Raises WorkloadError if the tool is unknown and there is no default."""
        times = self.tools.get(tool_name, self.default)
        if times is None:
            raise WorkloadError(
                f"tool profile {self.name}: there is no tool {tool_name!r}; there are {', '.join(self.tools)}"
            )
        return times

    @property
    def mean_ms(self) -> float:
        """Of a call whose tool is drawn from the mix."""
        total = sum(self.mix.values())
        return sum(weight * self.tools[name].mean_ms for name, weight in self.mix.items()) / total if total else 0.0


def with_tool_times(workload: Workload, profile: ToolProfile, seed: int) -> Workload:
    """The workload with all tool gaps drawn from the profile, in whole microseconds.

    A turn without a `tool_name` first gets one from the profile's mix; without a mix its gap stays as it is, and the
    notes count that. The last turn of a program has no gap; gaps behind dependencies stay, and those of people.
    Raises WorkloadError for a tool that the profile does not know.
    """
    notes = Notes()
    programs = tuple(_redrawn(program, profile, seed, notes) for program in workload.programs)
    description = f"{workload.description}; tool times drawn from {profile.name}, seed {seed}".removeprefix("; ")
    return dataclasses.replace(
        workload, programs=programs, description=description, notes=workload.notes + notes.lines()
    )


def fit_tools(workload: Workload, *, name: str = "fitted", log_normal: bool = False) -> ToolProfile:
    """A profile of the gaps of a workload by tool: their empirical distribution, or a log-normal fitted to them.

    The mix is how often each tool was called. Raises WorkloadError if no turn names a tool.
    """
    samples: dict[str, list[float]] = {}
    for program in workload.programs:
        for turn in program.turns[:-1]:
            if turn.tool_name not in (None, HUMAN):
                samples.setdefault(turn.tool_name, []).append(turn.tool_gap_ms)
    if not samples:
        raise WorkloadError(f"workload {workload.name}: no turn names the tool behind it, so there is nothing to fit")
    fit = LogNormal.fit if log_normal else Empirical.of_samples
    tools = {tool: fit(gaps) for tool, gaps in sorted(samples.items())}
    mix = {tool: float(len(gaps)) for tool, gaps in sorted(samples.items())}
    how = "log-normal fitted to" if log_normal else "empirical distribution of"
    return ToolProfile(name, tools, mix, None, f"{how} {sum(map(len, samples.values()))} gaps of {workload.name}")


def _redrawn(program: Program, profile: ToolProfile, seed: int, notes: Notes) -> Program:
    turns: list[Turn] = []
    for index, turn in enumerate(program.turns):
        random = Random(f"{seed}/tool/{program.program_id}/{index}")
        tool_name = turn.tool_name
        if index + 1 == len(program.turns) or tool_name == HUMAN:
            turns.append(turn)
            continue
        if tool_name is None:
            if not profile.mix:
                notes.add(f"turns name no tool, and the profile {profile.name} has no mix; their gaps stay")
                turns.append(turn)
                continue
            (tool_name,) = random.choices(list(profile.mix), list(profile.mix.values()))
        gap_ms = round(profile.times_of(tool_name).quantile_ms(random.random()), 3)
        turns.append(dataclasses.replace(turn, tool_name=tool_name, tool_gap_ms=gap_ms))
    return dataclasses.replace(program, turns=tuple(turns))


# ---- profiles ----

_SWE_BENCH = ToolProfile(
    name="swe-bench",
    tools=MappingProxyType(
        {
            "sed": LogNormal.of_quantiles(60.0, 300.0),  # p99 published (below 300), p50 ours
            "grep": LogNormal.of_quantiles(170.0, 3000.0),  # both published (160 to 180, about 3 s)
            "cat": LogNormal.of_quantiles(170.0, 3000.0),  # both published, as for grep
            "python": LogNormal.of_quantiles(600.0, 8000.0),  # p50 published, p99 ours
            "git": LogNormal.of_quantiles(200.0, 9000.0),  # p99 published, p50 ours
            "pip": LogNormal.of_quantiles(3000.0, 60_000.0),  # "a long tail" is published, the numbers are ours
            "pytest": LogNormal.of_quantiles(3000.0, 40_000.0),  # as for pip
        }
    ),
    mix=MappingProxyType(
        {"sed": 0.24, "grep": 0.22, "cat": 0.19, "python": 0.17, "git": 0.05, "pip": 0.02, "pytest": 0.11}
    ),
    provenance=(
        "mini-swe-agent on SWE-bench Verified, tool times of AgentServeSim. Published: p99 of sed and git, p50 and p99 "
        "of grep and cat, p50 of python, and mean 1161 ms and standard deviation 4125 ms over all calls. Ours: the "
        "log-normal form, the other quantiles, and the mix, chosen such that the published mean and deviation come out."
    ),
)

TOOL_PROFILES: Mapping[str, ToolProfile] = MappingProxyType({_SWE_BENCH.name: _SWE_BENCH})
"""Built in, by name."""


def load_tool_profile(name_or_path: str) -> ToolProfile:
    """A built-in profile, or one from a JSON file. Raises WorkloadError with file, field and what was expected."""
    if name_or_path in TOOL_PROFILES:
        return TOOL_PROFILES[name_or_path]
    path = Path(name_or_path)
    if not path.is_file():
        raise WorkloadError(
            f"{name_or_path} is neither a file nor a tool profile; there are {', '.join(TOOL_PROFILES)}"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WorkloadError(f"{path}: expected a JSON object: {error}") from None
    record = Record.of(value, str(path))
    tools = {name: _times(tool) for name, tool in record.children("tools").items()}
    weights = record.child("mix") if "mix" in record else None
    mix = {} if weights is None else {name: weights.number(name, "a weight") for name in weights.names}
    default = _times(record.child("default")) if "default" in record else None
    name = record.name("name", default=path.stem) or path.stem
    provenance = record.name("provenance", default="") or ""
    record.refuse_unused()
    try:
        return ToolProfile(name, tools, mix, default, provenance)
    except WorkloadError as error:
        raise record.located(error) from None


def _times(record: Record) -> ToolTimes:
    """One of the forms of a tool."""
    times: ToolTimes
    try:
        if "p50_ms" in record:
            times = LogNormal.of_quantiles(_ms(record, "p50_ms"), _ms(record, "p99_ms"))
        elif "mean_ms" in record:
            times = LogNormal.of_moments(_ms(record, "mean_ms"), _ms(record, "deviation_ms"))
        elif "samples_ms" in record:
            samples = record.numbers("samples_ms")
            fit = record.name("fit", default="empirical")
            if fit not in ("empirical", "log-normal"):
                raise record.error("fit", "'empirical' or 'log-normal'")
            times = Empirical.of_samples(samples) if fit == "empirical" else LogNormal.fit(samples)
        elif "quantiles" in record:
            times = Empirical(record.pairs("quantiles"))
        else:
            raise record.error("p50_ms", "p50_ms and p99_ms, mean_ms and deviation_ms, samples_ms, or quantiles")
    except WorkloadError as error:
        raise record.located(error) from None
    record.refuse_unused()
    return times


def _ms(record: Record, name: str) -> float:
    return record.number(name, "milliseconds")
