"""Programs: what an agent does, as turns of a growing conversation with tool gaps between them.

The same programs drive the live daemon through `bench/run.py` and the simulator. A file holds one program a line, as
JSON; fields that have their default may be left out:

    {"program_id": "a", "turns": [{"append_tokens": 900, "output_tokens": 40, "tool_gap_ms": 200}, ...]}
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentserve.errors import WorkloadError


@dataclass(frozen=True, slots=True)
class Turn:
    """One model call. Its prompt is everything before it in the program, plus `append_tokens` new tokens.

    Raises WorkloadError that names the field and what was expected.
    """

    append_tokens: int
    """New prompt tokens: system prompt and task in the first turn (its shared prefix included), a tool's output in
    later ones."""
    output_tokens: int
    """Tokens that are generated; the end-of-sequence token is ignored, so that every server does the same work."""
    tool_gap_ms: float = 0.0
    """From the end of this turn's output to the start of the next turn: the tool runs."""

    def __post_init__(self) -> None:
        _check_int("append_tokens", self.append_tokens, 1)
        _check_int("output_tokens", self.output_tokens, 1)
        _check_duration("tool_gap_ms", self.tool_gap_ms)


@dataclass(frozen=True, slots=True)
class Program:
    """The turns of one agent session, in order.

    Raises WorkloadError that names the field and what was expected.
    """

    program_id: str
    turns: tuple[Turn, ...]
    prefix_id: str | None = None
    """Programs of the same `prefix_id` start with the same tokens: each with the first `prefix_tokens` of them."""
    prefix_tokens: int = 0
    arrival_ms: float | None = None
    """Open loop: when it starts, from the start of the run. None: closed loop, when an agent is free."""
    depends_on: tuple[str, ...] = ()
    """Programs that must have ended before this one starts."""
    role: str = "agent"
    """What the program is for in its workload, such as `victim` or `attacker`; results are reported by role."""

    def __post_init__(self) -> None:
        _check_name("program_id", self.program_id)
        if not isinstance(self.turns, tuple) or not self.turns or not all(isinstance(t, Turn) for t in self.turns):
            raise WorkloadError(f"turns: expected at least one turn, not {self.turns!r}")
        if self.prefix_id is not None:
            _check_name("prefix_id", self.prefix_id)
        _check_int("prefix_tokens", self.prefix_tokens, 0 if self.prefix_id is None else 1)
        limit = self.turns[0].append_tokens if self.prefix_id is not None else 0
        if self.prefix_tokens > limit:
            expected = f"at most the {limit} tokens of the first turn" if limit else "0, because there is no prefix_id"
            raise WorkloadError(f"prefix_tokens: expected {expected}, not {self.prefix_tokens}")
        if self.arrival_ms is not None:
            _check_duration("arrival_ms", self.arrival_ms)
        if not isinstance(self.depends_on, tuple):
            raise WorkloadError(f"depends_on: expected a list of program ids, not {self.depends_on!r}")
        for other in self.depends_on:
            _check_name("depends_on", other)
        if len({self.program_id, *self.depends_on}) != 1 + len(self.depends_on):
            raise WorkloadError(f"depends_on: expected other programs, each once, not {list(self.depends_on)}")
        _check_name("role", self.role)

    @property
    def num_context_tokens(self) -> int:
        """Length of the conversation at its end: the window that the program needs."""
        return sum(turn.append_tokens + turn.output_tokens for turn in self.turns)


@dataclass(frozen=True, slots=True)
class Workload:
    """Programs and how they are to be run.

    Raises WorkloadError for ids that occur twice, unknown or circular dependencies, and arrivals in a closed loop.
    """

    name: str
    programs: tuple[Program, ...]
    num_agents: int | None
    """Closed loop: this many programs run at once. A free agent takes the first program, in the order of `programs`,
    whose dependencies have ended. None: open loop, every program starts at its `arrival_ms` (at once without one), but
    not before its dependencies have ended."""
    seed: int = 0
    """What the prompts are made from."""
    description: str = ""

    def __post_init__(self) -> None:
        if not self.programs:
            raise WorkloadError(f"workload {self.name}: expected at least one program")
        if self.num_agents is not None:
            _check_int("num_agents", self.num_agents, 1)
        by_id: dict[str, Program] = {}
        for program in self.programs:
            if program.program_id in by_id:
                raise WorkloadError(f"program_id: {program.program_id!r} occurs twice")
            if self.num_agents is not None and program.arrival_ms is not None:
                raise WorkloadError(
                    f"program {program.program_id!r}: arrival_ms: expected none in a closed loop of "
                    f"{self.num_agents} agents"
                )
            by_id[program.program_id] = program
        for program in self.programs:
            for other in program.depends_on:
                if other not in by_id:
                    raise WorkloadError(f"program {program.program_id!r}: depends_on: there is no program {other!r}")
        _check_no_cycle(self.programs)

    @property
    def num_context_tokens(self) -> int:
        """The window that its longest program needs."""
        return max(program.num_context_tokens for program in self.programs)


