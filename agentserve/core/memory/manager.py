"""The one door to KV memory: who holds which blocks, and what is cached."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from agentserve.core.memory.block import BlockPool
from agentserve.core.memory.holding import NEVER, Holding, Holdings
from agentserve.core.memory.radix import EvictionKey, RadixNode, RadixTree, lru_key
from agentserve.errors import ConfigError


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """What the cache holds of a prompt at the moment. Nothing is reserved by asking."""

    num_tokens: int
    """Ready tokens: whole blocks, and never the last token, since something must be computed to sample from."""
    num_pending_tokens: int
    """Further whole blocks directly behind them that another request is computing right now."""
    pending_owner: str | None
    """The request that computes the first of them."""


class AllocationOutcome(Enum):
    ALLOCATED = "allocated"
    OUT_OF_BLOCKS = "out_of_blocks"
    PENDING_PREFIX = "pending_prefix"


@dataclass(frozen=True, slots=True)
class Allocation:
    """The answer to `MemoryManager.allocate`."""

    outcome: AllocationOutcome
    num_cached_tokens: int = 0
    """When ALLOCATED: tokens whose KV is ready; whole blocks, fewer than were asked for."""
    pending_owner: str | None = None
    """When PENDING_PREFIX: who computes the next block."""


@dataclass(frozen=True, slots=True)
class PrefixLock:
    """A cached prefix that stays until `MemoryManager.unlock`."""

    lock_id: int
    num_tokens: int


class MemoryManager:
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
    ) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ConfigError(f"{num_blocks} KV blocks of {block_size} tokens: both numbers must be positive")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_evicted_blocks = 0
        """Blocks whose content was dropped to make room, since the start."""
        self._caching = enable_prefix_caching
        self._pool = BlockPool(num_blocks)
        self._tree = RadixTree(block_size, eviction_key)
        self._holdings = Holdings()
        self._locks: dict[int, list[RadixNode]] = {}
        self._last_lock_id = 0

    @property
    def num_free_blocks(self) -> int:
        """Blocks that hold nothing."""
        return self._pool.num_free

    @property
    def num_cached_blocks(self) -> int:
        """Blocks that hold a prefix nobody uses at the moment."""
        return self._tree.num_cached

    @property
    def num_available_blocks(self) -> int:
        """Blocks that an allocation could get: free or evictable."""
        return self._pool.num_free + self._tree.num_cached

    def holds(self, request_id: str) -> bool:
        """Whether the request has been admitted and not been freed since."""
        return request_id in self._holdings

    def match_prefix(self, token_ids: Sequence[int], *, salt: str | None = None) -> PrefixMatch:
        """What is cached of `token_ids`. O(matched tokens); changes nothing, the order of eviction included."""
        ready, pending = self._match(token_ids, salt, (len(token_ids) - 1) // self.block_size)
        return PrefixMatch(
            num_tokens=len(ready) * self.block_size,
            num_pending_tokens=len(pending) * self.block_size,
            pending_owner=pending[0].owner if pending else None,
        )

    def allocate(
        self, request_id: str, token_ids: Sequence[int], *, salt: str | None = None, reserve_blocks: int = 0
    ) -> Allocation:
        """Admits a request: holds the cached prefix and takes blocks for the rest of `token_ids`, or changes nothing.

        `reserve_blocks` free or evictable blocks must remain afterwards, else the outcome is OUT_OF_BLOCKS. It is
        PENDING_PREFIX if the block behind the cached prefix is being computed by another request: try again later.

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
        path, pending = self._match(token_ids, salt, (len(token_ids) - 1) // self.block_size)
        if pending:
            return Allocation(AllocationOutcome.PENDING_PREFIX, pending_owner=pending[0].owner)
        num_new = num_needed - len(path)
        # Matched nodes that nobody holds are evictable now, but not once this request holds them.
        num_cached_matches = sum(node.num_refs == 0 for node in path)
        if self.num_available_blocks - num_cached_matches < num_new + reserve_blocks:
            return Allocation(AllocationOutcome.OUT_OF_BLOCKS)
        num_cached_tokens = len(path) * self.block_size
        for node in path:
            self._tree.acquire(node)
        self._evict_until_free(num_new)
        holding = Holding(salt, path, num_cached_tokens)
        holding.block_ids += self._pool.take(num_new)
        holding.capacity = num_needed * self.block_size
        self._holdings[request_id] = holding
        if self._caching:
            holding.publish_at = num_cached_tokens + self.block_size
            self._register_pending(request_id, holding, token_ids)
        return Allocation(AllocationOutcome.ALLOCATED, num_cached_tokens=num_cached_tokens)

    def extend(self, request_id: str, num_tokens: int) -> bool:
        """Makes room for `num_tokens` tokens in total. False, and nothing changed, if there are not enough blocks."""
        holding = self._holdings[request_id]
        if num_tokens <= holding.capacity:
            return True
        block_ids = holding.block_ids
        num_new = self._ceil_blocks(num_tokens) - len(block_ids)
        if self.num_available_blocks < num_new:
            return False
        self._evict_until_free(num_new)
        for _ in range(num_new):
            block_ids.append(self._pool.take_after(block_ids[-1]))
        holding.block_ids_tuple = None
        holding.capacity = len(block_ids) * self.block_size
        return True

    def commit(self, request_id: str, token_ids: Sequence[int], num_computed_tokens: int) -> None:
        """Says that the KV of `token_ids[:num_computed_tokens]` is valid; blocks that are full now become cached.

        `token_ids` starts with the tokens of the admission and may be longer than `num_computed_tokens`. Takes
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

    def block_ids(self, request_id: str) -> tuple[int, ...]:
        """The blocks of a request in the order of its tokens. The tuple is kept until the blocks change."""
        holding = self._holdings[request_id]
        block_ids = holding.block_ids_tuple
        if block_ids is None:
            block_ids = holding.block_ids_tuple = tuple(holding.block_ids)
        return block_ids

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

    def lock(self, token_ids: Sequence[int], *, salt: str | None = None) -> PrefixLock:
        """Keeps the ready whole blocks of `token_ids` from eviction until `unlock`. There may be none."""
        path, _ = self._match(token_ids, salt, len(token_ids) // self.block_size)
        for node in path:
            self._tree.acquire(node)
        self._last_lock_id += 1
        self._locks[self._last_lock_id] = path
        return PrefixLock(self._last_lock_id, len(path) * self.block_size)

    def unlock(self, lock: PrefixLock) -> None:
        """Ends a lock. Raises ValueError if it has ended already."""
        path = self._locks.pop(lock.lock_id, None)
        if path is None:
            raise ValueError(f"lock {lock.lock_id} is not held")
        self._tree.touch(path)
        for node in reversed(path):
            self._tree.release(node)

    def free(self, request_id: str) -> None:
        """Takes all blocks from a request that finished, was cancelled or is preempted.

        What is ready stays cached, what is pending vanishes, private blocks become free. No batch in flight may still
        write to them.
        """
        holding = self._holdings[request_id]
        del self._holdings[request_id]
        self._tree.touch(holding.path)
        for index in range(len(holding.block_ids) - 1, -1, -1):
            if holding.is_private(index):
                self._pool.put(holding.block_ids[index])
            if index < len(holding.path):
                node = holding.path[index]
                if node.is_ready:
                    self._tree.release(node)
                else:
                    self._tree.remove(node)
                    self._pool.put(node.block_id)

    def check_invariants(self) -> None:
        """Raises AssertionError if any count, link or state is wrong. O(blocks + cached tokens): for tests."""
        self._pool.check_invariants()
        self._tree.check_invariants()
        nodes = list(self._tree.nodes())
        refs: Counter[RadixNode] = Counter()
        for path in self._locks.values():
            assert all(node.is_ready for node in path), "a lock holds a pending block"
            refs.update(path)
        used = [node.block_id for node in nodes]
        num_pending = 0
        for request_id, holding in self._holdings.items():
            num_pending += self._check_holding(request_id, holding)
            refs.update(holding.path)
            used += [block_id for index, block_id in enumerate(holding.block_ids) if holding.is_private(index)]
        for node in nodes:
            assert node.num_refs == refs.pop(node, 0), f"block {node.block_id}: wrong reference count"
        assert not refs, "a node is held that is not in the tree"
        assert num_pending == sum(not node.is_ready for node in nodes), "a pending block has no living owner"
        assert len(used) == len(set(used)), "a block has two owners"
        assert not any(self._pool.is_free(block_id) for block_id in used), "a block is free and in use"
        assert self.num_free_blocks + len(used) == self.num_blocks, "a block was lost"

    def _check_holding(self, request_id: str, holding: Holding) -> int:
        """Checks one request; returns how many pending nodes it owns."""
        parent: RadixNode | None = None
        num_pending = 0
        for index, node in enumerate(holding.path):
            assert self._tree.child(parent, holding.salt, node.key) is node, f"{request_id!r} holds a broken path"
            assert node.owner in (None, request_id), f"{request_id!r} holds a block that {node.owner!r} computes"
            if node.owner is not None:
                num_pending += 1
                assert index >= holding.num_ready_blocks, f"{request_id!r} committed a block that is pending"
                assert node.num_refs == 1, f"pending block {node.block_id} is shared"
                assert node.block_id == holding.block_ids[index], f"pending block {node.block_id} is not its owner's"
            parent = node
        assert len(holding.path) <= len(holding.block_ids), f"{request_id!r} holds more nodes than blocks"
        if self._caching:
            num_full = holding.num_computed_tokens // self.block_size
            assert holding.num_ready_blocks == num_full <= len(holding.path), f"{request_id!r}: blocks not published"
        assert holding.capacity == len(holding.block_ids) * self.block_size, f"{request_id!r}: wrong capacity"
        publish_at = (holding.num_ready_blocks + 1) * self.block_size if self._caching else NEVER
        assert holding.publish_at == publish_at, f"{request_id!r}: would publish a block too early or too late"
        if holding.block_ids_tuple is not None:
            assert holding.block_ids_tuple == tuple(holding.block_ids), f"{request_id!r}: outdated tuple of block ids"
        return num_pending

    def _ceil_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _match(
        self, token_ids: Sequence[int], salt: str | None, max_blocks: int
    ) -> tuple[list[RadixNode], list[RadixNode]]:
        """The ready nodes for `token_ids`, and the pending ones directly behind them."""
        ready = self._tree.find(token_ids, salt, max_blocks)
        num_ready = len(ready)
        while num_ready and not ready[num_ready - 1].is_ready:
            num_ready -= 1
        pending = ready[num_ready:]
        del ready[num_ready:]
        return ready, pending

    def _evict_until_free(self, count: int) -> None:
        while self._pool.num_free < count:
            self._pool.put(self._tree.evict())
            self.num_evicted_blocks += 1

    def _register_pending(self, request_id: str, holding: Holding, token_ids: Sequence[int]) -> None:
        """Adds a pending node for each whole block of the prompt that is to be computed."""
        size = self.block_size
        for index in range(len(holding.path), len(token_ids) // size):
            key = tuple(token_ids[index * size : (index + 1) * size])
            if self._tree.child(holding.last_node, holding.salt, key) is not None:
                # Only the last block of a prompt of whole blocks can be there: it is computed again for its last
                # token. Ours stays private unless that one is gone or still pending when ours is done.
                return
            node = self._tree.insert(holding.last_node, holding.salt, key, holding.block_ids[index], request_id)
            holding.path.append(node)

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
            self._tree.acquire(found)
        holding.path.append(found)
