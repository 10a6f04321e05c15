"""Runs a workload on the virtual clock: agents, tool gaps, dependencies, conversations that grow.

The engine is the daemon's; only the clients are simulated here. A conversation is token ids: what a turn appends is
drawn from the workload's seed, or made from its block ids, what the engine generated becomes part of the next prompt,
and programs of one prefix start with the same tokens. So the prefix cache finds what it would find in the daemon.
"""

from __future__ import annotations

import heapq
import itertools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from agentserve.core.clock import VirtualClock
from agentserve.core.engine import EngineCore, StepResult
from agentserve.core.events import (
    Foresight,
    RequestFinished,
    SetDistances,
    Speculate,
    SubmitRequest,
    TokenGenerated,
)
from agentserve.core.request import FinishReason, SamplingParams
from agentserve.core.stats import EngineStats
from agentserve.runtime.virtual import VirtualDriver
from agentserve.sim.blocks import random_tokens, tokens_of_blocks
from agentserve.sim.cluster import Cluster, InstanceStep
from agentserve.sim.collector import rare_collections
from agentserve.sim.metrics import TurnRecord
from agentserve.sim.programs import Program, Turn, Workload
from agentserve.sim.residency import Residency, ResidencyMeter, occupancy_of
from agentserve.sim.spans import BatchSpan, SpanKeeper, first_spans

_NS_PER_MS = 1e6


@dataclass(frozen=True, slots=True)
class SimulatedRun:
    """What came of a workload."""

    records: tuple[TurnRecord, ...]
    """One for each call that was made, in the order of their ends."""
    batches: tuple[BatchSpan, ...]
    """In the order of their starts."""
    instances: tuple[int, ...]
    """For each record the instance that answered."""
    residency: tuple[Residency, ...]
    """By instance."""
    stats: tuple[EngineStats, ...]
    """Of each instance at the end."""


def simulate(
    workload: Workload,
    driver: VirtualDriver | Cluster,
    *,
    max_batches: int | None = None,
    on_turn: Callable[[], None] = lambda: None,
    fast_forward: bool = True,
) -> SimulatedRun:
    """Runs all programs to their end. The same workload and a driver in the same state give the same run.

    Args:
        workload: what to run.
        driver: a driver or a cluster without work of its own; its clock may stand anywhere, times count from there.
        max_batches: keep so many batches, the first ones; None keeps all.
        on_turn: called after each call that has ended.
        fast_forward: book decode steps that are certain in one go; the run is the same without it, and slower.

    A call that fails ends its program, and programs that depend on it still start: the record has the error. Raises
    EngineError if the engine stops before all is done.
    """
    engines = driver if isinstance(driver, Cluster) else _Alone(driver)
    with rare_collections():
        return _Orchestrator(workload, engines, max_batches, on_turn, fast_forward).run()


class _Alone:
    """A driver as a cluster of one instance."""

    def __init__(self, driver: VirtualDriver) -> None:
        self._driver = driver

    @property
    def clock(self) -> VirtualClock:
        return self._driver.clock

    @property
    def cores(self) -> tuple[EngineCore, ...]:
        return (self._driver.core,)

    def at(self, at_ns: int, command: SubmitRequest | SetDistances) -> None:
        self._driver.at(at_ns, command)

    def tell(self, at_ns: int, command: Speculate, instance: int) -> None:  # noqa: ARG002 - there is only one
        self._driver.at(at_ns, command)

    def step(self) -> Sequence[InstanceStep] | None:
        return self._taken(self._driver.step())

    def advance(self) -> Sequence[InstanceStep] | None:
        return self._taken(self._driver.advance())

    def _taken(self, result: StepResult | None) -> Sequence[InstanceStep] | None:
        if result is None:
            return None
        driver = self._driver
        occupancy = occupancy_of(driver.core.memory)
        return (InstanceStep(0, driver.clock.now_ns(), driver.last_completions, result, occupancy),)


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
            self._tokens += random_tokens(self._random, num_tokens - len(self._tokens))
        return self._tokens[:num_tokens]


