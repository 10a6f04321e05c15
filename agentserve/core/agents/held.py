"""Calls that an admission policy holds back: they are in no queue of the scheduler, so they cost nothing per step."""

from __future__ import annotations

from collections.abc import Iterator

from agentserve.core.queues import RankedQueue
from agentserve.core.request import Request


class HeldCalls:
    """Held calls in the order in which they would be served, and those that may go on now."""

    def __init__(self) -> None:
        self._queue = RankedQueue()
        self._request_ids: set[str] = set()
        self._released: list[Request] = []

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._queue)

    def __contains__(self, request: Request) -> bool:
        return request.request_id in self._request_ids

    def hold(self, request: Request) -> None:
        self._request_ids.add(request.request_id)
        self._queue.add(request)

    def reprioritize(self, request: Request, key: tuple[float, ...]) -> None:
        """Gives a held call another place."""
        self._queue.remove(request)
        request.order_key = key
        self._queue.add(request)

    def forget_order(self) -> None:
        """All are in the order of their arrival again."""
        for request in self._queue:
            request.order_key = ()
        self._queue.sort()

    def release(self, request: Request) -> None:
        """Lets a held call go on."""
        self.drop(request)
        self._released.append(request)

    def release_all(self) -> None:
        for request in list(self._queue):
            self.release(request)

    def drop(self, request: Request) -> None:
        """A held call has ended."""
        self._request_ids.remove(request.request_id)
        self._queue.remove(request)

    def take_released(self) -> list[Request]:
        """Calls to be queued now."""
        if not self._released:
            return []
        released, self._released = self._released, []
        return released
