"""BlockPool: exact ids, because long runs and determinism are what it is for."""

from __future__ import annotations

import pytest

from agentserve.core.memory.block import GROUP_BLOCKS, BlockPool


def test_prompts_are_packed_from_below() -> None:
    pool = BlockPool(32)
    assert pool.take(3) == [0, 1, 2]
    assert pool.take(2) == [3, 4]
    assert pool.num_free == 27  # 32 - 3 - 2
    pool.put(1)
    assert pool.take(2) == [1, 5]
    assert pool.take(0) == []
    pool.check_invariants()


def test_a_sequence_grows_into_the_block_behind_its_last() -> None:
    pool = BlockPool(32)
    pool.take(4)
    assert [pool.take_after(3), pool.take_after(4), pool.take_after(5)] == [4, 5, 6]
    assert pool.take(2) == [7, 8]  # the stale entries of 4, 5 and 6 are skipped
    pool.check_invariants()


def test_sequences_that_grow_side_by_side_get_runs() -> None:
    pool = BlockPool(64)
    pool.take(3)  # a: 0, b: 1, c: 2
    last = {"a": 0, "b": 1, "c": 2}
    grown: dict[str, list[int]] = {"a": [], "b": [], "c": []}
    for _ in range(GROUP_BLOCKS):
        for name in "abc":
            last[name] = pool.take_after(last[name])
            grown[name].append(last[name])
    # 64 blocks are groups 0..7. a and b cannot grow in place and get groups 7 and 6; c goes on behind its block.
    assert grown == {"a": list(range(56, 64)), "b": list(range(48, 56)), "c": list(range(3, 11))}
    pool.check_invariants()


def test_a_group_is_used_again_once_it_is_empty() -> None:
    pool = BlockPool(16)
    pool.take(2)
    assert pool.take_after(0) == 8  # group 1 is the only empty one
    assert pool.take_after(0) == 2  # no empty group is left: the lowest free id
    pool.put(8)
    assert pool.take_after(0) == 8
    pool.check_invariants()


def test_a_group_that_is_not_empty_any_more_is_passed_over() -> None:
    pool = BlockPool(24)
    assert pool.take_after(22) == 23  # takes a block of group 2, which stays listed
    assert pool.take_after(23) == 8  # 23 was the last id and group 2 is not empty: group 1
    pool.check_invariants()


def test_the_short_last_group_is_no_group() -> None:
    pool = BlockPool(11)
    assert pool.take_after(10) == 0  # group 0; blocks 8, 9 and 10 are none
    assert sorted(pool.take(10)) == list(range(1, 11))
    assert pool.num_free == 0
    pool.put(10)
    assert pool.take_after(4) == 10
    pool.check_invariants()


def test_bugs_of_the_caller_are_caught() -> None:
    pool = BlockPool(2)
    with pytest.raises(AssertionError, match="free already"):
        pool.put(0)
    with pytest.raises(AssertionError, match="3 blocks wanted, 2 free"):
        pool.take(3)
    pool.take(2)
    with pytest.raises(AssertionError, match="no block is free"):
        pool.take_after(0)
