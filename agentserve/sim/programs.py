"""Programs: what an agent does, as turns of a growing conversation with tool gaps between them.

The same programs drive the live daemon through `bench/run.py` and the simulator. A file holds one program a line, as
JSON; fields that have their default may be left out:

    {"program_id": "a", "turns": [{"append_tokens": 900, "output_tokens": 40, "tool_gap_ms": 200}, ...]}
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentserve.errors import WorkloadError
from agentserve.sim.blocks import MAX_BLOCK_ID
from agentserve.sim.records import Source, shown


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
    tool_name: str | None = None
    """The tool that runs in the gap; a tool profile draws its time by this name."""
    keep_tokens: int | None = None
    """How many tokens of the conversation before it stay in the prompt, counted from its beginning; the rest is cut
    off. None: all of them."""
    block_ids: tuple[int, ...] = ()
    """What the appended tokens are: blocks of the program's `block_tokens` each, the last one may be partial. Equal ids
    are equal tokens in all programs, different ids differ. Empty: tokens that nobody else has."""
    arrival_ms: float | None = None
    """Open loop, not in the first turn: the turn does not start before this time from the start of the run."""
    agent: str | None = None
    """Which agent of the program makes the call, if it has several: each has a history of its own."""

    def __post_init__(self) -> None:
        _check_int("append_tokens", self.append_tokens, 1)
        _check_int("output_tokens", self.output_tokens, 1)
        _check_duration("tool_gap_ms", self.tool_gap_ms)
        if self.tool_name is not None:
            _check_name("tool_name", self.tool_name)
        if self.keep_tokens is not None:
            _check_int("keep_tokens", self.keep_tokens, 0)
        if not isinstance(self.block_ids, tuple):
            raise WorkloadError(f"block_ids: expected a list of whole numbers, not {shown(self.block_ids)}")
        for block_id in self.block_ids:
            if type(block_id) is not int or not 0 <= block_id <= MAX_BLOCK_ID:
                raise WorkloadError(f"block_ids: expected whole numbers from 0 to {MAX_BLOCK_ID}, not {block_id!r}")
        if self.arrival_ms is not None:
            _check_duration("arrival_ms", self.arrival_ms)
        if self.agent is not None:
            _check_name("agent", self.agent)

    @property
    def is_linear(self) -> bool:
        """Whether it only appends to the conversation before it, at once or after the gap, with tokens of its own."""
        return self.keep_tokens is None and not self.block_ids and self.arrival_ms is None and self.agent is None


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
    dependency_gaps_ms: tuple[float, ...] = ()
    """For each of `depends_on`, from the end of that program to the start of this one; empty: none."""
    block_tokens: int = 0
    """Tokens in a block of `Turn.block_ids`. 0: no turn has blocks."""
    adapter: str | None = None
    """The LoRA adapter that its calls are for."""
    task: str | None = None
    """What it is a part of, if that has several programs: to policies all of them are one."""
    says_end: bool = True
    """Whether its last call says that it is the last one. A simulated client knows; many real ones do not."""

    def __post_init__(self) -> None:
        _check_name("program_id", self.program_id)
        if not isinstance(self.turns, tuple) or not self.turns or not all(isinstance(t, Turn) for t in self.turns):
            raise WorkloadError(f"turns: expected at least one turn, not {shown(self.turns)}")
        self._check_prefix()
        self._check_dependencies()
        self._check_turns()
        if self.arrival_ms is not None:
            _check_duration("arrival_ms", self.arrival_ms)
        _check_name("role", self.role)
        for name in ("adapter", "task"):
            if getattr(self, name) is not None:
                _check_name(name, getattr(self, name))
        if not isinstance(self.says_end, bool):
            raise WorkloadError(f"says_end: expected true or false, not {shown(self.says_end)}")

    def _check_prefix(self) -> None:
        if self.prefix_id is not None:
            _check_name("prefix_id", self.prefix_id)
        _check_int("prefix_tokens", self.prefix_tokens, 0 if self.prefix_id is None else 1)
        limit = self.turns[0].append_tokens if self.prefix_id is not None else 0
        if self.prefix_tokens > limit:
            expected = f"at most the {limit} tokens of the first turn" if limit else "0, because there is no prefix_id"
            raise WorkloadError(f"prefix_tokens: expected {expected}, not {self.prefix_tokens}")
        if self.prefix_id is not None and self.turns[0].block_ids:
            raise WorkloadError("prefix_id: expected none, because the first turn has block_ids")

    def _check_dependencies(self) -> None:
        if not isinstance(self.depends_on, tuple):
            raise WorkloadError(f"depends_on: expected a list of program ids, not {shown(self.depends_on)}")
        for other in self.depends_on:
            _check_name("depends_on", other)
        if len({self.program_id, *self.depends_on}) != 1 + len(self.depends_on):
            raise WorkloadError(f"depends_on: expected other programs, each once, not {shown(list(self.depends_on))}")
        gaps = self.dependency_gaps_ms
        if not isinstance(gaps, tuple) or len(gaps) not in (0, len(self.depends_on)):
            raise WorkloadError(
                f"dependency_gaps_ms: expected {len(self.depends_on)} as in depends_on, or none, not {shown(gaps)}"
            )
        for gap_ms in gaps:
            _check_duration("dependency_gaps_ms", gap_ms)

    def _check_turns(self) -> None:
        """What only the program knows of its turns: the length of the conversation and the size of a block."""
        _check_int("block_tokens", self.block_tokens, 0)
        if self.turns[0].arrival_ms is not None:
            raise WorkloadError("turns[0].arrival_ms: expected none, it is the program's arrival_ms")
        for index, (turn, num_kept) in enumerate(zip(self.turns, self._num_kept_tokens(), strict=True)):
            if turn.keep_tokens is not None and turn.keep_tokens > num_kept:
                raise WorkloadError(
                    f"turns[{index}].keep_tokens: expected at most the {num_kept} tokens before it, "
                    f"not {turn.keep_tokens}"
                )
            if not turn.block_ids:
                continue
            if self.block_tokens == 0:
                raise WorkloadError(f"block_tokens: expected at least 1, because turns[{index}] has block_ids, not 0")
            num_blocks = -(-turn.append_tokens // self.block_tokens)
            if len(turn.block_ids) != num_blocks:
                raise WorkloadError(
                    f"turns[{index}].block_ids: expected {num_blocks} blocks of {self.block_tokens} tokens for "
                    f"{turn.append_tokens} tokens, not {len(turn.block_ids)}"
                )

    def _num_kept_tokens(self) -> list[int]:
        """For each turn, how much of the conversation before it is in its prompt."""
        kept, num_tokens = [], 0
        for turn in self.turns:
            kept.append(num_tokens if turn.keep_tokens is None else min(turn.keep_tokens, num_tokens))
            num_tokens = kept[-1] + turn.append_tokens + turn.output_tokens
        return kept

    @property
    def num_prompt_tokens(self) -> tuple[int, ...]:
        """The length of each turn's prompt."""
        kept = self._num_kept_tokens()
        return tuple(num_kept + turn.append_tokens for turn, num_kept in zip(self.turns, kept, strict=True))

    @property
    def num_context_tokens(self) -> int:
        """The longest prompt with its output: the window that the program needs."""
        return max(n + turn.output_tokens for n, turn in zip(self.num_prompt_tokens, self.turns, strict=True))

    @property
    def is_linear(self) -> bool:
        """Whether it is a growing conversation and nothing else: what a client of a live server can play."""
        return all(turn.is_linear for turn in self.turns) and not any(self.dependency_gaps_ms)


