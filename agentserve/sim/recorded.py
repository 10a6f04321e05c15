"""A recording of a daemon: its traffic as a workload for any engine or device, and what the clients saw of it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from agentserve.core.batch import BatchOutput
from agentserve.core.events import NoteTurn, SubmitRequest
from agentserve.errors import WorkloadError
from agentserve.runtime.recording import Header, Recording
from agentserve.sim.metrics import TurnRecord
from agentserve.sim.prefixes import group_prefixes
from agentserve.sim.programs import Program, Turn, Workload
from agentserve.sim.records import Notes

_NS_PER_MS = 1e6


@dataclass(slots=True)
class RecordedCall:
    """A recorded request and what became of it."""

    command: SubmitRequest
    arrival_ns: int
    """When the engine took it up, on the clock of the recording."""
    token_ids: list[int] = field(default_factory=list)
    """What was generated."""
    token_ns: list[int] = field(default_factory=list)
    """When each token was there."""
    tool_name: str | None = None
    """What its answer was found to end with."""
    num_cached_tokens: int | None = None
    """At its first admission."""
    is_done: bool = False
    """With look-ahead, tokens may be computed for a request that has ended."""

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ns)

    @property
    def end_ns(self) -> int:
        return self.token_ns[-1]

    @property
    def num_tokens(self) -> int:
        return len(self.command.prompt_token_ids) + self.num_output_tokens


@dataclass(frozen=True, slots=True)
class RecordedTraffic:
    """What a recording says."""

    header: Header
    """How the daemon's engine was built."""
    workload: Workload
    """The same traffic, to be sent again."""
    records: tuple[TurnRecord, ...]
    """How it went, in the order of the ends; times count from the first arrival. A call is sent when the engine takes
    it up: what the HTTP side needed is not in it."""


def read_recording(path: Path, *, seed: int = 0) -> RecordedTraffic:
    """Reads a recording as an open-loop workload, with its header and its measurements.

    A request whose prompt continues the prompt and output of an earlier request of the same agent and session is the
    next turn of its program; the time between them is the tool gap. All others start a program when they arrived.
    First prompts that begin with the same tokens (and have the same cache salt and adapter) get a common prefix.
    Requests that got no token are left out, and the notes count them. The prompts themselves are drawn anew from
    `seed`.

    Raises RecordingError if the file cannot be read, WorkloadError if no request in it got a token.
    """
    recording = Recording(path)
    calls = recorded_calls(recording)
    chains = _chains([call for call in calls if call.token_ns])
    if not chains:
        raise WorkloadError(f"{path}: expected at least one request that got a token")
    start_ns = min(chain[0].arrival_ns for chain in chains)
    programs = []
    records: list[TurnRecord] = []
    prefixes = group_prefixes((_scope(c[0].command), c[0].command.prompt_token_ids) for c in chains)
    for index, (chain, (prefix_id, num_prefix_tokens)) in enumerate(zip(chains, prefixes, strict=True)):
        program_id = f"recorded-{index:04d}"
        programs.append(
            Program(
                program_id,
                _turns(chain),
                prefix_id=prefix_id,
                prefix_tokens=num_prefix_tokens,
                arrival_ms=(chain[0].arrival_ns - start_ns) / _NS_PER_MS,
                adapter=chain[0].command.adapter,
                task=chain[0].command.program_id,
                says_end=chain[-1].command.is_last_turn is True,
            )
        )
        records += _records(program_id, chain, start_ns)
    records.sort(key=lambda record: (record.finished_ns, record.program_id))
    notes = Notes()
    notes.add("requests got no token and are left out", sum(not call.token_ns for call in calls))
    description = f"{len(programs)} recorded conversations"
    workload = Workload("recording", tuple(programs), None, seed, description, notes.lines())
    return RecordedTraffic(recording.header, workload, tuple(records))


