"""Who is evicted, in which order, and who never is. Blocks have 2 tokens."""

from __future__ import annotations

from agentserve.core.memory.manager import Allocation, AllocationOutcome, MemoryManager
from agentserve.core.memory.radix import RadixNode, RadixTree

OUT_OF_BLOCKS = Allocation(AllocationOutcome.OUT_OF_BLOCKS)


def cache(memory: MemoryManager, name: str, token_ids: list[int], salt: str | None = None) -> None:
    """A request that comes, computes its prompt and goes."""
    assert memory.allocate(name, token_ids, salt=salt).outcome is AllocationOutcome.ALLOCATED
    memory.commit(name, token_ids, len(token_ids))
    memory.free(name)
    memory.check_invariants()


def cached_tokens(memory: MemoryManager, token_ids: list[int], salt: str | None = None) -> int:
    return memory.match_prefix([*token_ids, 99], salt=salt).num_tokens


def make_room(memory: MemoryManager, num_blocks: int) -> None:
    """Takes so many blocks for a moment, without leaving anything in the cache."""
    assert memory.allocate("room", [-1] * (2 * num_blocks)).outcome is AllocationOutcome.ALLOCATED
    memory.check_invariants()
    memory.free("room")


def test_the_least_recently_used_prefix_goes_first() -> None:
    memory = MemoryManager(4, 2)
    cache(memory, "a", [1, 1])
    cache(memory, "b", [2, 2])
    cache(memory, "c", [3, 3])
    cache(memory, "a", [1, 1, 0])  # used again
    make_room(memory, 2)  # 1 free + 1 evicted
    assert memory.num_evicted_blocks == 1
    assert [cached_tokens(memory, [n, n]) for n in (1, 2, 3)] == [2, 0, 2]
    make_room(memory, 3)  # 2 free + 1 evicted
    assert [cached_tokens(memory, [n, n]) for n in (1, 2, 3)] == [2, 0, 0]


def test_asking_is_not_using() -> None:
    memory = MemoryManager(3, 2)
    cache(memory, "a", [1, 1])
    cache(memory, "b", [2, 2])
    memory.match_prefix([1, 1, 0])
    make_room(memory, 2)
    assert [cached_tokens(memory, [n, n]) for n in (1, 2)] == [0, 2]


def test_the_end_of_a_path_goes_before_its_beginning() -> None:
    memory = MemoryManager(4, 2)
    cache(memory, "a", [1, 1, 2, 2, 3, 3, 4, 4])
    left = []
    for num_blocks in (1, 2, 3, 4):
        make_room(memory, num_blocks)
        left.append(cached_tokens(memory, [1, 1, 2, 2, 3, 3, 4, 4]))
    assert left == [6, 4, 2, 0]
    assert memory.num_evicted_blocks == 4


def test_a_shared_beginning_outlives_its_branches() -> None:
    memory = MemoryManager(4, 2)
    cache(memory, "a", [1, 1, 2, 2])
    cache(memory, "b", [1, 1, 3, 3])
    make_room(memory, 2)  # 1 free + 1: the older branch
    assert [cached_tokens(memory, [1, 1, n, n]) for n in (2, 3)] == [2, 4]
    make_room(memory, 3)
    assert [cached_tokens(memory, [1, 1, n, n]) for n in (2, 3)] == [2, 2]


def test_a_running_request_protects_its_prefix_and_ends_as_the_latest_user() -> None:
    memory = MemoryManager(4, 2)
    cache(memory, "a", [1, 1])
    assert memory.allocate("r", [1, 1, 5]).num_cached_tokens == 2
    cache(memory, "b", [2, 2])
    assert memory.allocate("x", [-1] * 6) == OUT_OF_BLOCKS  # 4 - 2 of r = 2 available, 3 wanted
    make_room(memory, 2)
    assert [cached_tokens(memory, [n, n]) for n in (1, 2)] == [2, 0]
    cache(memory, "b", [2, 2])
    memory.free("r")
    make_room(memory, 3)  # 2 free + 1: b, since r used a's block until its end
    assert [cached_tokens(memory, [n, n]) for n in (1, 2)] == [2, 0]


def test_extending_evicts_what_nobody_holds() -> None:
    memory = MemoryManager(3, 2)
    cache(memory, "a", [1, 1, 2, 2])
    assert memory.allocate("r", [1, 1, 5]).num_cached_tokens == 2
    assert memory.num_cached_blocks == 1
    assert memory.extend("r", 5)
    assert memory.num_evicted_blocks == 1
    assert not memory.extend("r", 7)
    memory.check_invariants()


