"""Drives an engine core on a virtual clock: jumps from event to event, as fast as Python goes."""

from __future__ import annotations

import heapq
import itertools

from agentserve.core.batch import BatchOutput
from agentserve.core.clock import VirtualClock
from agentserve.core.engine import EngineCore, StepResult
from agentserve.core.events import Command
from agentserve.core.executor import Executor
from agentserve.errors import EngineError


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
        self._arrivals: list[tuple[int, int, Command]] = []
        self._sequence = itertools.count()

    def at(self, at_ns: int, command: Command) -> None:
        """Schedules a command. Commands of the same time keep their order. ValueError for a time in the past."""
        if at_ns < self.clock.now_ns():
            raise ValueError(f"{at_ns} lies in the past")
        heapq.heappush(self._arrivals, (at_ns, next(self._sequence), command))

    def step(self) -> StepResult | None:
        """Jumps to the next moment at which something happens and makes one step; None when all is done."""
        wakes = [self._executor.next_completion_ns(), self.core.next_deadline_ns()]
        if self._arrivals:
            wakes.append(self._arrivals[0][0])
        known = [wake for wake in wakes if wake is not None]
        if not known:
            if self.core.has_unfinished:
                raise EngineError("requests are unfinished, but nothing will ever wake the engine")
            return None
        now_ns = max(min(known), self.clock.now_ns())
        self.clock.advance_to(now_ns)
        completions = self._executor.poll(now_ns)
        self.last_completions = tuple(completions)
        commands = []
        while self._arrivals and self._arrivals[0][0] <= now_ns:
            commands.append(heapq.heappop(self._arrivals)[2])
        result = self.core.step(now_ns, completions, commands)
        for batch in result.batches:
            self._executor.submit(batch, now_ns)
        return result

    def run(self) -> list[StepResult]:
        """Steps until all is done and returns what each step did."""
        results = []
        while (result := self.step()) is not None:
            results.append(result)
        return results