@dataclass(frozen=True, slots=True)
class WorldStep:
    """A step of an agent simulation: it begins when all calls of the step before it have ended, and its gap is over."""

    calls: tuple[str, ...]
    """Programs that make their next turn at once."""
    distances: tuple[tuple[str, float], ...] = ()
    """What the framework says once these calls are made: steps from this one to the next turns of programs."""
    gap_ms: float = 0.0
    """From the end of the step's last call to the next step: the world moves on without the model."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Programs and how they are to be run.

    Raises WorkloadError for ids that occur twice, unknown or circular dependencies, arrivals in a closed loop, and
    steps that do not make each turn once.
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
    notes: tuple[str, ...] = ()
    """What the file that it was read from says, but this does not: for a person who reads results."""
    steps: tuple[WorldStep, ...] = ()
    """If there are any, they alone say when turns are made: not agents, arrivals, dependencies or gaps of tools."""

    def __post_init__(self) -> None:
        if self.steps:
            calls = Counter(program_id for step in self.steps for program_id in step.calls)
            if calls != {program.program_id: len(program.turns) for program in self.programs}:
                raise WorkloadError(f"workload {self.name}: expected each turn in one step")
        if not self.programs:
            raise WorkloadError(f"workload {self.name}: expected at least one program")
        if self.num_agents is not None:
            _check_int("num_agents", self.num_agents, 1)
        by_id: dict[str, Program] = {}
        for program in self.programs:
            if program.program_id in by_id:
                raise WorkloadError(f"program_id: {program.program_id!r} occurs twice")
            is_timed = program.arrival_ms is not None or any(turn.arrival_ms is not None for turn in program.turns)
            if self.num_agents is not None and is_timed:
                raise WorkloadError(
                    f"program {program.program_id!r}: arrival_ms: expected none in a closed loop of "
                    f"{self.num_agents} agents"
                )
            by_id[program.program_id] = program
        for program in self.programs:
            for other in program.depends_on:
                if other not in by_id:
                    raise WorkloadError(f"program {program.program_id!r}: depends_on: there is no program {other!r}")
        stuck = circular({program.program_id: program.depends_on for program in self.programs})
        if stuck:
            raise WorkloadError(f"depends_on: these programs wait for each other: {', '.join(stuck)}")

    @property
    def num_context_tokens(self) -> int:
        """The window that its longest program needs."""
        return max(program.num_context_tokens for program in self.programs)


def load_programs(path: Path) -> tuple[Program, ...]:
    """Reads programs from a file of JSON lines, plain or gzip; empty lines are skipped.

    Raises WorkloadError with file, line, field and what was expected; also for a file that cannot be read or is empty.
    """
    return read_programs(Source.of(path))


def read_programs(source: Source, limit: int | None = None) -> tuple[Program, ...]:
    """The same from any source; at most the first `limit` programs."""
    programs: dict[str, Program] = {}
    for number, line in itertools.islice(source.lines(), limit):
        try:
            program = _program(json.loads(line))
            if program.program_id in programs:
                raise WorkloadError(f"program_id: {program.program_id!r} occurs twice")
        except (json.JSONDecodeError, RecursionError) as error:
            raise WorkloadError(f"{source.name}:{number}: expected a JSON object: {error}") from None
        except WorkloadError as error:
            raise WorkloadError(f"{source.name}:{number}: {error}") from None
        programs[program.program_id] = program
    if not programs:
        raise WorkloadError(f"{source.name}: expected at least one program")
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
        raise WorkloadError(f"turns: expected a list of at least one turn, not {shown(turns)}")
    fields["turns"] = tuple(_turn(index, turn) for index, turn in enumerate(turns))
    return Program(**_with_tuples(fields, "depends_on", "dependency_gaps_ms"))


def _turn(index: int, value: Any) -> Turn:
    try:
        return Turn(**_with_tuples(_fields(value, Turn), "block_ids"))
    except WorkloadError as error:
        raise WorkloadError(f"turns[{index}].{error}") from None


def _with_tuples(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    return {k: tuple(v) if k in names and isinstance(v, list) else v for k, v in fields.items()}


def _fields(value: Any, kind: type[Turn] | type[Program]) -> dict[str, Any]:
    """The fields of a JSON object, if they are those of the class and none that it needs is missing."""
    what = kind.__name__.lower()
    if not isinstance(value, Mapping):
        raise WorkloadError(f"expected a {what} as a JSON object, not {shown(value)}")
    known = {field.name: field.default is dataclasses.MISSING for field in dataclasses.fields(kind)}
    for name in value:
        if name not in known:
            raise WorkloadError(f"{name}: expected only the fields {', '.join(known)} in a {what}")
    for name, required in known.items():
        if required and name not in value:
            raise WorkloadError(f"{name}: expected in every {what}, but it is missing")
    return dict(value)


def circular(depends_on: Mapping[str, Collection[str]]) -> list[str]:
    """Those that wait for each other, or for such ones, sorted; nobody may wait for an unknown one.

    Takes away what waits for nothing that is left; what remains in the end waits for itself (Kahn 1962).
    """
    missing = {name: len(others) for name, others in depends_on.items()}
    dependents: dict[str, list[str]] = {}
    for name, others in depends_on.items():
        for other in others:
            dependents.setdefault(other, []).append(name)
    free = [name for name, count in missing.items() if count == 0]
    while free:
        name = free.pop()
        del missing[name]
        for dependent in dependents.get(name, ()):
            missing[dependent] -= 1
            if missing[dependent] == 0:
                free.append(dependent)
    return sorted(missing)


def _check_int(name: str, value: Any, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise WorkloadError(f"{name}: expected a whole number of at least {minimum}, not {shown(value)}")


def _check_duration(name: str, value: Any) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < 0:
        raise WorkloadError(f"{name}: expected milliseconds, 0 or more, not {shown(value)}")


def _check_name(name: str, value: Any) -> None:
    if not isinstance(value, str) or not value:
        raise WorkloadError(f"{name}: expected a text that is not empty, not {shown(value)}")