def recording_workload(path: Path, *, seed: int = 0) -> Workload:
    """The workload of `read_recording`. Raises what that raises."""
    return read_recording(path, seed=seed).workload


def recorded_calls(recording: Recording) -> list[RecordedCall]:
    """All requests, in the order of arrival. Raises RecordingError for a malformed line."""
    calls: dict[str, RecordedCall] = {}
    for step in recording.steps():
        for output in step.completions:
            for sample in output.samples if isinstance(output, BatchOutput) else ():
                call = calls.get(sample.request_id)
                if call is not None and not call.is_done:
                    call.token_ids.append(sample.token_id)
                    call.token_ns.append(step.now_ns)
        for command in step.commands:
            if isinstance(command, SubmitRequest):
                calls[command.request_id] = RecordedCall(command, step.now_ns, tool_name=command.tool_name)
            elif isinstance(command, NoteTurn) and command.request_id in calls:
                calls[command.request_id].tool_name = command.tool_name
        for line in step.decisions:
            _book(line, calls)
    return list(calls.values())


def _book(line: str, calls: dict[str, RecordedCall]) -> None:
    """Takes `admit ID cached=640/1000` and `finish ID ...` of the decision log; of admissions the first."""
    kind, _, rest = line.partition(" ")
    if kind not in {"admit", "finish"}:
        return
    request_id, _, details = rest.partition(" ")
    call = calls.get(request_id)
    if call is None:
        return
    if kind == "finish":
        call.is_done = True
    elif call.num_cached_tokens is None:
        call.num_cached_tokens = int(details.removeprefix("cached=").partition("/")[0])


def _records(program_id: str, chain: Sequence[RecordedCall], start_ns: int) -> list[TurnRecord]:
    return [
        TurnRecord(
            program_id=program_id,
            turn_index=index,
            role="agent",
            num_turns=len(chain),
            num_prompt_tokens=len(call.command.prompt_token_ids),
            num_cached_tokens=call.num_cached_tokens,
            num_output_tokens=call.num_output_tokens,
            sent_ns=call.arrival_ns - start_ns,
            token_ns=tuple(at_ns - start_ns for at_ns in call.token_ns),
            finished_ns=call.end_ns - start_ns,
        )
        for index, call in enumerate(chain)
    ]


def _chains(calls: list[RecordedCall]) -> list[list[RecordedCall]]:
    """Calls by conversation: each continues the one before it."""
    chains: list[list[RecordedCall]] = []
    open_chains: dict[tuple[str | None, ...], list[list[RecordedCall]]] = {}
    for call in calls:
        command = call.command
        candidates = open_chains.setdefault((command.agent_id, command.session_id, *_scope(command)), [])
        # The longest one: of a conversation and a branch of it, the branch.
        chain = max((c for c in candidates if _continues(call, c[-1])), key=lambda c: c[-1].num_tokens, default=None)
        if chain is None:
            chain = []
            chains.append(chain)
            candidates.append(chain)
        chain.append(call)
    return chains


def _scope(command: SubmitRequest) -> tuple[str | None, str | None]:
    """Prompts share prefixes only within it."""
    return command.cache_salt, command.adapter


def _continues(call: RecordedCall, before: RecordedCall) -> bool:
    prompt, earlier = call.command.prompt_token_ids, before.command.prompt_token_ids
    is_later = call.arrival_ns >= before.end_ns and len(prompt) > before.num_tokens
    return is_later and prompt[: len(earlier)] == earlier


def _turns(chain: list[RecordedCall]) -> tuple[Turn, ...]:
    turns = []
    num_history = 0
    for call, following in itertools.zip_longest(chain, chain[1:]):
        gap_ms = (following.arrival_ns - call.end_ns) / _NS_PER_MS if following else 0.0
        num_new = len(call.command.prompt_token_ids) - num_history
        turns.append(Turn(num_new, call.num_output_tokens, gap_ms, call.tool_name))
        num_history = call.num_tokens
    return tuple(turns)