def test_locked_prefixes_stay() -> None:
    memory = MemoryManager(4, 2)
    cache(memory, "a", [1, 1, 2, 2])
    cache(memory, "b", [3, 3])
    lock = memory.lock([1, 1, 2, 2, 9])
    assert lock.num_tokens == 4
    again = memory.lock([1, 1])  # locks add up; the prompt may end with the prefix
    assert again.num_tokens == 2
    assert memory.num_available_blocks == 2  # 1 free + b
    assert memory.allocate("x", [-1] * 6) == OUT_OF_BLOCKS
    make_room(memory, 2)
    assert cached_tokens(memory, [1, 1, 2, 2]) == 4
    memory.unlock(lock)
    assert memory.num_available_blocks == 3
    make_room(memory, 3)
    assert cached_tokens(memory, [1, 1, 2, 2]) == 2
    memory.unlock(again)
    make_room(memory, 4)
    assert cached_tokens(memory, [1, 1, 2, 2]) == 0
    assert memory.num_evicted_blocks == 3


def test_the_end_of_a_lock_counts_as_use() -> None:
    memory = MemoryManager(3, 2)
    cache(memory, "a", [1, 1])
    lock = memory.lock([1, 1])
    cache(memory, "b", [2, 2])
    memory.unlock(lock)
    make_room(memory, 2)
    assert [cached_tokens(memory, [n, n]) for n in (1, 2)] == [2, 0]


def test_a_lock_holds_only_what_is_ready() -> None:
    memory = MemoryManager(4, 2)
    prompt = [1, 1, 2, 2, 3, 3]
    memory.allocate("a", prompt)
    memory.commit("a", prompt, 3)
    lock = memory.lock(prompt)
    assert lock.num_tokens == 2
    memory.free("a")
    assert (memory.num_free_blocks, memory.num_cached_blocks) == (3, 0)
    memory.check_invariants()
    memory.unlock(lock)
    assert (memory.num_free_blocks, memory.num_cached_blocks) == (3, 1)


def test_another_order_of_eviction_can_be_plugged_in() -> None:
    def small_tokens_first(node: RadixNode) -> tuple[float, ...]:
        return (node.key[0],)

    memory = MemoryManager(4, 2, eviction_key=small_tokens_first)
    for n in (3, 1, 2):
        cache(memory, f"r{n}", [n, n])
    left = []
    for num_blocks in (2, 3, 4):
        make_room(memory, num_blocks)
        left.append([n for n in (1, 2, 3) if cached_tokens(memory, [n, n])])
    assert left == [[2, 3], [3], []]


def test_equal_keys_end_in_the_order_of_creation() -> None:
    memory = MemoryManager(3, 2, eviction_key=lambda node: (0,))
    cache(memory, "b", [2, 2])
    cache(memory, "a", [1, 1])
    cache(memory, "b", [2, 2, 5])  # using it again does not count for this key
    make_room(memory, 2)
    assert [cached_tokens(memory, [n, n]) for n in (1, 2)] == [2, 0]


def test_eviction_goes_across_salts_and_leaves_no_empty_roots() -> None:
    memory = MemoryManager(4, 2)
    for salt in ("x", "y", "z"):
        cache(memory, "a", [1, 1], salt=salt)
    make_room(memory, 3)
    assert [cached_tokens(memory, [1, 1], salt=salt) for salt in ("x", "y", "z")] == [0, 0, 2]
    memory.check_invariants()  # an empty root is a violation


def test_a_cache_that_is_only_hit_does_not_grow_the_heap() -> None:
    tree = RadixTree(1)
    leaves = [tree.insert(None, None, (block_id,), block_id, None) for block_id in range(7)]
    for leaf in leaves:
        tree.release(leaf)
    largest = 0
    for hit in range(1000):
        leaf = leaves[hit * hit % 7]  # 0, 1, 2 and 4, in an order that does not look like one
        tree.acquire(leaf)
        tree.touch([leaf])
        tree.release(leaf)
        largest = max(largest, len(tree.order.common.heap))
        tree.check_invariants()
    # A push that finds more than 64 + 2 * 6 entries begins to clean up; it looks at four of them, as each one after it.
    assert largest == 77
    # 3, 5 and 6 were never hit. The last hits are 999 -> 4 (999 % 7 = 5, 25 % 7), 998 -> 2, 997 -> 2, 996 -> 4,
    # 995 -> 1, 994 -> 0: by last use 0, 1, 2, 4.
    assert [tree.evict() for _ in leaves] == [3, 5, 6, 0, 1, 2, 4]
    assert tree.num_cached == 0
