"""Runs a workload against one endpoint: agents in a closed loop, or programs at their arrival times."""

from __future__ import annotations

import asyncio
import gc
from dataclasses import dataclass, field

from agentserve.sim.metrics import TurnRecord
from agentserve.sim.programs import Program, Workload
from bench.load.client import Call, ChatClient
from bench.load.errors import EndpointError, EndpointGoneError
from bench.load.prompts import Calibration, Conversation, WordStream

_LAG_PERIOD_S = 0.05
_WARM_UP_TOKENS, _WARM_UP_OUTPUT_TOKENS, _NUM_WARM_UP_STREAMS = 512, 12, 3


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a workload is run."""

    prompt_seed: str
    """Decides the words of all prompts. Runs that must not find each other's prefixes in a cache need other ones."""
    cut_after_s: float | None = 1.0
    """A victim's stream is cut this long after everybody else is done: nothing disturbs it any more, so that the rest
    of it would only take time. None lets it run to its end."""


@dataclass(slots=True)
class LoadRun:
    """What came of a workload. Times of the records count from `started_ns` of the client's clock."""

    records: list[TurnRecord] = field(default_factory=list)
    """In the order of their ends."""
    started_ns: int = 0
    duration_ns: int = 0
    aborted: str | None = None
    """Why the run ended early; the records are those of the calls until then."""
    client_lag_ns: list[int] = field(default_factory=list)
    """How late the client itself woke up, sampled 20 times a second: its share in what it measures."""
    work_classes: dict[str, int] = field(default_factory=dict)
    """Calls by the class that the server gave them, where it says."""
    num_inexact: int = 0
    """Calls whose server did not say how many tokens each chunk holds."""


async def run_workload(
    workload: Workload, client: ChatClient, calibration: Calibration, options: RunOptions
) -> LoadRun:
    """Runs all programs. A call that fails ends its program, and programs that depend on it still start.

    A server that is gone ends the run; then `aborted` says so.
    """
    runner = _Runner(workload, client, calibration, options)
    gc.collect()
    gc.freeze()  # no collection over all that is loaded while tokens are stamped
    try:
        return await runner.run()
    finally:
        gc.unfreeze()


