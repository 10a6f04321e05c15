"""A heap that does not look for what has changed: its entries become outdated where they are."""

from __future__ import annotations

import heapq
from typing import Generic, Protocol, TypeAlias, TypeVar

_MIN_OUTDATED = 64
"""So many outdated entries are not worth a clean-up."""
_SWEEP = 4
"""Entries that are looked at in each push of a clean-up."""


class Stamped(Protocol):
    """What can be in such a heap."""

    stamp: int
    """Changed by its owner when its place in the heap is not right any more."""


_Key = TypeVar("_Key")
_Item = TypeVar("_Item", bound=Stamped)
_Entry: TypeAlias = tuple[_Key, int, int, _Item]


class LazyHeap(Generic[_Key, _Item]):
    """Items by key, the smallest first, of equal ones the smallest number. An entry is outdated when its item has
    another stamp than it had.

    When more than half of the entries are outdated, the others move to a new heap, a few in each push: with thousands
    of them, doing it in one go takes a millisecond. The end of a heap can be taken off without putting it in order.
    Everything is O(log n) amortized.
    """

    __slots__ = ("_entries", "_old")

    def __init__(self) -> None:
        self._entries: list[_Entry[_Key, _Item]] = []
        self._old: list[_Entry[_Key, _Item]] = []
        """What was not looked at yet in the clean-up under way: a heap, too."""

    def __len__(self) -> int:
        """Outdated entries count."""
        return len(self._entries) + len(self._old)

    def push(self, key: _Key, number: int, item: _Item, num_current: int) -> None:
        """Adds an item. `num_current`: entries that are not outdated."""
        if self._old:
            self._sweep()
        elif len(self._entries) > _MIN_OUTDATED + 2 * num_current:
            self._entries, self._old = [], self._entries
            self._sweep()
        heapq.heappush(self._entries, (key, number, item.stamp, item))

    def first(self) -> _Entry[_Key, _Item] | None:
        """The entry that goes first; None if all are outdated."""
        entries, old = self._entries, self._old
        while entries and entries[0][2] != entries[0][3].stamp:
            heapq.heappop(entries)
        if old:
            while old and old[0][2] != old[0][3].stamp:
                heapq.heappop(old)
            if old and (not entries or old[0][:2] < entries[0][:2]):
                return old[0]
        return entries[0] if entries else None

    def pop(self) -> _Item:
        """Takes out the item that goes first. There must be one."""
        first = self.first()
        assert first is not None, "the heap is empty"
        heapq.heappop(self._old if self._old and self._old[0] is first else self._entries)
        return first[3]

    def current(self) -> list[_Entry[_Key, _Item]]:
        """The entries that are not outdated, in no particular order. For checks."""
        return [entry for entry in (*self._entries, *self._old) if entry[2] == entry[3].stamp]

    def check_invariants(self) -> None:
        """Raises AssertionError if it is no heap."""
        for heap in (self._entries, self._old):
            for index in range(1, len(heap)):
                assert heap[(index - 1) // 2][:3] <= heap[index][:3], "a heap is out of order"

    def _sweep(self) -> None:
        old = self._old
        for _ in range(min(_SWEEP, len(old))):
            entry = old.pop()
            if entry[2] == entry[3].stamp:
                heapq.heappush(self._entries, entry)
