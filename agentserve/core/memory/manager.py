"""The one door to KV memory: who holds which blocks, and what is cached."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

from agentserve.config import TieringConfig
from agentserve.core.memory.answers import Allocation, AllocationOutcome, PrefixLock, PrefixMatch
from agentserve.core.memory.cache import BlockCache
from agentserve.core.memory.checks import check_holdings
from agentserve.core.memory.eviction import SessionBlocks
from agentserve.core.memory.holding import Holding, Holdings
from agentserve.core.memory.load_queue import Urgency, urgency_at
from agentserve.core.memory.prefetch import Prefetches
from agentserve.core.memory.radix import EvictionKey, RadixNode, lru_key
from agentserve.core.memory.residency import RecomputeCost

__all__ = ["Allocation", "AllocationOutcome", "MemoryManager", "PrefixLock", "PrefixMatch"]

_NOT_URGENT = urgency_at(math.inf)


class MemoryManager(BlockCache):
    """Paged KV blocks with a radix tree of cached prefixes over them.

    A block is in exactly one of three states: free, cached (in the tree, held by nobody: evictable) or held (by
    requests or locks). Nothing here moves bytes: a block id is a promise about who may write where.

    A prompt is registered at admission, before it is computed: its whole blocks become *pending* nodes, so that an
    identical prefix that arrives meanwhile waits instead of computing it twice. Blocks in the tree are never written
    again once they are ready. A request that computes tokens which somebody else published first keeps its own copy
    to itself until it ends, so that the block ids it has handed to an executor never change. The other way round, a
    block that is computed while somebody else still has it pending is published at once.

    Raises ConfigError for sizes that are not positive. Methods raise ValueError for calls that make no sense
    (unknown request, token counts that do not fit); then nothing has changed.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        enable_prefix_caching: bool = True,
        eviction_key: EvictionKey = lru_key,
        tiering: TieringConfig | None = None,
        recompute_ns: RecomputeCost | None = None,
    ) -> None:
        super().__init__(num_blocks, block_size, eviction_key=eviction_key, tiering=tiering, recompute_ns=recompute_ns)
        self.num_pin_refusals = 0
        """Admissions that would have got memory, had no block been pinned."""
        self.num_pin_yields = 0
        """Admissions that were allowed to take pinned blocks, because nothing else would have given them memory."""
        self._caching = enable_prefix_caching
        self._holdings = Holdings()
        self.prefetches = Prefetches(self)
        """What is being loaded although nobody waits for it."""

    def holds(self, request_id: str) -> bool:
        """Whether the request has been admitted and not been freed since."""
        return request_id in self._holdings

    def allocate(
        self,
        request_id: str,
        token_ids: Sequence[int],
        *,
        salt: str | None = None,
        reserve_blocks: int = 0,
        session: SessionBlocks | None = None,
        ignore_pins: bool = False,
        urgency: Urgency = _NOT_URGENT,
    ) -> Allocation:
        """Admits a request: holds the cached prefix and takes blocks for the rest of `token_ids`, or changes nothing.

        `reserve_blocks` free or evictable blocks must remain afterwards, else the outcome is OUT_OF_BLOCKS. It is
        PENDING_PREFIX if the block behind the cached prefix is being computed by another request: try again later.

        What lies in lower tiers behind that prefix, and is loaded sooner than computed, is being loaded from then on,
        what has the smallest `urgency` first; see `finish_transfer`. If blocks have to be copied down before they are
        free, the outcome is OUT_OF_BLOCKS, too: the copies go on, and the next attempt finds the room.

        The blocks will belong to `session`. Pinned blocks of others are taken with `ignore_pins` only, and then last.

        Raises ValueError if the request holds blocks already, if `token_ids` is empty or needs more blocks than
        exist, or if `reserve_blocks` is negative.
        """
        num_needed = self._ceil_blocks(len(token_ids))
        if request_id in self._holdings:
            raise ValueError(f"request {request_id!r} holds blocks already")
        if not 1 <= num_needed <= self.num_blocks:
            raise ValueError(f"{len(token_ids)} tokens need {num_needed} blocks; there are {self.num_blocks}")
        if reserve_blocks < 0:
            raise ValueError(f"reserve_blocks must not be negative, it is {reserve_blocks}")
        path, pending, trail = self._match(token_ids, salt, (len(token_ids) - 1) // self.block_size)
        if pending:
            owner = pending[0].owner
            if owner is not None and owner in self.prefetches:
                self.prefetches.hurry(owner, urgency)
            return Allocation(AllocationOutcome.PENDING_PREFIX, pending_owner=owner)
        num_new = num_needed - len(path)
        # Matched nodes that nobody holds are evictable now, but not once this request holds them.
        num_cached_matches = _num_unheld(path)
        spare = self._num_obtainable_blocks - num_cached_matches - num_new - reserve_blocks
        if spare < 0 and self.prefetches.give_way():
            num_cached_matches = _num_unheld(path)
            spare = self._num_obtainable_blocks - num_cached_matches - num_new - reserve_blocks
        if spare < 0 or (self.num_pinned_blocks and not self._respects_pins(path, spare, ignore_pins)):
            return Allocation(AllocationOutcome.OUT_OF_BLOCKS)
        num_cached_tokens = len(path) * self.block_size
        if path:
            self._tree.acquire(path[-1])
        if not self._make_room(num_new, may_wait=True):
            if path:
                self._tree.release(path[-1])
            return Allocation(AllocationOutcome.OUT_OF_BLOCKS)
        holding = Holding(salt, path, num_cached_tokens, session, self._trails.take(trail, path))
        holding.block_ids += self._pool.take(num_new)
        if self.residency is not None:
            # Who grows does not wait: what is evicted for it has to be copied down before.
            self._make_room(reserve_blocks, may_wait=True)
        holding.capacity = num_needed * self.block_size
        self._holdings[request_id] = holding
        if self._caching:
            holding.publish_at = num_cached_tokens + self.block_size
            self._register_pending(request_id, holding, token_ids)
        num_loading = self._begin_load(request_id, holding, token_ids, urgency)
        return Allocation(AllocationOutcome.ALLOCATED, num_cached_tokens, num_loading_tokens=num_loading)

    def extend(self, request_id: str, num_tokens: int) -> bool:
        """Makes room for `num_tokens` tokens in total. False, and nothing changed, if there are not enough blocks."""
        holding = self._holdings[request_id]
        if num_tokens <= holding.capacity:
            return True
        block_ids = holding.block_ids
        num_new = self._ceil_blocks(num_tokens) - len(block_ids)
        if self.num_available_blocks < num_new or not self._make_room(num_new, may_wait=False):
            return False
        for _ in range(num_new):
            block_ids.append(self._pool.take_after(block_ids[-1]))
        holding.block_ids_tuple = None
        holding.capacity = len(block_ids) * self.block_size
        return True

    def commit(self, request_id: str, token_ids: Sequence[int], num_computed_tokens: int) -> int:
        """Says that the KV of `token_ids[:num_computed_tokens]` is valid; blocks that are full now become cached.

        Returns how many computed tokens fill the next block: nothing comes of a call with fewer than these. `token_ids`
        starts with the tokens of the admission and may be longer than `num_computed_tokens`. Takes
        O(newly filled blocks), so O(1) for most decode steps.

        Raises ValueError if the count falls, exceeds `token_ids` or the blocks, or if tokens differ from the admitted
        ones.
        """
        holding = self._holdings[request_id]
        if not (
            holding.num_computed_tokens <= num_computed_tokens <= holding.capacity
            and num_computed_tokens <= len(token_ids)
        ):
            raise ValueError(
                f"request {request_id!r}: {num_computed_tokens} computed tokens are not between "
                f"{holding.num_computed_tokens} (before) and {min(len(token_ids), holding.capacity)} "
                "(tokens and blocks there are)"
            )
        if num_computed_tokens >= holding.publish_at:
            self._publish_full(request_id, holding, token_ids, num_computed_tokens // self.block_size)
        holding.num_computed_tokens = num_computed_tokens
        return holding.publish_at

    def block_ids(self, request_id: str) -> tuple[int, ...]:
        """The blocks of a request in the order of its tokens. The tuple is kept until the blocks change."""
        holding = self._holdings[request_id]
        block_ids = holding.block_ids_tuple
        if block_ids is None:
            block_ids = holding.block_ids_tuple = tuple(holding.block_ids)
        return block_ids

    def num_computed_tokens(self, request_id: str) -> int:
        """The tokens of a request whose KV is valid."""
        return self._holdings[request_id].num_computed_tokens

    def limits(self, request_id: str) -> tuple[int, int]:
        """The computed tokens at which a `commit` has a block to publish, and the tokens that there are blocks for."""
        holding = self._holdings[request_id]
        return holding.publish_at, holding.capacity

    def blocks_for(self, request_id: str, num_tokens: int) -> tuple[int, ...] | None:
        """The blocks of the request's first `num_tokens` tokens, extended if need be; None if there are not enough."""
        holding = self._holdings[request_id]
        capacity, block_ids = holding.capacity, holding.block_ids_tuple
        if block_ids is not None and capacity - self.block_size < num_tokens <= capacity:
            return block_ids  # the usual case: there is room in the last block
        if not self.extend(request_id, num_tokens):
            return None
        block_ids = self.block_ids(request_id)
        num_blocks = self._ceil_blocks(num_tokens)
        return block_ids if len(block_ids) == num_blocks else block_ids[:num_blocks]

    def free(self, request_id: str) -> None:
        """Takes all blocks from a request that finished, was cancelled or is preempted.

        What is ready stays cached, what is pending vanishes, private blocks become free. No batch in flight may still
        write to them.
        """
        holding = self._holdings[request_id]
        del self._holdings[request_id]
        self._tree.touch(holding.path, holding.session)
        if self.residency is not None:
            self.residency.write_back.released(holding.path)
        for block_id in reversed(holding.private_block_ids()):
            self._pool.put(block_id)
        path, num_ready = holding.path, len(holding.path)
        while num_ready and not path[num_ready - 1].is_ready:
            num_ready -= 1
            self._tree.remove(path[num_ready])
            self._pool.put(path[num_ready].block_id)
        if num_ready:
            self._tree.release(path[num_ready - 1])
            self._trails.add(path, num_ready, holding.trail)
        if holding.session is not None and holding.session.is_transient:
            self.drop(holding.session)

    def use_lru(self) -> None:
        """From now on the least recently used block goes first, whatever a policy said before."""
        self._tree.forget_sessions()
        self.losers = None
        for holding in self._holdings.values():
            holding.session = None

    def check_invariants(self) -> None:
        """Raises AssertionError if any count, link or state is wrong. O(blocks + cached tokens): for tests."""
        used = check_holdings(self._tree, self._holdings, list(self._locks.values()), self.block_size, self._caching)
        self._pool.check_invariants()
        if self.adapters is not None:
            self.adapters.check_invariants()
        if self.residency is not None:
            self.residency.check_invariants()
            used += self.residency.write_back.leaving_block_ids()
        assert len(used) == len(set(used)), "a block has two owners"
        assert not any(self._pool.is_free(block_id) for block_id in used), "a block is free and in use"
        assert self.num_free_blocks + len(used) == self.num_blocks, "a block was lost"

    # ---- parts of these ----

    def _respects_pins(self, path: Sequence[RadixNode], spare: int, ignore_pins: bool) -> bool:
        """Whether an admission that leaves `spare` evictable blocks may have them, in view of what is pinned."""
        num_own = sum(node.num_refs == 0 and node.group is not None and node.group.is_pinned for node in path)
        if spare >= min(self.num_pinned_blocks - num_own, self.max_pinned_blocks):
            return True
        if ignore_pins:
            self.num_pin_yields += 1
        else:
            self.num_pin_refusals += 1
        return ignore_pins

    def _begin_load(self, request_id: str, holding: Holding, token_ids: Sequence[int], urgency: Urgency) -> int:
        """Starts to load what lower tiers have of the prompt, if that is worth it; returns how many tokens."""
        if self.residency is None:
            return 0
        size, first = self.block_size, holding.num_ready_blocks
        most = (len(token_ids) - 1) // size
        blocks = (token_ids[index * size : (index + 1) * size] for index in range(first, most))
        found = self.residency.find(holding.path[first - 1] if first else None, holding.salt, blocks)
        found = self.residency.worth_loading(found, first * size, urgency)
        if found:
            self.residency.begin_load(request_id, found, holding.block_ids[first : first + len(found)], urgency)
        return len(found) * size

    def _register_pending(self, request_id: str, holding: Holding, token_ids: Sequence[int]) -> None:
        """Adds a pending node for each whole block of the prompt that is to be computed."""
        size, path, insert = self.block_size, holding.path, self._tree.insert
        first, end, last_node = len(path), len(token_ids) // size, holding.last_node
        for index in range(first, end):
            key = tuple(token_ids[index * size : (index + 1) * size])
            if index == first and self._tree.child(last_node, holding.salt, key) is not None:
                # Only the last block of a prompt of whole blocks can be there: it is computed again for its last
                # token. Ours stays private unless that one is gone or still pending when ours is done.
                return
            last_node = insert(last_node, holding.salt, key, holding.block_ids[index], request_id)
            path.append(last_node)

    def _publish_full(self, request_id: str, holding: Holding, token_ids: Sequence[int], num_full: int) -> None:
        """Publishes the blocks of a request up to `num_full`; nothing if their tokens are wrong."""
        size, first = self.block_size, holding.num_ready_blocks
        keys = [tuple(token_ids[start : start + size]) for start in range(first * size, num_full * size, size)]
        if any(node.key != key for node, key in zip(holding.path[first:], keys, strict=False)):
            raise ValueError(f"request {request_id!r}: the tokens differ from those that were admitted")
        for index, key in enumerate(keys, first):
            self._publish(request_id, holding, index, key)
        holding.num_ready_blocks = num_full
        holding.publish_at = (num_full + 1) * size

    def _publish(self, request_id: str, holding: Holding, index: int, key: tuple[int, ...]) -> None:
        """Makes block `index` of a request, computed just now, known to the tree."""
        if index < len(holding.path):
            node = holding.path[index]
            assert node.owner in (None, request_id), f"{request_id!r} holds a block that {node.owner!r} computes"
            node.owner = None  # it was ready before if somebody else was faster
            return
        found = self._tree.child(holding.last_node, holding.salt, key)
        if found is None:
            found = self._tree.insert(holding.last_node, holding.salt, key, holding.block_ids[index], None)
        else:
            if not found.is_ready:
                found.owner = None
                found.block_id = holding.block_ids[index]  # the block of the former owner is private to it from now on
            self._tree.go_on(found)
        holding.path.append(found)


def _num_unheld(path: Sequence[RadixNode]) -> int:
    """How many nodes of a path nobody holds: its last ones, since who holds a node holds its ancestors."""
    return len(path) - bisect_left(path, True, key=lambda node: node.num_refs == 0)
