"""The one door to KV memory: who holds which blocks, and what is cached."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from agentserve.core.memory.block import BlockPool
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


class _Holding:
    """The blocks of one request.

        block_ids  b0 b1 b2 b3 b4      one for every block of tokens, computed or not
        path       n0 n1 n2            the nodes it holds, from the root down

    Block *i* is private unless `path[i]` exists and says the same block id. (It says another one if someone else
    published the same tokens first.) Nodes before `num_ready_blocks` are ready.
    """

    __slots__ = ("block_ids", "block_ids_tuple", "num_computed_tokens", "num_ready_blocks", "path", "salt")

    def __init__(self, salt: str | None, path: list[RadixNode], num_cached_tokens: int) -> None:
        self.salt = salt
        self.path = path
        self.block_ids = [node.block_id for node in path]
        self.block_ids_tuple: tuple[int, ...] | None = None
        self.num_ready_blocks = len(path)
        self.num_computed_tokens = num_cached_tokens

    @property
    def last_node(self) -> RadixNode | None:
        return self.path[-1] if self.path else None

    def is_private(self, index: int) -> bool:
        return index >= len(self.path) or self.path[index].block_id != self.block_ids[index]


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
        self._holdings: dict[str, _Holding] = {}
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
        holding = _Holding(salt, path, num_cached_tokens)
        holding.block_ids += self._pool.take(num_new)
        self._holdings[request_id] = holding
        if self._caching:
            self._register_pending(request_id, holding, token_ids)
        return Allocation(AllocationOutcome.ALLOCATED, num_cached_tokens=num_cached_tokens)

    def extend(self, request_id: str, num_tokens: int) -> bool:
        """Makes room for `num_tokens` tokens in total. False, and nothing changed, if there are not enough blocks."""
        block_ids = self._holding(request_id).block_ids
        num_new = self._ceil_blocks(num_tokens) - len(block_ids)
        if num_new <= 0:
            return True
        if self.num_available_blocks < num_new:
            return False
        self._evict_until_free(num_new)
        for _ in range(num_new):
            block_ids.append(self._pool.take_after(block_ids[-1]))
        self._holdings[request_id].block_ids_tuple = None
        return True

    def commit(self, request_id: str, token_ids: Sequence[int], num_computed_tokens: int) -> None:
        """Says that the KV of `token_ids[:num_computed_tokens]` is valid; blocks that are full now become cached.

        `token_ids` starts with the tokens of the admission and may be longer than `num_computed_tokens`. Takes
        O(newly filled blocks), so O(1) for most decode steps.

        Raises ValueError if the count falls, exceeds `token_ids` or the blocks, or if tokens differ from the admitted
        ones.
        """
        holding = self._holding(request_id)
        limit = min(len(token_ids), len(holding.block_ids) * self.block_size)
        if not holding.num_computed_tokens <= num_computed_tokens <= limit:
            raise ValueError(
                f"request {request_id!r}: {num_computed_tokens} computed tokens are not between "
                f"{holding.num_computed_tokens} (before) and {limit} (tokens and blocks there are)"
            )
        size = self.block_size
        num_full = num_computed_tokens // size
        if self._caching and num_full > holding.num_ready_blocks:
            first = holding.num_ready_blocks
            keys = [tuple(token_ids[start : start + size]) for start in range(first * size, num_full * size, size)]
            if any(node.key != key for node, key in zip(holding.path[first:], keys, strict=False)):
                raise ValueError(f"request {request_id!r}: the tokens differ from those that were admitted")
            for index, key in enumerate(keys, first):
                self._publish(request_id, holding, index, key)
            holding.num_ready_blocks = num_full
        holding.num_computed_tokens = num_computed_tokens

    def block_ids(self, request_id: str) -> tuple[int, ...]:
        """The blocks of a request in the order of its tokens. The tuple is kept until the blocks change."""
        holding = self._holding(request_id)
        if holding.block_ids_tuple is None:
            holding.block_ids_tuple = tuple(holding.block_ids)
        return holding.block_ids_tuple

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
        holding = self._holding(request_id)
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

    def _check_holding(self, request_id: str, holding: _Holding) -> int:
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
        if holding.block_ids_tuple is not None:
            assert holding.block_ids_tuple == tuple(holding.block_ids), f"{request_id!r}: outdated tuple of block ids"
        return num_pending

    def _holding(self, request_id: str) -> _Holding:
        holding = self._holdings.get(request_id)
        if holding is None:
            raise ValueError(f"request {request_id!r} holds no blocks")
        return holding

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

    def _register_pending(self, request_id: str, holding: _Holding, token_ids: Sequence[int]) -> None:
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

    def _publish(self, request_id: str, holding: _Holding, index: int, key: tuple[int, ...]) -> None:
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
