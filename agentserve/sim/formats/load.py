"""Any file of programs or requests as a workload; what it is, is seen from its first line."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from agentserve.errors import WorkloadError
from agentserve.sim.formats.agentservesim import read_agentservesim
from agentserve.sim.formats.azure import AZURE_COLUMNS, SPLITWISE_COLUMNS, read_azure, read_splitwise
from agentserve.sim.formats.bailian import read_bailian
from agentserve.sim.formats.interface import Reader, Trace
from agentserve.sim.formats.mooncake import read_mooncake
from agentserve.sim.programs import Program, Workload, read_programs
from agentserve.sim.recorded import recording_workload
from agentserve.sim.records import Source, shown


def _read_own(source: Source, limit: int | None) -> Trace:
    return Trace(read_programs(source, limit))


_READERS: Mapping[str, Reader] = MappingProxyType(
    {
        "programs": _read_own,
        "agentservesim": read_agentservesim,
        "mooncake": read_mooncake,
        "bailian": read_bailian,
        "splitwise": read_splitwise,
        "azure": read_azure,
    }
)

FORMATS: Mapping[str, str] = MappingProxyType(
    {
        "programs": "programs of turns, JSON lines with `turns`",
        "agentservesim": "AgentServeSim and LLMServingSim, JSON lines with `sub_requests`, `nodes` or `input_toks`",
        "mooncake": "Mooncake, JSON lines with `timestamp`, `input_length`, `output_length`, `hash_ids`",
        "bailian": "Qwen-Bailian, JSON lines with `chat_id`, `parent_chat_id`, `hash_ids`",
        "splitwise": f"CSV with {','.join(SPLITWISE_COLUMNS)}",
        "azure": f"CSV with {','.join(AZURE_COLUMNS)}",
        "recording": "what `agentserve serve --record` wrote",
    }
)
"""Names of the formats and a line about each."""


def detect_format(source: Path | Iterable[str]) -> str:
    """The format of a source, from its first line. Raises WorkloadError if it is none of `FORMATS`."""
    return _detect(Source.of(source))


def load_workload(
    source: Path | Iterable[str],
    *,
    format: str = "auto",
    num_agents: int | None = None,
    seed: int = 0,
    limit: int | None = None,
) -> Workload:
    """Reads a workload; `description` says of which format it is, `notes` what could not be taken over.

    Args:
        source: a file, plain or gzip (a recording only plain), or lines.
        format: one of `FORMATS`, or `auto`.
        num_agents: run it as a closed loop of so many agents, without its arrival times. None: at its arrival times; a
            program without one starts at once.
        seed: what the prompts are made from, as far as the file does not say what is in them.
        limit: read at most the first so many records (conversations of a recording); None reads all.

    Raises WorkloadError with file, line, field and what was expected, RecordingError for a broken recording.
    """
    if format not in ("auto", *FORMATS):
        raise WorkloadError(f"there is no format {format!r}; there are auto, {', '.join(FORMATS)}")
    if limit is not None and limit < 1:
        raise WorkloadError(f"limit: expected at least 1, not {limit}")
    lines = Source.of(source)
    name = _detect(lines) if format == "auto" else format
    trace = _read_recording(lines, limit) if name == "recording" else _READERS[name](lines, limit)
    if not trace.programs:
        raise WorkloadError(f"{lines.name}: expected at least one record of the format {name}")
    programs, notes = trace.programs, trace.notes
    if num_agents is not None:
        programs, num_timed = _without_arrivals(programs)
        notes += (f"{num_timed} arrival times are not used in a closed loop",) if num_timed else ()
    num_turns = sum(len(program.turns) for program in programs)
    file_name = lines.name if lines.path is None else lines.path.name
    description = f"{len(programs)} programs with {num_turns} turns of {file_name}, format {name}"
    return Workload(lines.stem, programs, num_agents, seed, description, notes)


def _read_recording(source: Source, limit: int | None) -> Trace:
    if source.path is None or source.is_compressed:
        raise WorkloadError(f"{source.name}: a recording is read from a plain file; unpack it first")
    workload = recording_workload(source.path)
    num_left_out = 0 if limit is None else max(0, len(workload.programs) - limit)
    notes = workload.notes + ((f"{num_left_out} conversations are behind the limit",) if num_left_out else ())
    return Trace(workload.programs[:limit], notes)


def _without_arrivals(programs: tuple[Program, ...]) -> tuple[tuple[Program, ...], int]:
    """The programs without their times, and how many times there were."""
    num_timed = sum(
        (program.arrival_ms is not None) + sum(turn.arrival_ms is not None for turn in program.turns)
        for program in programs
    )
    if not num_timed:
        return programs, 0
    bare = (
        dataclasses.replace(
            program,
            arrival_ms=None,
            turns=tuple(
                turn if turn.arrival_ms is None else dataclasses.replace(turn, arrival_ms=None)
                for turn in program.turns
            ),
        )
        for program in programs
    )
    return tuple(bare), num_timed


# ---- detection ----

_JSON_SIGNS: tuple[tuple[str, Callable[[Mapping[str, object]], bool]], ...] = (
    ("programs", lambda value: "turns" in value),
    ("agentservesim", lambda value: not value.keys().isdisjoint({"sub_requests", "nodes", "input_toks"})),
    ("bailian", lambda value: "chat_id" in value and "hash_ids" in value),
    ("mooncake", lambda value: "timestamp" in value and "hash_ids" in value),
    ("recording", lambda value: "version" in value and "config" in value),
)


def _detect(source: Source) -> str:
    number, line = next(iter(source.lines()), (1, ""))
    if line.lstrip().startswith("{"):
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise WorkloadError(f"{source.name}:{number}: expected a JSON object: {error}") from None
        for name, fits in _JSON_SIGNS:
            if fits(value):
                return name
    else:
        cells = {cell.strip() for cell in next(csv.reader([line]), [])}
        if SPLITWISE_COLUMNS[1] in cells:
            return "splitwise"
        if AZURE_COLUMNS[1] in cells:
            return "azure"
    known = "; ".join(f"{name}: {what}" for name, what in FORMATS.items())
    raise WorkloadError(f"{source.name}:{number}: expected one of these formats: {known}; not {shown(line.strip())}")
