"""Runs a workload on the virtual clock: agents, tool gaps, dependencies, conversations that grow.

The engine is the daemon's; only the clients are simulated here. A conversation is token ids: what a turn appends is
drawn from the workload's seed, what the engine generated becomes part of the next prompt, and programs of one prefix
start with the same tokens. So the prefix cache finds what it would find in the daemon.
"""

from __future__ import annotations

import heapq
import zlib
from dataclasses import dataclass, field
from random import Random

from agentserve.core.batch import Batch, BatchOutput, Lane
from agentserve.core.costmodel import BatchShape
from agentserve.core.engine import StepResult
from agentserve.core.events import BatchScheduled, RequestFinished, SubmitRequest, TokenGenerated
from agentserve.core.request import FinishReason, SamplingParams, WorkClass
from agentserve.runtime.virtual import VirtualDriver
from agentserve.sim.metrics import TurnRecord
from agentserve.sim.programs import Program, Workload

_VOCABULARY = range(1000, 33_000)
"""Synthetic prompt tokens; so many that two prompts do not begin alike by chance."""
_NS_PER_MS = 1e6


@dataclass(frozen=True, slots=True)
class BatchSpan:
    """A batch on the time line. Times are nanoseconds from the start of the run."""

    lane: Lane
    partition: str
    """Label of its partition."""
    started_ns: int
    finished_ns: int
    num_decodes: int
    num_cold_tokens: int
    num_resume_tokens: int
    cold_program_ids: tuple[str, ...]
    """Programs whose cold prefill it advances."""


@dataclass(frozen=True, slots=True)
class SimulatedRun:
    """What came of a workload."""

    records: tuple[TurnRecord, ...]
    """One for each call that was made, in the order of their ends."""
    batches: tuple[BatchSpan, ...]
    """In the order of their starts."""


def simulate(workload: Workload, driver: VirtualDriver) -> SimulatedRun:
    """Runs all programs to their end. The same workload and a driver in the same state give the same run.

    Args:
        workload: what to run.
        driver: a driver without work of its own; its clock may stand anywhere, times count from there.

    A call that fails ends its program, and programs that depend on it still start: the record has the error. Raises
    EngineError if the engine stops before all is done.
    """
    return _Orchestrator(workload, driver).run()


@dataclass(slots=True)
class _Session:
    """A program that has started."""

    program: Program
    random: Random
    history: list[int]
    """Prompt and output of all turns so far."""
    turn_index: int = 0
    sent_ns: int = 0
    num_prompt_tokens: int = 0
    token_ns: list[int] = field(default_factory=list)

    @property
    def request_id(self) -> str:
        return f"{self.program.program_id}/{self.turn_index}"


