"""A lane: a thread that runs the batches it is given, one after the other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

from agentserve.core.batch import Batch, Lane


class LaneThread:
    """The inbox and the thread of one lane."""

    def __init__(self, lane: Lane, run: Callable[[Batch], None]) -> None:
        """`run` is called on the thread of the lane, once for each batch and in their order; it must not raise."""
        self._run = run
        self._inbox: SimpleQueue[Batch | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._main, name=f"agentserve-{lane.value}-lane", daemon=True)
        self._thread.start()

    def put(self, batch: Batch) -> None:
        """Hands over a batch; returns at once."""
        self._inbox.put(batch)

    def close(self) -> None:
        """Runs what is in the inbox, then ends the thread."""
        self._inbox.put(None)
        self._thread.join()

    def _main(self) -> None:
        while (batch := self._inbox.get()) is not None:
            self._run(batch)
