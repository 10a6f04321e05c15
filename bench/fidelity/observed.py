"""What a live run was, call by call: the recording of the daemon joined with what its client saw."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from agentserve.core.costmodel import DeviceProfile
from agentserve.errors import ConfigError
from agentserve.runtime.recorded_batches import RecordedBatch
from agentserve.runtime.recording import Header, Recording
from agentserve.sim.metrics import TurnRecord
from agentserve.sim.prefixes import group_prefixes, num_common_tokens
from agentserve.sim.programs import Program, Turn, Workload
from agentserve.sim.recorded import RecordedCall, recorded_calls
from bench.fidelity.steps import BatchTime, read_batches, timed
from bench.load.errors import BenchError

_NS_PER_MS = 1e6
CALIBRATION, HELD_OUT = "calibration", "held out"
"""Roles of a run: a profile is fitted to it, or only predicts it."""


@dataclass(frozen=True, slots=True)
class Outside:
    """Time outside the engine, of one call or the median of many: HTTP, tokenizer, event loops, the client itself.

    The simulator has none of it. What is added to its times is these constants, the same for every call.
    """

    send_ns: int = 0
    """From the client's request to the step in which the engine takes it up."""
    receive_ns: int = 0
    """From the step that has the first token to the client's reading it."""
    tail_ns: int = 0
    """From the step that has the last token to the end of the client's call."""
    turnaround_ns: int | None = None
    """From the step that has the last token to the one that takes up the next turn, without the tool gap. None after
    the last turn of a program."""


@dataclass(frozen=True, slots=True)
class Observation:
    """One live run of one cell."""

    cell: str
    round: int
    header: Header
    """How the daemon's engine was built."""
    workload: Workload
    """The same programs with the token counts that they really had, and the tool gaps that the client kept."""
    records: tuple[TurnRecord, ...]
    """What is to be predicted."""
    recorded: tuple[RecordedBatch, ...]
    """Empty if the recording was made by another version of the control plane; then `notes` says so."""
    outside: tuple[Outside, ...] = ()
    """For each call."""
    notes: tuple[str, ...] = ()
    fitted: DeviceProfile | None = None
    """Predicts instead of the profile that the daemon had, which still is what its control plane plans with."""
    role: str = HELD_OUT
    """Whether a profile is fitted to it."""
    others_share: float | None = None
    """Of the processor, used by other processes during the run."""

    @property
    def device(self) -> DeviceProfile:
        """What predicts. Raises ConfigError if the recording has no profile and none was fitted."""
        device = self.fitted or self.header.device
        if device is None:
            raise ConfigError(f"{self.cell}: the recording has no profile of its device")
        return device

    @property
    def batches(self) -> tuple[BatchTime, ...]:
        """Each batch beside what `device` says of it."""
        return timed(self.recorded, self.device, self.header.model_shape) if self.recorded else ()


def observe(
    path: Path,
    *,
    cell: str,
    round_index: int,
    planned: Workload,
    prompt_seed: str,
    records: Sequence[TurnRecord],
    started_ns: int,
    notes: Sequence[str] = (),
) -> Observation:
    """Joins a recording with the client's records of the same run, by session.

    Args:
        path: what `serve --record` has written.
        cell: title of the cell.
        round_index: of the run.
        planned: what the client ran.
        prompt_seed: that of the run: sessions are called `SEED/PROGRAM`.
        records: what the client saw; times count from `started_ns`.
        started_ns: start of the run on the monotonic clock.
        notes: what else is to be said of the run.

    Raises BenchError if a call of the client is missing in the recording or failed, RecordingError if that cannot be
    read.
    """
    recording = Recording(path)
    sessions: dict[str, list[RecordedCall]] = {}
    for call in recorded_calls(recording):
        if call.token_ids:
            sessions.setdefault(call.command.session_id or "", []).append(call)
    by_program = _by_program(records)
    joined: dict[str, list[RecordedCall]] = {}
    for program_id, seen in by_program.items():
        failed = next((record.error for record in seen if record.error is not None), None)
        calls = sessions.get(f"{prompt_seed}/{program_id}", [])
        if failed is not None or len(calls) != len(seen):
            why = failed or f"{len(seen)} calls were made, but the engine recorded {len(calls)}"
            raise BenchError(f"{cell}, round {round_index}: program {program_id}: {why}")
        joined[program_id] = calls
    recorded, batch_notes = read_batches(path)
    return Observation(
        cell=cell,
        round=round_index,
        header=recording.header,
        workload=real_workload(planned, joined, started_ns),
        records=tuple(records),
        # Not those of the calibration of prompts and of the warm-up.
        recorded=tuple(batch for batch in recorded if batch.started_ns >= started_ns),
        outside=tuple(_outside(planned, by_program, joined, started_ns)),
        notes=(*notes, *batch_notes),
    )


