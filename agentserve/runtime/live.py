"""Drives an engine core on the real clock, in a thread of its own."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

from agentserve.core.clock import Clock
from agentserve.core.engine import EngineCore, StepResult
from agentserve.core.events import Command, EngineEvent, FlushTiers, PolicyFailed
from agentserve.core.executor import Executor, Report
from agentserve.core.stats import EngineStats
from agentserve.core.transfers import TierContents
from agentserve.errors import EngineError
from agentserve.runtime.recording import Recorder

logger = logging.getLogger(__name__)
_T = TypeVar("_T")


class MonotonicClock:
    """The machine's monotonic clock."""

    def now_ns(self) -> int:
        return time.monotonic_ns()


class LiveDriver:
    """The engine thread: waits for commands and completions, steps the core, hands batches to the executor.

    `post`, `stats` and `stop` may be called from any thread. `on_events` and `on_failure` are called on the engine
    thread and must return at once.
    """

    def __init__(
        self,
        core: EngineCore,
        executor: Executor,
        clock: Clock,
        *,
        on_events: Callable[[Sequence[EngineEvent]], None],
        on_failure: Callable[[str], None],
        tier_contents: Sequence[TierContents] = (),
        recorder: Recorder | None = None,
        flush_timeout_s: float = 0.0,
    ) -> None:
        """`tier_contents`: what the tiers of the executor hold already; the core learns it in the first step.
        `flush_timeout_s`: for how long `stop` may write what is cached to the tier that outlives the engine."""
        self._core = core
        self._executor = executor
        self._clock = clock
        self._on_events = on_events
        self._on_failure = on_failure
        self._recorder = recorder
        self._commands: deque[Command] = deque()
        self._questions: deque[tuple[Callable[[], None], Callable[[], None]]] = deque()
        """Each with how to answer it and how to refuse that."""
        self._changed = threading.Condition()
        self._tier_contents = tuple(tier_contents)
        self._woken = bool(tier_contents)
        self._flush_timeout_s = flush_timeout_s
        self._flushing = False
        self._stopping = False
        self._failure: str | None = None
        self._stats = core.stats()
        self._thread = threading.Thread(target=self._run, name="agentserve-engine", daemon=True)
        executor.on_completion(self._wake)

    def start(self) -> None:
        self._thread.start()

    @property
    def failure(self) -> str | None:
        """Why the engine died, or None while it is well."""
        return self._failure

    def post(self, command: Command) -> None:
        """Hands a command to the engine; returns at once. Raises EngineError when the engine is down."""
        with self._changed:
            if self._flushing or self._stopping or self._failure is not None:
                raise EngineError(self._failure or "the engine is shutting down")
            self._commands.append(command)
            self._woken = True
            self._changed.notify()

    def ask(self, question: Callable[[EngineCore, int], _T]) -> Future[_T]:
        """Has a question answered on the engine thread, which has no time for anything else meanwhile.

        `question` gets the core, which it must not change, and the time in nanoseconds; what it raises, the future
        raises. That is EngineError if the engine ends first. Raises EngineError when the engine is down.
        """
        future: Future[_T] = Future()

        def answer() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(question(self._core, self._clock.now_ns()))
            except Exception as error:  # noqa: BLE001  # it is for whoever asked
                future.set_exception(error)

        def refuse() -> None:
            if future.set_running_or_notify_cancel():
                future.set_exception(EngineError(self._failure or "the engine is shutting down"))

        with self._changed:
            if self._stopping or self._failure is not None:
                raise EngineError(self._failure or "the engine is shutting down")
            self._questions.append((answer, refuse))
            self._woken = True
            self._changed.notify_all()
        return future

    def stats(self) -> EngineStats:
        """The counters after the latest step."""
        return self._stats

    def stop(self) -> None:
        """Flushes the tiers, stops the thread, then closes the executor.

        Requests that still run are abandoned: end them first.
        """
        with self._changed:
            if self._flush_timeout_s and self._thread.is_alive():
                self._flush()
            self._stopping = True
            self._woken = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()
        self._refuse_questions()
        self._executor.close()
        if self._recorder is not None:
            self._recorder.close()

    def _flush(self) -> None:
        """Has what is cached written to the tier that outlives the engine, and waits for that while time is left."""
        self._flushing = True
        self._commands.append(FlushTiers())
        self._woken = True
        self._changed.notify()
        if not self._changed.wait_for(lambda: not self._flushing or self._failure, self._flush_timeout_s):
            logger.warning("not all of the KV cache was written in %g s", self._flush_timeout_s)

    def _wake(self) -> None:
        with self._changed:
            self._woken = True
            self._changed.notify_all()  # during a flush the engine thread is not the only one that waits

    def _run(self) -> None:
        try:
            while self._wait():
                self._step()
        except Exception as error:
            logger.exception("the engine failed")
            message = f"the engine failed: {type(error).__name__}: {error}"
            with self._changed:
                self._failure = message
                self._changed.notify_all()
            self._on_failure(message)
        self._refuse_questions()

    def _refuse_questions(self) -> None:
        """Nobody is left who could answer."""
        while self._questions:
            self._questions.popleft()[1]()

    def _wait(self) -> bool:
        """Blocks until there is something to do; False when the driver was stopped."""
        with self._changed:
            while not self._stopping:
                due_ns = self._due_ns()
                now_ns = self._clock.now_ns()
                if self._woken or (due_ns is not None and due_ns <= now_ns):
                    break
                self._changed.wait(None if due_ns is None else (due_ns - now_ns) / 1e9)
            self._woken = False
            return not self._stopping

    def _due_ns(self) -> int | None:
        dues = (self._executor.next_completion_ns(), self._core.next_deadline_ns())
        return min((due for due in dues if due is not None), default=None)

    def _step(self) -> None:
        with self._changed:
            commands = list(self._commands)
            self._commands.clear()
        while self._questions:
            self._questions.popleft()[0]()
        now_ns = self._clock.now_ns()
        completions: Sequence[Report] = self._executor.poll(now_ns)
        if self._tier_contents:
            completions, self._tier_contents = (*self._tier_contents, *completions), ()
        if not completions and not commands and not self._timer_due(now_ns):
            return
        result = self._core.step(now_ns, completions, commands)
        for batch in result.batches:
            self._executor.submit(batch, self._clock.now_ns())
        for transfer in result.transfers:
            self._executor.submit_transfer(transfer, self._clock.now_ns())
        self._stats = self._core.stats()
        if result.events:
            for event in result.events:
                if isinstance(event, PolicyFailed):
                    logger.error("the policy %s failed, the built-in order takes over: %s", event.policy, event.error)
            self._on_events(result.events)
        self._record(now_ns, completions, commands, result)
        if self._flushing and not self._core.is_copying:
            self._flushed()

    def _flushed(self) -> None:
        """Nothing is being copied: the flush is over unless it has not begun yet."""
        with self._changed:
            self._flushing = bool(self._commands)
            self._changed.notify_all()

    def _timer_due(self, now_ns: int) -> bool:
        deadline_ns = self._core.next_deadline_ns()
        return deadline_ns is not None and deadline_ns <= now_ns

    def _record(
        self,
        now_ns: int,
        completions: Sequence[Report],
        commands: Sequence[Command],
        result: StepResult,
    ) -> None:
        """Last in a step: batches are running by now, so writing costs no device time."""
        if self._recorder is None:
            return
        try:
            self._recorder.write(now_ns, completions, commands, result)
        except OSError as error:
            # A full disk must not end anybody's request. The recording is cut off here and says so when it is read.
            logger.error("recording stopped: %s", error)
            self._recorder = None
