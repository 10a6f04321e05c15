"""Requests in the order in which they are served."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from typing import TypeAlias

from agentserve.core.request import Request

Rank: TypeAlias = tuple[int, int, tuple[float, ...], int]


def rank(request: Request) -> Rank:
    """Smaller goes first: priority, then who has used up fewer time slices, what the order policy says, and arrival.

    A request that is preempted for lack of memory has its old rank, so it is next again.
    """
    return (request.priority, request.num_slices, request.order_key, request.sequence)


class RankedQueue:
    """Requests by rank. Iteration goes from the first to the last; do not change it while iterating."""

    def __init__(self) -> None:
        self._requests: list[Request] = []

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def __reversed__(self) -> Iterator[Request]:
        return reversed(self._requests)

    def add(self, request: Request) -> bool:
        """Puts a request at its place; whether one of its priority that arrived before it comes after it now."""
        index = bisect.bisect_right(self._requests, rank(request), key=rank)
        self._requests.insert(index, request)
        if index + 1 == len(self._requests):
            return False
        behind = self._requests[index + 1]
        return behind.priority == request.priority and behind.sequence < request.sequence

    def sort(self) -> None:
        """To be called when ranks have changed."""
        self._requests.sort(key=rank)

    def remove(self, request: Request) -> None:
        """Raises ValueError if it is not in the queue."""
        index = bisect.bisect_left(self._requests, rank(request), key=rank)
        if index == len(self._requests) or self._requests[index] is not request:
            raise ValueError(f"request {request.request_id} is not queued")
        del self._requests[index]