async def warm_up(client: ChatClient, calibration: Calibration, prompt_seed: str) -> None:
    """A prompt of some length, then a few streams at once: so that no measured call is the first of its kind.

    Raises EndpointError if a call fails, EndpointGoneError if nobody listens.
    """
    words = WordStream(f"{prompt_seed}/warm-up")

    async def one(num_tokens: int) -> None:
        call = Call("warm-up")
        text = " ".join(words.take(calibration.num_words(num_tokens)))
        messages = [{"role": "system", "content": text}, {"role": "user", "content": words.take(1)[0]}]
        await client.chat(call, messages, max_tokens=_WARM_UP_OUTPUT_TOKENS)
        if call.error is not None:
            raise EndpointError(f"a warm-up call to {client.base_url} failed: {call.error}")

    await one(_WARM_UP_TOKENS)
    await asyncio.gather(*(one(_WARM_UP_TOKENS // 8) for _ in range(_NUM_WARM_UP_STREAMS)))


class _Runner:
    def __init__(self, workload: Workload, client: ChatClient, calibration: Calibration, options: RunOptions) -> None:
        self._workload = workload
        self._client = client
        self._calibration = calibration
        self._options = options
        self._result = LoadRun()
        self._waiting = list(workload.programs)
        self._left = {program.program_id for program in workload.programs}
        self._changed = asyncio.Condition()
        self._calls: dict[str, asyncio.Task[None]] = {}  # of the victims that are streaming, by program
        self._victims = {program.program_id for program in workload.programs if program.role == "victim"}

    async def run(self) -> LoadRun:
        result = self._result
        result.started_ns = self._client.clock_ns()
        lag = asyncio.create_task(self._measure_lag())
        try:
            async with asyncio.TaskGroup() as tasks:
                if self._workload.num_agents is None:
                    for program in self._workload.programs:
                        tasks.create_task(self._run_when_ready(program))
                else:
                    for _ in range(self._workload.num_agents):
                        tasks.create_task(self._agent())
                if self._options.cut_after_s is not None and set() < self._victims < self._left:
                    tasks.create_task(self._cut_victims(self._options.cut_after_s))
        except* EndpointGoneError as group:
            result.aborted = str(group.exceptions[0])
        finally:
            lag.cancel()
        result.duration_ns = self._client.clock_ns() - result.started_ns
        return result

    # ---- who runs when ----

    async def _agent(self) -> None:
        """Takes the next program whose dependencies have ended, until none is left."""
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: not self._waiting or self._next_ready() is not None)
                program = self._next_ready()
                if program is None:
                    return
                self._waiting.remove(program)
            await self._run(program)

    def _next_ready(self) -> Program | None:
        return next((program for program in self._waiting if self._is_ready(program)), None)

    def _is_ready(self, program: Program) -> bool:
        return self._left.isdisjoint(program.depends_on)

    async def _run_when_ready(self, program: Program) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._is_ready(program))
        await self._run(program)

    async def _cut_victims(self, after_s: float) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._left <= self._victims)
            try:
                async with asyncio.timeout(after_s):
                    await self._changed.wait_for(lambda: not self._left)
            except TimeoutError:
                for task in self._calls.values():
                    task.cancel()

    async def _measure_lag(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _LAG_PERIOD_S
            await asyncio.sleep(_LAG_PERIOD_S)
            self._result.client_lag_ns.append(max(0, round((loop.time() - due) * 1e9)))

    # ---- one program ----

    async def _run(self, program: Program) -> None:
        if program.arrival_ms is not None:
            await self._sleep_until(self._result.started_ns + round(program.arrival_ms * 1e6))
        conversation = Conversation(program, self._calibration, self._options.prompt_seed)
        session_id = f"{self._options.prompt_seed}/{program.program_id}"
        for index, turn in enumerate(program.turns):
            call = Call(session_id)
            messages = conversation.begin_turn(index)
            sending = asyncio.create_task(
                self._client.chat(call, messages, max_tokens=turn.output_tokens, seed=self._workload.seed)
            )
            if program.role == "victim":
                self._calls[program.program_id] = sending
            was_cut = await self._wait(sending)
            self._calls.pop(program.program_id, None)
            self._record(program, index, call)
            if call.error is not None or was_cut:
                break
            conversation.end_turn(call.text)
            if turn.tool_gap_ms and index + 1 < len(program.turns):
                await self._sleep_until(call.finished_ns + round(turn.tool_gap_ms * 1e6))
        async with self._changed:
            self._left.discard(program.program_id)
            self._changed.notify_all()

    async def _wait(self, sending: asyncio.Task[None]) -> bool:
        """Waits for a call; whether it was cut. If the run itself is cancelled, so is the call."""
        try:
            await asyncio.wait([sending])
        except asyncio.CancelledError:
            sending.cancel()
            raise
        if sending.cancelled():
            return True
        sending.result()
        return False

    async def _sleep_until(self, at_ns: int) -> None:
        await asyncio.sleep(max(0, at_ns - self._client.clock_ns()) / 1e9)

    def _record(self, program: Program, index: int, call: Call) -> None:
        result = self._result
        if call.error is None and call.finish_reason == "stop":
            call.error = f"it stopped after {call.num_output_tokens} of {program.turns[index].output_tokens} tokens"
        if call.work_class is not None:
            result.work_classes[call.work_class] = result.work_classes.get(call.work_class, 0) + 1
        result.num_inexact += not call.counts_are_exact
        start_ns = result.started_ns
        result.records.append(
            TurnRecord(
                program_id=program.program_id,
                turn_index=index,
                role=program.role,
                num_turns=len(program.turns),
                num_prompt_tokens=call.num_prompt_tokens,
                num_cached_tokens=call.num_cached_tokens,
                num_output_tokens=call.num_output_tokens,
                sent_ns=call.sent_ns - start_ns,
                token_ns=tuple(at_ns - start_ns for at_ns in call.token_ns),
                finished_ns=call.finished_ns - start_ns,
                error=call.error,
            )
        )