class _Stream:
    """The tokens of a prefix: as many as somebody has asked for."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._tokens: list[int] = []

    def first(self, num_tokens: int) -> list[int]:
        """A new list of the first tokens."""
        if num_tokens > len(self._tokens):
            # One draw a token: how many were drawn at a time makes no difference.
            self._tokens += self._random.choices(_VOCABULARY, k=num_tokens - len(self._tokens))
        return self._tokens[:num_tokens]


class _Orchestrator:
    def __init__(self, workload: Workload, driver: VirtualDriver) -> None:
        self._workload = workload
        self._driver = driver
        self._start_ns = driver.clock.now_ns()
        self._sessions: dict[str, _Session] = {}  # by the id of the request under way
        self._num_missing = [len(program.depends_on) for program in workload.programs]
        self._dependents: dict[str, list[int]] = {}
        for index, program in enumerate(workload.programs):
            for other in program.depends_on:
                self._dependents.setdefault(other, []).append(index)
        self._ready = [index for index, count in enumerate(self._num_missing) if count == 0]  # a heap: sorted
        self._num_free_agents = workload.num_agents
        self._prefixes: dict[str, _Stream] = {}
        self._records: list[TurnRecord] = []
        self._batches: dict[int, Batch] = {}
        self._spans: list[tuple[int, BatchSpan]] = []

    def run(self) -> SimulatedRun:
        self._start_ready(self._start_ns)
        while (result := self._driver.step()) is not None:
            for output in self._driver.last_completions:
                self._spans.append((output.batch_id, self._span(self._batches.pop(output.batch_id), output)))
            self._take(result)
        assert not self._sessions and not any(self._num_missing), "programs are left, but the engine is done"
        spans = tuple(span for _, span in sorted(self._spans, key=lambda item: item[0]))
        return SimulatedRun(tuple(self._records), spans)

    def _take(self, result: StepResult) -> None:
        for event in result.events:
            if isinstance(event, TokenGenerated):
                session = self._sessions[event.request_id]
                session.history.append(event.sample.token_id)
                session.token_ns.append(event.at_ns - self._start_ns)
            elif isinstance(event, RequestFinished):
                self._turn_done(self._sessions.pop(event.request_id), event)
            elif isinstance(event, BatchScheduled):
                self._batches[event.batch.batch_id] = event.batch

    # ---- programs ----

    def _start_ready(self, now_ns: int) -> None:
        """Starts the programs whose dependencies have ended, in their order, while agents are free."""
        while self._ready and self._num_free_agents != 0:
            program = self._workload.programs[heapq.heappop(self._ready)]
            if self._num_free_agents is not None:
                self._num_free_agents -= 1
            arrival_ns = self._start_ns + round((program.arrival_ms or 0.0) * _NS_PER_MS)
            random = Random(f"{self._workload.seed}/prompt/{program.program_id}")
            session = _Session(program, random, self._prefix(program))
            self._send(session, max(now_ns, arrival_ns))

    def _prefix(self, program: Program) -> list[int]:
        if program.prefix_id is None:
            return []
        stream = self._prefixes.setdefault(
            program.prefix_id, _Stream(Random(f"{self._workload.seed}/prefix/{program.prefix_id}"))
        )
        return stream.first(program.prefix_tokens)

    def _send(self, session: _Session, at_ns: int) -> None:
        """Appends the turn's tokens to the conversation and schedules the call."""
        turn = session.program.turns[session.turn_index]
        num_new = turn.append_tokens - (session.program.prefix_tokens if session.turn_index == 0 else 0)
        session.history += session.random.choices(_VOCABULARY, k=num_new)
        session.sent_ns = at_ns - self._start_ns
        session.num_prompt_tokens = len(session.history)
        session.token_ns = []
        request_id = session.request_id
        self._sessions[request_id] = session
        seed = zlib.crc32(f"{self._workload.seed}/{request_id}".encode())
        self._driver.at(
            at_ns,
            SubmitRequest(
                request_id,
                tuple(session.history),
                # Greedy and without stop tokens: every output has the length that the workload says.
                SamplingParams(max_tokens=turn.output_tokens, temperature=0.0, seed=seed),
                agent_id=session.program.program_id,
                session_id=session.program.program_id,
            ),
        )

    def _turn_done(self, session: _Session, event: RequestFinished) -> None:
        program, turn = session.program, session.program.turns[session.turn_index]
        error = event.error
        if error is None and len(session.token_ns) < turn.output_tokens:
            why = "the window is full" if event.reason is FinishReason.LENGTH else f"it ended with {event.reason}"
            error = f"{len(session.token_ns)} of {turn.output_tokens} tokens: {why}"
        self._records.append(
            TurnRecord(
                program_id=program.program_id,
                turn_index=session.turn_index,
                role=program.role,
                num_turns=len(program.turns),
                num_prompt_tokens=session.num_prompt_tokens,
                num_cached_tokens=event.stats.num_cached_tokens,
                num_output_tokens=len(session.token_ns),
                sent_ns=session.sent_ns,
                token_ns=tuple(session.token_ns),
                finished_ns=event.at_ns - self._start_ns,
                error=error,
            )
        )
        session.turn_index += 1
        if error is None and session.turn_index < len(program.turns):
            self._send(session, event.at_ns + round(turn.tool_gap_ms * _NS_PER_MS))
        else:
            self._program_done(program, event.at_ns)

    def _program_done(self, program: Program, now_ns: int) -> None:
        for index in self._dependents.get(program.program_id, ()):
            self._num_missing[index] -= 1
            if self._num_missing[index] == 0:
                heapq.heappush(self._ready, index)
        if self._num_free_agents is not None:
            self._num_free_agents += 1
        self._start_ready(now_ns)

    # ---- batches ----

    def _span(self, batch: Batch, output: BatchOutput) -> BatchSpan:
        num_tokens = {WorkClass.COLD_PREFILL: 0, WorkClass.RESUME_PREFILL: 0, WorkClass.DECODE: 0}
        for chunk in batch.chunks:
            num_tokens[chunk.work_class] += chunk.num_tokens
        cold = [chunk.request_id for chunk in batch.chunks if chunk.work_class is WorkClass.COLD_PREFILL]
        return BatchSpan(
            lane=batch.lane,
            partition=batch.partition.label,
            started_ns=output.started_ns - self._start_ns,
            finished_ns=output.finished_ns - self._start_ns,
            num_decodes=BatchShape.of(batch).num_decodes,
            num_cold_tokens=num_tokens[WorkClass.COLD_PREFILL],
            num_resume_tokens=num_tokens[WorkClass.RESUME_PREFILL],
            cold_program_ids=tuple(request_id.rpartition("/")[0] for request_id in cold),
        )
