"""Groups whose keys change, against a sorted list."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from agentserve.core.memory.eviction import EvictionGroup, SessionBlocks
from agentserve.core.memory.manager import MemoryManager
from agentserve.core.memory.radix import RadixNode, RadixTree, lru_key

NUM_GROUPS = 4


def leaf(tree: RadixTree, number: int, group: EvictionGroup) -> RadixNode:
    node = tree.insert(None, None, (number,), number, None)
    node.group = group
    tree.touch([node])
    tree.release(node)
    return node


@settings(max_examples=200)
@given(st.lists(st.tuples(st.sampled_from("alruue"), st.integers(0, NUM_GROUPS - 1), st.integers(0, 5)), max_size=120))
def test_victims_are_those_of_a_sorted_model(operations: list[tuple[str, int, int]]) -> None:
    tree = RadixTree(1)
    tree.order.compare_with_lru()
    groups = [tree.order.new_group((1, 0)) for _ in range(NUM_GROUPS)]
    nodes: list[RadixNode] = []
    for count, (operation, index, key) in enumerate(operations):
        group = groups[index]
        if operation == "a":
            nodes.append(leaf(tree, count, group))
        elif operation in "rl":
            tree.order.rekey(group, (1, key), is_pinned=operation == "l")
        elif nodes and operation == "u":
            node = nodes[key % len(nodes)]
            tree.acquire(node)
            node.group = group
            tree.touch([node])
            tree.release(node)
        elif nodes:
            expected = min(nodes, key=lambda n: (n.group.key, n.group.sequence, lru_key(n), n.sequence))  # type: ignore[union-attr]
            oldest = min(nodes, key=lambda n: (n.last_access, n.sequence))
            before = tree.order.num_unlike_lru
            assert tree.evict() == expected.block_id
            assert tree.order.num_unlike_lru - before == (oldest is not expected)
            nodes.remove(expected)
        tree.check_invariants()


def turn(memory: MemoryManager, session: SessionBlocks, tokens: list[int]) -> None:
    name = f"{session.session_id}-{len(tokens)}-{tokens[-1]}"
    memory.allocate(name, tokens, session=session)
    memory.commit(name, tokens, len(tokens))
    memory.free(name)
    memory.check_invariants()


def managed(num_blocks: int, *, protects_anchors: bool = True) -> MemoryManager:
    memory = MemoryManager(num_blocks, 1)
    memory.use_policy(lru_key, protects_anchors=protects_anchors, max_pinned_blocks=num_blocks)
    return memory


def session(memory: MemoryManager, name: str, key: int) -> SessionBlocks:
    return SessionBlocks(name, memory.order.new_group((1, key)))


def cached(memory: MemoryManager, tokens: list[int]) -> int:
    return memory.match_prefix([*tokens, -1]).num_tokens


def test_a_branch_that_its_session_left_goes_first() -> None:
    memory = managed(8)
    mine, other = session(memory, "mine", 9), session(memory, "other", 1)
    turn(memory, other, [50, 51])
    turn(memory, mine, [1, 2, 3, 4])
    turn(memory, mine, [1, 2, 5])  # half of the branch is kept: 3 and 4 are superseded
    memory.allocate("new", [90, 91, 92])  # 1 free + 2
    assert (cached(memory, [1, 2, 3]), cached(memory, [1, 2, 5]), cached(memory, [50, 51])) == (2, 3, 2)


def test_a_side_conversation_supersedes_nothing() -> None:
    memory = managed(8)
    mine, other = session(memory, "mine", 9), session(memory, "other", 1)
    turn(memory, other, [50])
    turn(memory, mine, [1, 2, 3, 4])
    turn(memory, mine, [1, 7])  # a quarter
    memory.allocate("new", [90, 91, 92])  # 2 free + 1: the other session's, which is worth least
    assert (cached(memory, [1, 2, 3, 4]), cached(memory, [50])) == (4, 0)


def test_anchors_outlive_private_history_if_they_are_protected() -> None:
    for protects, expected in ((True, 1), (False, 0)):
        memory = managed(4, protects_anchors=protects)
        first, second, third = (session(memory, name, key) for name, key in (("a", 1), ("b", 2), ("c", 3)))
        turn(memory, first, [1])
        turn(memory, second, [1, 5])
        turn(memory, third, [8, 9])
        memory.allocate("new", [90, 91])  # of 4 blocks 2 must go: first 5, the end of the older session's path
        assert cached(memory, [1]) == expected


def test_pins_hold_admissions_back_within_their_share_and_yield() -> None:
    memory = managed(4)
    mine = session(memory, "mine", 1)
    turn(memory, mine, [1, 2, 3])
    memory.order.rekey(mine.group, (3, 0), is_pinned=True)
    assert memory.num_pinned_blocks == 3
    assert memory.allocate("new", [90, 91]).outcome.value == "out_of_blocks"
    assert memory.num_pin_refusals == 1
    assert memory.allocate("mine-2", [1, 2, 3, 4], session=mine).num_cached_tokens == 3  # its own pin is no obstacle
    memory.free("mine-2")
    memory.max_pinned_blocks = 2
    assert memory.allocate("new", [90, 91]).outcome.value == "allocated"  # 4 - 2
    assert memory.num_pinned_blocks == 2
    assert memory.allocate("more", [80, 81]).outcome.value == "out_of_blocks"
    assert memory.allocate("more", [80, 81], ignore_pins=True).outcome.value == "allocated"
    assert (memory.num_pin_yields, memory.num_pinned_blocks) == (1, 0)
    memory.check_invariants()
