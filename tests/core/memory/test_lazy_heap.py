"""A heap with outdated entries gives what is current, in order, and does not grow."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from agentserve.core.memory.lazy_heap import LazyHeap


@dataclass(eq=False)
class Item:
    number: int
    key: int
    stamp: int = 0
    is_listed: bool = False


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9), st.booleans()), min_size=250, max_size=400))
def test_it_is_like_sorting_what_is_current(plan: list[tuple[int, int, bool]]) -> None:
    """A plan: which item gets which key, and whether the first one is taken out after that."""
    heap: LazyHeap[int, Item] = LazyHeap()
    items = [Item(number, 0) for number in range(6)]
    largest = 0
    for number, key, takes in plan:
        item = items[number]
        item.stamp += 1
        item.key = key
        heap.push(key, number, item, sum(other.is_listed and other is not item for other in items))
        item.is_listed = True
        heap.check_invariants()
        listed = [other for other in items if other.is_listed]
        assert sorted(entry[3].number for entry in heap.current()) == [other.number for other in listed]
        expected = min(listed, key=lambda other: (other.key, other.number))
        first = heap.first()
        assert first is not None and first[3] is expected
        if takes:
            assert heap.pop() is expected
            expected.is_listed = False
        largest = max(largest, len(heap))
    # 64 + 2 * 6 entries and a push begin a clean-up, during which the new heap gets 6 current ones at most.
    assert largest <= 64 + 2 * 6 + 1 + 6


def test_an_empty_heap_has_no_first_entry() -> None:
    heap: LazyHeap[int, Item] = LazyHeap()
    assert heap.first() is None
    item = Item(0, 0)
    heap.push(0, 0, item, 0)
    item.stamp += 1
    assert heap.first() is None and not heap.current()
