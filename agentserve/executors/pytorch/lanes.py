"""A lane: a thread that launches the batches it is given, and one that waits for them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, TypeVar

from agentserve.core.batch import Batch, Lane

Flight = TypeVar("Flight")


class LaneThread(Generic[Flight]):
    """The inbox and the threads of one lane.

    Where batches follow each other closely (`lookahead` above 1) a second thread waits for what the first launched: the
    next batch comes while the one before it is still computed, and must be launched at once. Else one thread does both,
    which saves the way from one to the other.
    """

    def __init__(
        self, lane: Lane, launch: Callable[[Batch], Flight], finish: Callable[[Flight], None], *, lookahead: int
    ) -> None:
        """Both functions are called once for each batch, in the order of the batches; they must not raise.

        `launch` may return before the batch is computed; `finish` waits for it.
        """
        self._launch = launch
        self._finish = finish
        self._inbox: SimpleQueue[Batch | None] = SimpleQueue()
        self._launched: SimpleQueue[Flight | None] = SimpleQueue()
        self._threads = [
            threading.Thread(
                target=self._launch_and_finish if lookahead == 1 else self._launch_only,
                name=f"agentserve-{lane.value}-lane",
                daemon=True,
            )
        ]
        if lookahead > 1:
            name = f"agentserve-{lane.value}-fences"
            self._threads.append(threading.Thread(target=self._finish_only, name=name, daemon=True))
        for thread in self._threads:
            thread.start()

    def put(self, batch: Batch) -> None:
        """Hands over a batch; returns at once."""
        self._inbox.put(batch)

    def close(self) -> None:
        """Runs what is in the inbox, then ends the threads."""
        self._inbox.put(None)
        for thread in self._threads:
            thread.join()

    def _launch_and_finish(self) -> None:
        while (batch := self._inbox.get()) is not None:
            self._finish(self._launch(batch))

    def _launch_only(self) -> None:
        while (batch := self._inbox.get()) is not None:
            self._launched.put(self._launch(batch))
        self._launched.put(None)

    def _finish_only(self) -> None:
        while (flight := self._launched.get()) is not None:
            self._finish(flight)
            # What a batch holds must not live until the next one comes.
            del flight
