"""Which KV blocks are free, and which of them to hand out next."""

from __future__ import annotations

import heapq

GROUP_BLOCKS = 8
"""A sequence that grows block by block starts in an empty group of this many blocks, if there is one."""

_EMPTY_GROUP = b"\x01" * GROUP_BLOCKS


class BlockPool:
    """The free blocks of a store of `num_blocks` blocks with ids `0 .. num_blocks - 1`.

    The order is deterministic and made for long runs of neighbouring ids, because copies and attention kernels like
    them: prompts are packed from the lowest ids upwards; a sequence that grows takes the id behind its last block,
    and if that is gone it moves to an empty group near the top, where sequences that grow at the same time stay out
    of each other's way. All operations are O(log num_blocks) or better per block, amortized.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        num_groups = num_blocks // GROUP_BLOCKS
        self._is_free = bytearray(b"\x01") * num_blocks
        # Both heaps are invalidated lazily: an entry that is no longer free (empty) is dropped when it comes up. The
        # flags keep every id in its heap at most once.
        self._free_ids = list(range(num_blocks))
        self._is_listed = bytearray(b"\x01") * num_blocks
        self._empty_groups = [-group for group in range(num_groups - 1, -1, -1)]  # negative: the highest comes first
        self._is_group_listed = bytearray(b"\x01") * num_groups

    def is_free(self, block_id: int) -> bool:
        return self._is_free[block_id] == 1

    def take(self, count: int) -> list[int]:
        """Takes the `count` lowest free ids, in ascending order. The caller has made sure that there are as many."""
        assert 0 <= count <= self.num_free, f"{count} blocks wanted, {self.num_free} free"
        taken: list[int] = []
        while len(taken) < count:
            block_id = heapq.heappop(self._free_ids)
            self._is_listed[block_id] = 0
            if self._is_free[block_id]:
                self._is_free[block_id] = 0
                taken.append(block_id)
        self.num_free -= count
        return taken

    def take_after(self, last_id: int) -> int:
        """Takes one block for a sequence whose last block is `last_id`: its successor, else a place with room."""
        assert self.num_free > 0, "no block is free"
        successor = last_id + 1
        if successor < self.num_blocks and self._is_free[successor]:
            return self._mark_taken(successor)
        while self._empty_groups:
            group = -heapq.heappop(self._empty_groups)
            self._is_group_listed[group] = 0
            if self._is_empty(group):
                return self._mark_taken(group * GROUP_BLOCKS)
        return self.take(1)[0]

    def take_exactly(self, block_id: int) -> None:
        """Takes this block, which must be free."""
        assert self._is_free[block_id], f"block {block_id} is taken already"
        self._mark_taken(block_id)

    def put(self, block_id: int) -> None:
        """Gives a block back."""
        assert not self._is_free[block_id], f"block {block_id} is free already"
        self._is_free[block_id] = 1
        self.num_free += 1
        if not self._is_listed[block_id]:
            self._is_listed[block_id] = 1
            heapq.heappush(self._free_ids, block_id)
        group = block_id // GROUP_BLOCKS
        # The last group may be short; it has no flag and is never handed out as a group.
        if group < len(self._is_group_listed) and not self._is_group_listed[group] and self._is_empty(group):
            self._is_group_listed[group] = 1
            heapq.heappush(self._empty_groups, -group)

    def check_invariants(self) -> None:
        """Raises AssertionError if a counter, a flag or a heap is wrong."""
        assert self.num_free == sum(self._is_free), f"{self.num_free} blocks counted, {sum(self._is_free)} are free"
        listed = [block_id for block_id in range(self.num_blocks) if self._is_listed[block_id]]
        assert sorted(self._free_ids) == listed, "the flags do not tell what is in the heap of free blocks"
        for block_id in range(self.num_blocks):
            assert self._is_listed[block_id] or not self._is_free[block_id], f"free block {block_id} is in no heap"
        groups = [group for group in range(len(self._is_group_listed)) if self._is_group_listed[group]]
        assert sorted(-entry for entry in self._empty_groups) == groups, "the flags do not tell which groups are listed"
        for group in range(len(self._is_group_listed)):
            assert self._is_group_listed[group] or not self._is_empty(group), f"empty group {group} is in no heap"

    def _mark_taken(self, block_id: int) -> int:
        self._is_free[block_id] = 0
        self.num_free -= 1
        return block_id

    def _is_empty(self, group: int) -> bool:
        return self._is_free[group * GROUP_BLOCKS : (group + 1) * GROUP_BLOCKS] == _EMPTY_GROUP
