"""The shortcut to the paths of former prompts changes nothing but the time that a look takes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentserve.core.memory import trails
from agentserve.core.memory.manager import AllocationOutcome, MemoryManager
from agentserve.core.memory.trails import MAX_TRAILS, Trails

SIZE = 2


def turn(memory: MemoryManager, name: str, prompt: list[int], output: list[int]) -> int | None:
    """A call from its admission to its end; its cached tokens, or None if there was no room."""
    allocation = memory.allocate(name, prompt)
    if allocation.outcome is not AllocationOutcome.ALLOCATED:
        return None
    tokens = [*prompt, *output]
    while not memory.extend(name, len(tokens)):
        tokens.pop()
    memory.commit(name, tokens, len(tokens))
    memory.free(name)
    memory.check_invariants()
    return allocation.num_cached_tokens


def contents(memory: MemoryManager) -> list[tuple[object, ...]]:
    return [(node.key, node.block_id, node.last_access, node.num_refs) for node in memory._tree.nodes()]


OPERATIONS = st.lists(
    st.tuples(
        st.integers(0, 3),  # whose conversation
        st.lists(st.integers(0, 2), min_size=1, max_size=9),  # what the turn appends
        st.lists(st.integers(0, 2), max_size=6),  # what is generated
        st.sampled_from([None, None, None, 3]),  # tokens that the conversation keeps, if it is cut
    ),
    max_size=40,
)


@pytest.mark.parametrize("min_blocks", [1, 3])
@settings(max_examples=80)
@given(operations=OPERATIONS, num_blocks=st.sampled_from([12, 24, 200]))
def test_a_memory_with_trails_is_one_without(min_blocks: int, operations: list[Any], num_blocks: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trails, "_MIN_BLOCKS", min_blocks)
        fast, plain = MemoryManager(num_blocks, SIZE), MemoryManager(num_blocks, SIZE)
        plain._trails.add = lambda *_: None  # type: ignore[method-assign]
        histories: list[list[int]] = [[who % 2] * 4 for who in range(4)]
        for index, (who, appended, generated, kept) in enumerate(operations):
            history = histories[who]
            if kept is not None:
                del history[kept:]
            history += appended
            del history[2 * num_blocks :]
            results = {turn(memory, f"r{index}", list(history), generated) for memory in (fast, plain)}
            assert len(results) == 1
            assert contents(fast) == contents(plain)
            history += generated


def test_a_conversation_leaves_one_trail() -> None:
    memory = MemoryManager(100, SIZE)
    history = list(range(40))
    for index in range(5):
        assert turn(memory, f"r{index}", history, [7, 8]) == (0 if index == 0 else len(history) - 2)
        history = [*history, 7, 8, 50 + index, 60 + index]
    # The last turn had 40 + 4 * 4 tokens, and 2 were generated.
    assert [len(trail.token_ids) for trail in memory._trails._trails] == [58]


def test_what_was_evicted_is_cut_off() -> None:
    memory = MemoryManager(30, SIZE)
    turn(memory, "a", list(range(40)), [])  # 20 blocks
    turn(memory, "b", list(range(100, 130)), [])  # 15 blocks: the last 5 of a's go
    found = memory._trails.find([*range(40), 1], None, 20)
    assert found is not None and len(found.path) == 15
    assert memory.match_prefix([*range(40), 1]).num_tokens == 30


def test_the_trail_that_was_not_used_longest_is_forgotten() -> None:
    memory = MemoryManager(1000, SIZE)
    for index in range(MAX_TRAILS + 2):
        turn(memory, f"r{index}", list(range(100 * index, 100 * index + 20)), [])
    assert memory._trails.find(range(20), None, 10) is None
    assert memory._trails.find(range(200, 220), None, 10) is not None


def test_a_trail_is_for_its_salt_and_for_long_prompts_only() -> None:
    memory = MemoryManager(100, SIZE)
    turn(memory, "a", list(range(20)), [])
    assert memory._trails.find(range(20), None, 10) is not None
    assert memory._trails.find(range(20), "other", 10) is None
    assert memory._trails.find(range(20), None, 9) is None  # the trail has 10 blocks
    assert Trails(SIZE).find(range(20), None, 10) is None