def load_programs(path: Path) -> tuple[Program, ...]:
    """Reads programs from a file of JSON lines; empty lines are skipped.

    Raises WorkloadError with file, line, field and what was expected; also for a file that cannot be read or is empty.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise WorkloadError(f"cannot read {path}: {error}") from None
    programs: dict[str, Program] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            program = _program(json.loads(line))
            if program.program_id in programs:
                raise WorkloadError(f"program_id: {program.program_id!r} occurs twice")
        except json.JSONDecodeError as error:
            raise WorkloadError(f"{path}:{number}: expected a JSON object: {error}") from None
        except WorkloadError as error:
            raise WorkloadError(f"{path}:{number}: {error}") from None
        programs[program.program_id] = program
    if not programs:
        raise WorkloadError(f"{path}: expected at least one program")
    return tuple(programs.values())


def dump_programs(programs: Iterable[Program], path: Path) -> None:
    """Writes programs as JSON lines, without the fields that have their default. Raises OSError."""
    with path.open("w", encoding="utf-8") as file:
        for program in programs:
            value = _without_defaults(program)
            value["turns"] = [_without_defaults(turn) for turn in program.turns]
            json.dump(value, file, separators=(",", ":"))
            file.write("\n")


def _without_defaults(item: Turn | Program) -> dict[str, Any]:
    values = {field.name: (getattr(item, field.name), field.default) for field in dataclasses.fields(item)}
    return {name: value for name, (value, default) in values.items() if value != default}


def _program(value: Any) -> Program:
    fields = _fields(value, Program)
    turns = fields["turns"]
    if not isinstance(turns, list) or not turns:
        raise WorkloadError(f"turns: expected a list of at least one turn, not {turns!r}")
    fields["turns"] = tuple(_turn(index, turn) for index, turn in enumerate(turns))
    if isinstance(fields.get("depends_on"), list):
        fields["depends_on"] = tuple(fields["depends_on"])
    return Program(**fields)


def _turn(index: int, value: Any) -> Turn:
    try:
        return Turn(**_fields(value, Turn))
    except WorkloadError as error:
        raise WorkloadError(f"turns[{index}].{error}") from None


def _fields(value: Any, kind: type[Turn] | type[Program]) -> dict[str, Any]:
    """The fields of a JSON object, if they are those of the class and none that it needs is missing."""
    what = kind.__name__.lower()
    if not isinstance(value, Mapping):
        raise WorkloadError(f"expected a {what} as a JSON object, not {value!r}")
    known = {field.name: field.default is dataclasses.MISSING for field in dataclasses.fields(kind)}
    for name in value:
        if name not in known:
            raise WorkloadError(f"{name}: expected only the fields {', '.join(known)} in a {what}")
    for name, required in known.items():
        if required and name not in value:
            raise WorkloadError(f"{name}: expected in every {what}, but it is missing")
    return dict(value)


def _check_no_cycle(programs: Iterable[Program]) -> None:
    """Takes programs away whose dependencies are gone; what is left in the end waits for itself (Kahn 1962)."""
    missing = {program.program_id: len(program.depends_on) for program in programs}
    dependents: dict[str, list[str]] = {}
    for program in programs:
        for other in program.depends_on:
            dependents.setdefault(other, []).append(program.program_id)
    free = [program_id for program_id, count in missing.items() if count == 0]
    while free:
        program_id = free.pop()
        del missing[program_id]
        for other in dependents.get(program_id, ()):
            missing[other] -= 1
            if missing[other] == 0:
                free.append(other)
    if missing:
        raise WorkloadError(f"depends_on: these programs wait for each other: {', '.join(sorted(missing))}")


def _check_int(name: str, value: Any, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise WorkloadError(f"{name}: expected a whole number of at least {minimum}, not {value!r}")


def _check_duration(name: str, value: Any) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < 0:
        raise WorkloadError(f"{name}: expected milliseconds, 0 or more, not {value!r}")


def _check_name(name: str, value: Any) -> None:
    if not isinstance(value, str) or not value:
        raise WorkloadError(f"{name}: expected a text that is not empty, not {value!r}")