class _Orchestrator:
    def __init__(
        self,
        workload: Workload,
        engines: Cluster | _Alone,
        max_batches: int | None,
        on_turn: Callable[[], None],
        fast_forward: bool,
    ) -> None:
        self._workload = workload
        self._engines = engines
        self._advance = engines.advance if fast_forward else engines.step
        self._on_turn = on_turn
        self._start_ns = engines.clock.now_ns()
        self._speculates = tuple(core.config.speculate != "none" for core in engines.cores)
        self._tells_future = any(core.config.needs_foresight for core in engines.cores)
        self._sessions: dict[str, _Session] = {}  # by the id of the request under way
        self._programs = {program.program_id: program for program in workload.programs} if workload.steps else {}
        self._num_missing = [len(program.depends_on) for program in workload.programs]
        self._earliest_ns = [self._start_ns] * len(workload.programs)  # for the gaps behind what they depend on
        self._dependents: dict[str, list[tuple[int, int]]] = {}  # which program, and how long after the end
        for index, program in enumerate(workload.programs):
            gaps_ms = program.dependency_gaps_ms or (0.0,) * len(program.depends_on)
            for other, gap_ms in zip(program.depends_on, gaps_ms, strict=True):
                self._dependents.setdefault(other, []).append((index, round(gap_ms * _NS_PER_MS)))
        self._ready = [index for index, count in enumerate(self._num_missing) if count == 0]  # a heap: sorted
        self._calls: list[tuple[int, int, Program | _Session]] = []  # to be made, a heap by time
        self._sequence = itertools.count()
        self._posted_until_ns = self._start_ns
        self._num_free_agents = workload.num_agents
        self._prefixes: dict[str, _Stream] = {}
        self._records: list[TurnRecord] = []
        self._instances: list[int] = []
        self._spans = tuple(SpanKeeper(index, max_batches) for index in range(len(engines.cores)))
        self._parked: dict[str, _Session] = {}  # between two turns of a world
        self._next_step = 0
        self._max_batches = max_batches
        self._meters = tuple(ResidencyMeter(core.memory) for core in engines.cores)

    def run(self) -> SimulatedRun:
        if self._workload.steps:
            self._num_missing = []
            self._begin_step(self._start_ns)
        else:
            self._start_ready(self._start_ns)
        self._post_calls()
        while (steps := self._advance()) is not None:
            for step in steps:
                self._take(step)
            self._post_calls()
        is_done = not (self._sessions or self._calls or any(self._num_missing))
        assert is_done, "programs are left, but the engine is done"
        end_ns = self._engines.clock.now_ns() - self._start_ns
        return SimulatedRun(
            records=tuple(self._records),
            batches=first_spans(self._spans, self._start_ns, self._max_batches),
            instances=tuple(self._instances),
            residency=tuple(meter.result(end_ns) for meter in self._meters),
            stats=tuple(core.stats() for core in self._engines.cores),
        )

    def _take(self, step: InstanceStep) -> None:
        meter, run = self._meters[step.instance], step.result.run
        self._spans[step.instance].take(step)
        if run is not None:
            times_ns = run.ends_ns
            if self._start_ns:
                times_ns = tuple([end_ns - self._start_ns for end_ns in times_ns])
            for request_id, tokens in zip(run.request_ids(), run.tokens, strict=True):
                session = self._sessions[request_id]
                session.history += tokens
                session.token_ns += times_ns
            meter.sample_run(times_ns[:-1], run.occupancy)
        for event in step.result.events:
            if isinstance(event, TokenGenerated):
                session = self._sessions[event.request_id]
                session.history.append(event.sample.token_id)
                session.token_ns.append(event.at_ns - self._start_ns)
            elif isinstance(event, RequestFinished):
                self._instances.append(step.instance)
                self._turn_done(self._sessions.pop(event.request_id), event, step.instance)
        meter.sample(step.now_ns - self._start_ns, step.occupancy)

    # ---- worlds ----

    def _begin_step(self, now_ns: int) -> None:
        """The next step of the world: its calls, and what the framework says of the steps after it."""
        step = self._workload.steps[self._next_step]
        self._next_step += 1
        for program_id in step.calls:
            session = self._parked.pop(program_id, None)
            self._send(self._started(self._programs[program_id]) if session is None else session, now_ns)
        if step.distances:
            self._engines.at(now_ns, SetDistances(step.distances))

    def _step_done(self, now_ns: int) -> None:
        """The last call of a step has ended."""
        if self._next_step < len(self._workload.steps):
            gap_ms = self._workload.steps[self._next_step - 1].gap_ms
            self._begin_step(now_ns + round(gap_ms * _NS_PER_MS))

    # ---- programs ----

    def _start_ready(self, now_ns: int) -> None:
        """Starts the programs whose dependencies have ended, in their order, while agents are free."""
        while self._ready and self._num_free_agents != 0:
            index = heapq.heappop(self._ready)
            program = self._workload.programs[index]
            if self._num_free_agents is not None:
                self._num_free_agents -= 1
            arrival_ns = self._start_ns + round((program.arrival_ms or 0.0) * _NS_PER_MS)
            self._call_at(max(now_ns, arrival_ns, self._earliest_ns[index]), program)

    def _call_at(self, at_ns: int, item: Program | _Session) -> None:
        """Plans the next call of a session, or the first one of a program."""
        heapq.heappush(self._calls, (at_ns, next(self._sequence), item))

    def _post_calls(self) -> None:
        """Hands the engine the calls up to the next one in the future, so that it cannot jump over any.

        No more than that: the prompts of a whole trace would not fit the memory.
        """
        now_ns = self._engines.clock.now_ns()
        while self._calls and (self._posted_until_ns <= now_ns or self._calls[0][0] <= self._posted_until_ns):
            at_ns, _, item = heapq.heappop(self._calls)
            self._posted_until_ns = max(self._posted_until_ns, at_ns)
            self._send(self._started(item) if isinstance(item, Program) else item, at_ns)

    def _started(self, program: Program) -> _Session:
        random = Random(f"{self._workload.seed}/prompt/{program.program_id}")
        return _Session(program, random, self._prefix(program))

    def _prefix(self, program: Program) -> list[int]:
        if program.prefix_id is None:
            return []
        stream = self._prefixes.setdefault(
            program.prefix_id, _Stream(Random(f"{self._workload.seed}/prefix/{program.prefix_id}"))
        )
        return stream.first(program.prefix_tokens)

    def _send(self, session: _Session, at_ns: int) -> None:
        """Appends the turn's tokens to the conversation and posts the call."""
        program, turn = session.program, session.program.turns[session.turn_index]
        if turn.keep_tokens is not None:
            del session.history[turn.keep_tokens :]
        if turn.block_ids:
            session.history += tokens_of_blocks(turn.block_ids, program.block_tokens, turn.append_tokens)
        else:
            num_new = turn.append_tokens - (program.prefix_tokens if session.turn_index == 0 else 0)
            session.history += random_tokens(session.random, num_new)
        session.sent_ns = at_ns - self._start_ns
        session.num_prompt_tokens = len(session.history)
        session.token_ns = []
        request_id = session.request_id
        self._sessions[request_id] = session
        seed = zlib.crc32(f"{self._workload.seed}/{request_id}".encode())
        self._engines.at(
            at_ns,
            SubmitRequest(
                request_id,
                tuple(session.history),
                # Greedy and without stop tokens: every output has the length that the workload says.
                SamplingParams(max_tokens=turn.output_tokens, temperature=0.0, seed=seed),
                agent_id=turn.agent or program.program_id,
                session_id=program.program_id if turn.agent is None else f"{program.program_id}/{turn.agent}",
                program_id=program.task or (None if turn.agent is None else program.program_id),
                adapter=program.adapter,
                tool_name=turn.tool_name,
                is_last_turn=session.turn_index + 1 == len(program.turns) if program.says_end else None,
                foresight=self._foresight(session) if self._tells_future else None,
            ),
        )

    def _foresight(self, session: _Session) -> Foresight:
        """What an oracle is told of a session that is about to make its next call."""
        turns = session.program.turns[session.turn_index :]
        return Foresight(
            gap_ns=round(turns[0].tool_gap_ms * _NS_PER_MS) if len(turns) > 1 else None,
            next_not_before_ns=self._arrival_ns(turns[1]) if len(turns) > 1 else 0,
            num_prompt_tokens=sum(turn.append_tokens for turn in turns),
            num_output_tokens=sum(turn.output_tokens for turn in turns),
        )

    def _arrival_ns(self, turn: Turn) -> int:
        return self._start_ns + round((turn.arrival_ms or 0.0) * _NS_PER_MS)

    def _turn_done(self, session: _Session, event: RequestFinished, instance: int) -> None:
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
        self._on_turn()
        session.turn_index += 1
        if self._workload.steps:
            if session.turn_index < len(program.turns):
                self._parked[program.program_id] = session
            if not self._sessions:
                self._step_done(event.at_ns)
        elif error is None and session.turn_index < len(program.turns):
            if self._speculates[instance]:
                # What a server knows as well: the conversation up to the result of the tool.
                self._engines.tell(event.at_ns, Speculate(event.request_id, tuple(session.history)), instance)
            arrival_ns = self._arrival_ns(program.turns[session.turn_index])
            self._call_at(max(event.at_ns + round(turn.tool_gap_ms * _NS_PER_MS), arrival_ns), session)
        else:
            self._program_done(program, event.at_ns)

    def _program_done(self, program: Program, now_ns: int) -> None:
        for index, gap_ns in self._dependents.get(program.program_id, ()):
            self._earliest_ns[index] = max(self._earliest_ns[index], now_ns + gap_ns)
            self._num_missing[index] -= 1
            if self._num_missing[index] == 0:
                heapq.heappush(self._ready, index)
        if self._num_free_agents is not None:
            self._num_free_agents += 1
        self._start_ready(now_ns)
