"""Drives an engine core on a virtual clock: jumps from event to event, as fast as Python goes."""

from __future__ import annotations

import heapq
import itertools

from agentserve.core.batch import BatchOutput
from agentserve.core.clock import VirtualClock
from agentserve.core.decode_run import PredictableExecutor
from agentserve.core.engine import EngineCore, StepResult
from agentserve.core.events import Command
from agentserve.core.executor import Executor
from agentserve.errors import EngineError

MIN_RUN = 2
"""A run of fewer decode steps is not worth its preparation."""


def run_decodes(core: EngineCore, executor: PredictableExecutor, before_ns: int | None) -> StepResult | None:
    """Books the decode steps that are certain and end before a moment, in one go; None if they are too few.

    What is in flight behind them is handed to the executor. `before_ns`: when the next command comes, None without one.
    """
    plan = core.decode_plan()
    if plan is None or plan.num_steps < MIN_RUN:
        return None
    deadline_ns = core.next_deadline_ns()
    if before_ns is None or (deadline_ns is not None and deadline_ns < before_ns):
        before_ns = deadline_ns
    started_ns, ends_ns = executor.decode_ends(plan, before_ns)
    if len(ends_ns) < MIN_RUN:
        return None
    result = core.run_decodes(plan, started_ns, ends_ns, executor.decoded_tokens)
    run = result.run
    assert run is not None, "a run was made"
    now_ns = run.ends_ns[-1]
    executor.skip_decodes()
    if run.in_flight is not None:
        executor.submit(run.in_flight, now_ns)
    for batch in result.batches:
        executor.submit(batch, now_ns)
    for transfer in result.transfers:
        executor.submit_transfer(transfer, now_ns)
    return result


class VirtualDriver:
    """Runs commands at given times against an executor whose completions are known beforehand.

    An empty queue is no proof that all is done: when a request is unfinished and nothing will wake the core, `step`
    raises EngineError instead of returning.
    """

    def __init__(self, core: EngineCore, executor: Executor, clock: VirtualClock | None = None) -> None:
        self.core = core
        self.clock = clock or VirtualClock()
        self.last_completions: tuple[BatchOutput, ...] = ()
        """What the last step was given: the batches that had finished by then."""
        self._executor = executor
        self._predictable = executor if isinstance(executor, PredictableExecutor) else None
        self._has_run = False
        """Whether the last step was a run. Then the next one is not: what ended the run comes first."""
        self._arrivals: list[tuple[int, int, Command]] = []
        self._sequence = itertools.count()

    def at(self, at_ns: int, command: Command) -> None:
        """Schedules a command. Commands of the same time keep their order. ValueError for a time in the past."""
        if at_ns < self.clock.now_ns():
            raise ValueError(f"{at_ns} lies in the past")
        heapq.heappush(self._arrivals, (at_ns, next(self._sequence), command))

    def step(self) -> StepResult | None:
        """Jumps to the next moment at which something happens and makes one step; None when all is done."""
        wake_ns = self._executor.next_completion_ns()
        for other_ns in (self.core.next_deadline_ns(), self._arrivals[0][0] if self._arrivals else None):
            if other_ns is not None and (wake_ns is None or other_ns < wake_ns):
                wake_ns = other_ns
        if wake_ns is None:
            if self.core.has_unfinished:
                raise EngineError("requests are unfinished, but nothing will ever wake the engine")
            return None
        now_ns = max(wake_ns, self.clock.now_ns())
        self.clock.advance_to(now_ns)
        completions = self._executor.poll(now_ns)
        self.last_completions = tuple([output for output in completions if isinstance(output, BatchOutput)])
        commands = []
        while self._arrivals and self._arrivals[0][0] <= now_ns:
            commands.append(heapq.heappop(self._arrivals)[2])
        result = self.core.step(now_ns, completions, commands)
        for batch in result.batches:
            self._executor.submit(batch, now_ns)
        for transfer in result.transfers:
            self._executor.submit_transfer(transfer, now_ns)
        return result

    def advance(self) -> StepResult | None:
        """Like `step`, or as many steps in one go as are certain: see `StepResult.run`.

        The same happens at the same times; only an executor that knows beforehand what it will do makes it faster.
        """
        if self._predictable is not None and not self._has_run:
            result = run_decodes(self.core, self._predictable, self._arrivals[0][0] if self._arrivals else None)
            if result is not None and result.run is not None:
                self.clock.advance_to(result.run.ends_ns[-1])
                self.last_completions = ()
                self._has_run = True
                return result
        self._has_run = False
        return self.step()

    def run(self) -> list[StepResult]:
        """Steps until all is done and returns what each step did."""
        results = []
        while (result := self.step()) is not None:
            results.append(result)
        return results