def real_workload(planned: Workload, calls: Mapping[str, Sequence[RecordedCall]], started_ns: int) -> Workload:
    """The programs as they went: lengths, common beginnings and what was kept of each conversation.

    The text of an answer that goes back into the next prompt need not become the same tokens again. From the first one
    that differs on nothing is in the cache, so `keep_tokens` says how far they agree.

    Programs that start by themselves start when they did: a client cannot send several calls in one moment, and which
    of them comes first decides which prompt is read first. In a closed loop a further program follows the one whose
    end made its agent free.
    """
    programs = [program for program in planned.programs if program.program_id in calls]
    firsts = [calls[program.program_id][0].command for program in programs]
    prefixes = group_prefixes((first.cache_salt, first.prompt_token_ids) for first in firsts)
    real: list[Program] = []
    for program, (prefix_id, num_prefix) in zip(programs, prefixes, strict=True):
        mine = calls[program.program_id]
        depends_on = tuple(other for other in program.depends_on if other in calls)
        arrival_ms = program.arrival_ms
        if not depends_on and planned.num_agents is not None and len(real) >= planned.num_agents:
            depends_on = _whose_agent(real, mine[0].arrival_ns, calls)
        if not depends_on:
            arrival_ms = max(0.0, (mine[0].arrival_ns - started_ns) / _NS_PER_MS)
        real.append(
            dataclasses.replace(
                program,
                turns=_turns(program, mine),
                prefix_id=prefix_id,
                prefix_tokens=num_prefix,
                depends_on=depends_on,
                arrival_ms=arrival_ms,
            )
        )
    return dataclasses.replace(planned, programs=tuple(real), num_agents=None)


def _whose_agent(before: Sequence[Program], at_ns: int, calls: Mapping[str, Sequence[RecordedCall]]) -> tuple[str, ...]:
    """The program that ended last before a time and has no follower yet; nothing if there is none."""
    taken = {other for program in before for other in program.depends_on}
    ends = {program.program_id: calls[program.program_id][-1].token_ns[-1] for program in before}
    free = [name for name, end_ns in ends.items() if end_ns <= at_ns and name not in taken]
    return (max(free, key=lambda name: ends[name]),) if free else ()


def _turns(program: Program, calls: Sequence[RecordedCall]) -> tuple[Turn, ...]:
    turns = []
    history: tuple[int, ...] = ()
    for planned, call in zip(program.turns, calls, strict=False):
        prompt = call.command.prompt_token_ids
        num_kept = num_common_tokens(history, prompt)
        turns.append(
            Turn(
                append_tokens=len(prompt) - num_kept,
                output_tokens=len(call.token_ids),
                tool_gap_ms=planned.tool_gap_ms,
                keep_tokens=num_kept if num_kept < len(history) else None,
            )
        )
        history = (*prompt, *call.token_ids)
    return tuple(turns)


def _by_program(records: Iterable[TurnRecord]) -> dict[str, list[TurnRecord]]:
    found: dict[str, list[TurnRecord]] = {}
    for record in sorted(records, key=lambda record: record.turn_index):
        found.setdefault(record.program_id, []).append(record)
    return found


def _outside(
    planned: Workload,
    records: Mapping[str, Sequence[TurnRecord]],
    calls: Mapping[str, Sequence[RecordedCall]],
    started_ns: int,
) -> Iterable[Outside]:
    gaps_ms = {program.program_id: [turn.tool_gap_ms for turn in program.turns] for program in planned.programs}
    for program_id, seen in records.items():
        made = calls[program_id]
        for index, (record, call, following) in enumerate(
            itertools.zip_longest(seen, made, made[1:])  # the last one has no following
        ):
            turnaround_ns = None
            if following is not None:
                gap_ns = round(gaps_ms[program_id][index] * _NS_PER_MS)
                turnaround_ns = following.arrival_ns - call.token_ns[-1] - gap_ns
            yield Outside(
                send_ns=call.arrival_ns - started_ns - record.sent_ns,
                receive_ns=record.token_ns[0] + started_ns - call.token_ns[0],
                tail_ns=record.finished_ns + started_ns - call.token_ns[-1],
                turnaround_ns=turnaround_ns,
            )


def median_outside(calls: Iterable[Outside]) -> Outside:
    """The median of each part on its own; 0 for a part that no call has."""
    found = list(calls)

    def median(values: Iterable[int | None]) -> int:
        known = [value for value in values if value is not None]
        return round(statistics.median(known)) if known else 0

    return Outside(
        send_ns=median(call.send_ns for call in found),
        receive_ns=median(call.receive_ns for call in found),
        tail_ns=median(call.tail_ns for call in found),
        turnaround_ns=median(call.turnaround_ns for call in found),
    )
