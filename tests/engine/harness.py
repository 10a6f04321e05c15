"""Drives an engine core and a real executor to the end, in the test's own thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from agentserve.core.batch import Batch
from agentserve.core.engine import EngineCore
from agentserve.core.events import Command, RequestFinished, TokenGenerated
from agentserve.core.executor import Executor
from agentserve.core.request import FinishReason


class Run:
    """What came out of a run."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.logprobs: dict[str, list[float | None]] = {}
        self.ends: dict[str, RequestFinished] = {}
        self.batches: list[Batch] = []


def drive(core: EngineCore, executor: Executor, requests: Sequence[Command], *, apart: bool = False) -> Run:
    """Submits the requests, all at once or each after the end of the one before, and runs until all have ended."""
    run = Run()
    woken = threading.Event()
    executor.on_completion(woken.set)
    for group in [[request] for request in requests] if apart else [list(requests)]:
        commands = group
        while commands or core.has_unfinished or core.is_speculating:
            result = core.step(time.monotonic_ns(), executor.poll(time.monotonic_ns()), commands)
            commands = []
            core.check_invariants()
            for event in result.events:
                if isinstance(event, TokenGenerated):
                    run.tokens.setdefault(event.request_id, []).append(event.sample.token_id)
                    run.logprobs.setdefault(event.request_id, []).append(event.sample.logprob)
                elif isinstance(event, RequestFinished):
                    assert event.reason is not FinishReason.ERROR, event.error
                    run.ends[event.request_id] = event
            for batch in result.batches:
                run.batches.append(batch)
                executor.submit(batch, time.monotonic_ns())
            for transfer in result.transfers:
                executor.submit_transfer(transfer, time.monotonic_ns())
            if core.has_unfinished or core.is_speculating:
                assert woken.wait(60), "the executor is silent"
                woken.clear()
    return run
