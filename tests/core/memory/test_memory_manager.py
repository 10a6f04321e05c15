"""MemoryManager: exact counts and every edge case by hand. Blocks have 4 tokens unless a test says otherwise."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from agentserve.config import TierConfig, TieringConfig
from agentserve.core.memory.manager import Allocation, AllocationOutcome, MemoryManager, PrefixLock, PrefixMatch
from agentserve.core.transfers import Transfer, TransferOutput
from agentserve.errors import ConfigError

OUT_OF_BLOCKS = Allocation(AllocationOutcome.OUT_OF_BLOCKS)
NOTHING = PrefixMatch(0, 0, None)


def manager(num_blocks: int = 16, *, enable_prefix_caching: bool = True) -> MemoryManager:
    return MemoryManager(num_blocks, 4, enable_prefix_caching=enable_prefix_caching)


def allocated(num_cached_tokens: int) -> Allocation:
    return Allocation(AllocationOutcome.ALLOCATED, num_cached_tokens=num_cached_tokens)


def pending(owner: str) -> Allocation:
    return Allocation(AllocationOutcome.PENDING_PREFIX, pending_owner=owner)


def tokens(count: int, first: int = 0) -> list[int]:
    return list(range(first, first + count))


def run(memory: MemoryManager, request_id: str, token_ids: list[int], salt: str | None = None) -> Allocation:
    """Admits a request and computes its whole prompt."""
    allocation = memory.allocate(request_id, token_ids, salt=salt)
    assert allocation.outcome is AllocationOutcome.ALLOCATED
    memory.commit(request_id, token_ids, len(token_ids))
    memory.check_invariants()
    return allocation


def counts(memory: MemoryManager) -> tuple[int, int, int]:
    """Free, cached and evicted blocks."""
    memory.check_invariants()
    assert memory.num_available_blocks == memory.num_free_blocks + memory.num_cached_blocks
    return memory.num_free_blocks, memory.num_cached_blocks, memory.num_evicted_blocks


def test_one_request_from_admission_to_end() -> None:
    memory = manager()
    prompt = tokens(10)
    assert memory.allocate("a", prompt) == allocated(0)
    assert memory.holds("a")
    assert memory.block_ids("a") == (0, 1, 2)  # ceil(10 / 4)
    assert counts(memory) == (13, 0, 0)
    memory.commit("a", prompt, 10)
    memory.free("a")
    assert not memory.holds("a")
    assert counts(memory) == (14, 2, 0)  # two whole blocks stay cached, the third (2 tokens) is free again


def test_the_second_turn_finds_all_whole_blocks_of_the_first() -> None:
    memory = manager()
    turn = tokens(10)
    run(memory, "a", turn)
    for token in tokens(7, first=100):  # 10 + 7 = 17 tokens, the last one sampled but never computed
        turn.append(token)
        assert memory.extend("a", len(turn))
        memory.commit("a", turn, len(turn) - 1)
    assert memory.block_ids("a") == (0, 1, 2, 3, 4)  # ceil(17 / 4), in one run
    memory.free("a")
    assert counts(memory) == (12, 4, 0)  # 16 computed tokens are 4 whole blocks
    assert memory.match_prefix([*turn, 7, 8]) == PrefixMatch(16, 0, None)
    assert memory.allocate("b", [*turn, 7, 8]) == allocated(16)
    assert memory.block_ids("b") == (0, 1, 2, 3, 4)
    assert counts(memory) == (11, 0, 0)  # 16 - 5 held


def test_the_last_block_of_a_fully_cached_prompt_is_computed_again_in_a_private_block() -> None:
    memory = manager()
    prompt = tokens(8)
    run(memory, "a", prompt)
    memory.free("a")
    assert memory.match_prefix(prompt) == PrefixMatch(4, 0, None)  # (8 - 1) // 4 = 1 block
    assert memory.allocate("b", prompt) == allocated(4)
    assert memory.block_ids("b") == (0, 2)  # block 1 is still that of the cache
    assert counts(memory) == (13, 1, 0)
    memory.commit("b", prompt, 8)
    assert counts(memory) == (13, 0, 0)  # b holds the cached block 1 as well, for what will come below it
    assert memory.block_ids("b") == (0, 2)  # but the ids that it has handed out do not change
    memory.free("b")
    assert counts(memory) == (14, 2, 0)


def test_outputs_go_on_below_a_block_that_somebody_else_published() -> None:
    memory = manager()
    prompt = tokens(8)
    run(memory, "a", prompt)
    memory.free("a")
    longer = [*prompt, 50, 51, 52, 53]
    memory.allocate("b", prompt)
    assert memory.extend("b", 12)
    memory.commit("b", longer, 12)
    memory.free("b")
    assert memory.match_prefix([*longer, 1]) == PrefixMatch(12, 0, None)
    assert counts(memory) == (13, 3, 0)  # 0, 1 of a; 1 more of b; b's copy of the second block is free


def test_if_the_block_to_compute_again_was_evicted_meanwhile_ours_takes_its_place() -> None:
    memory = manager(4)
    prompt = tokens(8)
    run(memory, "a", prompt)
    memory.free("a")
    assert memory.allocate("b", prompt) == allocated(4)
    run(memory, "c", tokens(8, first=100))  # 4 - 2 cached - 1 of b = 1 free, so the second block of a is evicted
    assert counts(memory) == (0, 0, 1)
    assert memory.match_prefix([*prompt, 0]).num_tokens == 4
    memory.commit("b", prompt, 8)
    assert memory.match_prefix([*prompt, 0]).num_tokens == 8
    memory.free("b")
    assert counts(memory) == (0, 2, 1)


def test_identical_prompts_that_arrive_together_are_computed_once() -> None:
    memory = manager()
    prompt = tokens(14)
    memory.allocate("a", prompt)
    assert memory.match_prefix(prompt) == PrefixMatch(0, 12, "a")
    assert memory.allocate("b", prompt) == pending("a")
    assert not memory.holds("b")
    assert counts(memory) == (12, 0, 0)  # ceil(14 / 4) = 4 of a
    memory.commit("a", prompt, 7)  # one block and three quarters
    assert memory.match_prefix(prompt) == PrefixMatch(4, 8, "a")
    assert memory.allocate("b", prompt) == pending("a")
    memory.commit("a", prompt, 12)
    assert memory.allocate("b", prompt) == allocated(12)
    assert memory.block_ids("b") == (0, 1, 2, 4)  # its own block for the last two tokens
    assert counts(memory) == (11, 0, 0)


def test_a_pending_block_that_could_not_be_used_anyway_is_not_waited_for() -> None:
    memory = manager()
    prompt = tokens(8)
    memory.allocate("a", prompt)
    memory.commit("a", prompt, 5)
    assert memory.match_prefix(prompt) == PrefixMatch(4, 0, None)  # the second block holds the last token
    assert memory.allocate("b", prompt) == allocated(4)
    assert memory.match_prefix([*prompt, 8]) == PrefixMatch(4, 4, "a")


@pytest.mark.parametrize("first_to_finish", ["a", "b"])
def test_two_compute_the_same_block_and_either_may_be_first(first_to_finish: str) -> None:
    memory = manager()
    prompt = tokens(8)
    memory.allocate("a", prompt)
    memory.commit("a", prompt, 5)
    memory.allocate("b", prompt)
    last = "b" if first_to_finish == "a" else "a"
    memory.commit(first_to_finish, prompt, 8)
    assert memory.match_prefix([*prompt, 8]) == PrefixMatch(8, 0, None)
    memory.check_invariants()
    published = memory.block_ids(first_to_finish)
    memory.commit(last, prompt, 8)
    memory.free(last)
    assert counts(memory) == (14, 0, 0)  # the two blocks of the first one are held, the copy came back
    memory.free(first_to_finish)
    assert counts(memory) == (14, 2, 0)
    memory.allocate("c", [*prompt, 8])
    assert memory.block_ids("c")[:2] == published


def test_a_block_published_by_another_survives_the_end_of_its_first_owner() -> None:
    memory = manager()
    prompt = tokens(8)
    memory.allocate("a", [*prompt, *tokens(4, first=70)])
    memory.commit("a", [*prompt, *tokens(4, first=70)], 5)
    memory.allocate("b", prompt)
    memory.commit("b", prompt, 8)  # the second block, pending for a, is ready through b; a's third is pending below it
    assert memory.match_prefix([*prompt, *tokens(5, first=70)]) == PrefixMatch(8, 4, "a")
    memory.check_invariants()
    memory.free("a")
    assert memory.match_prefix([*prompt, *tokens(5, first=70)]) == PrefixMatch(8, 0, None)
    assert counts(memory) == (14, 0, 0)
    memory.free("b")
    assert counts(memory) == (14, 2, 0)


def test_when_an_owner_ends_half_way_its_ready_part_stays_and_the_rest_vanishes() -> None:
    memory = manager()
    prompt = tokens(16)
    memory.allocate("a", prompt)
    memory.commit("a", prompt, 9)
    assert memory.allocate("b", prompt) == pending("a")
    memory.free("a")
    assert counts(memory) == (14, 2, 0)  # 9 // 4 = 2 ready blocks
    assert memory.match_prefix(prompt) == PrefixMatch(8, 0, None)
    assert memory.allocate("b", prompt) == allocated(8)
    assert memory.match_prefix([*prompt, 1]) == PrefixMatch(8, 8, "b")


def test_a_preempted_request_finds_its_own_blocks_outputs_included() -> None:
    memory = manager()
    turn = tokens(6)
    run(memory, "a", turn)
    turn += [50, 51, 52]
    assert memory.extend("a", 9)
    memory.commit("a", turn, 8)
    memory.free("a")
    assert counts(memory) == (14, 2, 0)
    assert memory.allocate("a", turn) == allocated(8)
    assert counts(memory) == (13, 0, 0)  # ceil(9 / 4) = 3


def test_equal_outputs_of_two_requests_are_kept_once() -> None:
    memory = manager()
    prompt = tokens(6)
    run(memory, "a", prompt)
    run(memory, "b", prompt)
    answer = [*prompt, 50, 51]
    memory.commit("a", answer, 8)
    memory.commit("b", answer, 8)
    assert memory.block_ids("a") == (0, 1)
    assert memory.block_ids("b") == (0, 2)
    assert counts(memory) == (13, 0, 0)
    memory.free("a")
    assert counts(memory) == (13, 0, 0)  # b holds both published blocks of a, and its own copy
    memory.free("b")
    assert counts(memory) == (14, 2, 0)


def test_different_continuations_share_what_they_have_in_common() -> None:
    memory = manager()
    system = tokens(8)
    run(memory, "a", [*system, 20, 21, 22, 23])
    run(memory, "b", [*system, 30, 31, 32, 33])
    assert counts(memory) == (12, 0, 0)  # 2 shared + 1 + 1
    memory.free("a")
    assert counts(memory) == (12, 1, 0)
    memory.free("b")
    assert counts(memory) == (12, 4, 0)


def test_salts_do_not_share() -> None:
    memory = manager()
    prompt = tokens(9)
    run(memory, "a", prompt, salt="x")
    assert memory.match_prefix(prompt) == NOTHING
    assert memory.match_prefix(prompt, salt="") == NOTHING
    assert memory.match_prefix(prompt, salt="x") == PrefixMatch(8, 0, None)
    assert run(memory, "b", prompt) == allocated(0)
    assert run(memory, "c", prompt, salt="x") == allocated(8)
    assert counts(memory) == (9, 0, 0)  # 16 - 3 - 3 - 1


def test_without_prefix_caching_everything_is_private() -> None:
    memory = manager(enable_prefix_caching=False)
    prompt = tokens(9)
    assert run(memory, "a", prompt) == allocated(0)
    assert run(memory, "b", prompt) == allocated(0)
    assert memory.match_prefix(prompt) == NOTHING
    assert memory.lock(prompt).num_tokens == 0
    assert counts(memory) == (10, 0, 0)
    assert memory.extend("a", 13)
    memory.commit("a", tokens(13), 13)
    assert memory.block_ids("a") == (0, 1, 2, 8)  # behind 2 is b's, so the last empty group: blocks 8..15
    memory.free("a")
    memory.free("b")
    assert counts(memory) == (16, 0, 0)


def test_out_of_blocks_changes_nothing() -> None:
    memory = manager(4)
    run(memory, "a", tokens(9))
    before = counts(memory)
    assert before == (1, 0, 0)
    assert memory.allocate("b", tokens(8, first=50)) == OUT_OF_BLOCKS
    assert not memory.holds("b")
    assert not memory.extend("a", 17)  # 5 blocks of 4
    assert memory.block_ids("a") == (0, 1, 2)
    assert counts(memory) == before
    assert memory.extend("a", 16)
    assert not memory.extend("a", 17)


def test_matched_blocks_do_not_count_as_room_for_their_own_request() -> None:
    memory = manager(4)
    run(memory, "a", tokens(12))
    memory.free("a")
    assert counts(memory) == (1, 3, 0)
    # Matches 2 blocks, which cannot be evicted for it: 1 free + 1 other cached = 2 remain for 2 new ones.
    prompt = [*tokens(8), *tokens(8, first=50)]
    assert memory.allocate("b", prompt, reserve_blocks=1) == OUT_OF_BLOCKS
    assert counts(memory) == (1, 3, 0)
    assert memory.allocate("b", prompt) == allocated(8)
    assert counts(memory) == (0, 0, 1)


def test_reserved_blocks_remain() -> None:
    memory = manager(8)
    run(memory, "a", tokens(8))
    memory.free("a")
    assert counts(memory) == (6, 2, 0)
    other = tokens(16, first=50)
    assert memory.allocate("b", other, reserve_blocks=5) == OUT_OF_BLOCKS  # 8 available - 4 = 4
    assert memory.allocate("b", other, reserve_blocks=4) == allocated(0)
    assert counts(memory) == (2, 2, 0)
    # 4 available, of which one is matched and one is taken: 2 remain.
    assert memory.allocate("c", tokens(8), reserve_blocks=3) == OUT_OF_BLOCKS
    assert memory.allocate("c", tokens(8), reserve_blocks=2) == allocated(4)


def test_reserved_blocks_do_not_depend_on_what_others_hold() -> None:
    memory = manager(4)
    run(memory, "a", tokens(9))
    # Both matched blocks are held by a already, so they were not available in the first place: 1 free - 1 new = 0.
    assert memory.allocate("b", tokens(9), reserve_blocks=1) == OUT_OF_BLOCKS
    assert memory.allocate("b", tokens(9)) == allocated(8)
    assert counts(memory) == (0, 0, 0)


def test_what_makes_room_for_those_that_grow_is_copied_down_before() -> None:
    host = TieringConfig(4000, (TierConfig("host", 16, 4e6, 4e6),), write_back="on_evict")
    memory = MemoryManager(8, 4, tiering=host)
    run(memory, "a", tokens(20))
    memory.free("a")  # 5 blocks, nowhere else
    assert memory.allocate("b", tokens(8, 100), reserve_blocks=3).outcome is AllocationOutcome.ALLOCATED
    # One block is free; two are on their way down before any of three requests that run has asked for one.
    (transfer,) = memory.start_transfers()
    assert isinstance(transfer, Transfer) and len(transfer.source_ids) == 2 and memory.num_free_blocks == 1
    memory.finish_transfer(TransferOutput(transfer.transfer_id, 0, 1))
    assert memory.num_free_blocks == 3
    assert memory.extend("b", 20) and memory.residency is not None
    assert memory.residency.stats()[0].num_dropped_blocks == 0
    memory.check_invariants()


def test_block_ids_are_made_once_per_change() -> None:
    memory = manager()
    memory.allocate("a", tokens(4))
    first = memory.block_ids("a")
    assert memory.extend("a", 4)
    memory.commit("a", tokens(4), 4)
    assert memory.block_ids("a") is first
    assert memory.extend("a", 5)
    assert memory.block_ids("a") == (0, 1)


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 4), (4, 0), (-1, 4), (4, -1)])
def test_sizes_must_be_positive(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ConfigError, match="must be positive"):
        MemoryManager(num_blocks, block_size)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda memory: memory.allocate("a", tokens(4)), "holds blocks already"),
        (lambda memory: memory.allocate("b", []), "0 tokens need 0 blocks"),
        (lambda memory: memory.allocate("b", tokens(65)), "65 tokens need 17 blocks; there are 16"),
        (lambda memory: memory.allocate("b", tokens(4), reserve_blocks=-1), "must not be negative"),
        (lambda memory: memory.extend("b", 4), "'b' holds no blocks"),
        (lambda memory: memory.commit("b", tokens(4), 4), "'b' holds no blocks"),
        (lambda memory: memory.block_ids("b"), "'b' holds no blocks"),
        (lambda memory: memory.free("b"), "'b' holds no blocks"),
        (lambda memory: memory.commit("a", tokens(10), 4), "not between 5"),  # the count falls
        (lambda memory: memory.commit("a", tokens(10), 11), "10 \\(tokens"),  # more than there are tokens
        (lambda memory: memory.commit("a", tokens(20), 13), "12 \\(tokens"),  # more than fit into 3 blocks
        (lambda memory: memory.commit("a", [0, 1, 2, 3, 4, 5, 6, 8, 8, 9], 9), "differ from those"),
        (lambda memory: memory.unlock(PrefixLock(7, 0)), "lock 7 is not held"),
    ],
)
def test_calls_that_make_no_sense_change_nothing(call: Callable[[MemoryManager], object], message: str) -> None:
    memory = manager()
    prompt = tokens(10)
    memory.allocate("a", prompt)
    memory.commit("a", prompt, 5)
    before = counts(memory), memory.match_prefix(prompt), memory.block_ids("a")
    with pytest.raises(ValueError, match=message):
        call(memory)
    assert (counts(memory), memory.match_prefix(prompt), memory.block_ids("a")) == before
    memory.commit("a", prompt, 10)
    memory.free("a")
    assert counts(memory) == (14, 2, 0)


def test_an_empty_prompt_matches_nothing() -> None:
    memory = manager()
    assert memory.match_prefix([]) == NOTHING
    lock = memory.lock([])
    assert lock.num_tokens == 0
    memory.unlock(lock)
