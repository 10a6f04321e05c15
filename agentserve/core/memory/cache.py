"""What is on the device and below it: the pool of blocks, the tree of cached prefixes, the tiers.

Who uses any of it is the business of `MemoryManager`, which builds on this.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from agentserve.config import TieringConfig
from agentserve.core.adapters import TransferOrder
from agentserve.core.memory.answers import PrefixLock, PrefixMatch, Whereabouts
from agentserve.core.memory.block import BlockPool
from agentserve.core.memory.eviction import EvictionOrder, Key, SessionBlocks
from agentserve.core.memory.load_queue import LoadQueue, Urgency
from agentserve.core.memory.loads import LoadProgress
from agentserve.core.memory.locate import locate
from agentserve.core.memory.modules import AdapterModule
from agentserve.core.memory.radix import EvictionKey, RadixNode, RadixTree, lru_key
from agentserve.core.memory.residency import RecomputeCost, Residency
from agentserve.core.memory.sharing import UserGroups
from agentserve.core.memory.trails import Trail, Trails
from agentserve.core.transfers import TransferOutput
from agentserve.errors import ConfigError


class BlockCache:
    """Free and cached blocks, locks on cached ones, and the order in which they go."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        eviction_key: EvictionKey = lru_key,
        tiering: TieringConfig | None = None,
        recompute_ns: RecomputeCost | None = None,
    ) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ConfigError(f"{num_blocks} KV blocks of {block_size} tokens: both numbers must be positive")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_evicted_blocks = 0
        """Blocks whose content was dropped to make room, since the start."""
        self.num_dropped_blocks = 0
        """Blocks that `drop` freed, though nobody needed the room."""
        self.max_pinned_blocks = num_blocks
        """Pinned blocks that admissions leave alone at most."""
        self._pool = BlockPool(num_blocks)
        self._tree = RadixTree(block_size, eviction_key)
        self._trails = Trails(block_size)
        self.loads = LoadQueue()
        """What is to be loaded onto the device, of all kinds of memory."""
        self.residency: Residency | None = None
        """The tiers below the device, if there are any."""
        self.adapters: AdapterModule | None = None
        """The LoRA adapters, if there are any."""
        if tiering is not None:
            self.residency = Residency(
                tiering,
                block_size,
                order=self._tree.order,
                free_block=self._pool.put,
                recompute_ns=recompute_ns,
                queue=self.loads,
            )
        self.losers: dict[SessionBlocks, None] | None = None
        """Sessions that have lost blocks since somebody looked, in order; None: nobody wants to know."""
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
        """Blocks that an allocation could get at once: free or evictable."""
        num_available = self._pool.num_free + self._tree.num_cached
        return (
            num_available
            if self.residency is None
            else max(0, num_available - self.residency.write_back.num_copying_blocks)
        )

    @property
    def _num_leaving_blocks(self) -> int:
        """Blocks that will be free when they have been copied down."""
        return 0 if self.residency is None else self.residency.write_back.num_leaving_blocks

    @property
    def _num_obtainable_blocks(self) -> int:
        """Blocks that an admission could get: at once, or when copies to a lower tier are done."""
        return self._pool.num_free + self._tree.num_cached + self._num_leaving_blocks

    @property
    def num_pinned_blocks(self) -> int:
        """Blocks that nobody holds, and that stay while anything else can be evicted."""
        return self._tree.order.num_pinned

    @property
    def last_access(self) -> int:
        """Logical time: `RadixNode.last_access` of what was used last."""
        return self._tree.last_access

    @property
    def order(self) -> EvictionOrder:
        """What a policy decides about: which blocks go first."""
        return self._tree.order

    def match_prefix(self, token_ids: Sequence[int], *, salt: str | None = None) -> PrefixMatch:
        """What is cached of `token_ids`. O(matched tokens); changes nothing, the order of eviction included."""
        ready, pending, _ = self._match(token_ids, salt, (len(token_ids) - 1) // self.block_size)
        return PrefixMatch(
            num_tokens=len(ready) * self.block_size,
            num_pending_tokens=len(pending) * self.block_size,
            pending_owner=pending[0].owner if pending else None,
            last=ready[-1] if ready else None,
        )

    def lock(self, token_ids: Sequence[int], *, salt: str | None = None) -> PrefixLock:
        """Keeps the ready whole blocks of `token_ids` from eviction until `unlock`. There may be none."""
        path, _, _ = self._match(token_ids, salt, len(token_ids) // self.block_size)
        if path:
            self._tree.acquire(path[-1])
        self._last_lock_id += 1
        self._locks[self._last_lock_id] = path
        return PrefixLock(self._last_lock_id, len(path) * self.block_size)

    def unlock(self, lock: PrefixLock) -> None:
        """Ends a lock. Raises ValueError if it has ended already."""
        path = self._locks.pop(lock.lock_id, None)
        if path is None:
            raise ValueError(f"lock {lock.lock_id} is not held")
        self._tree.touch(path)
        if path:
            self._tree.release(path[-1])

    def session_of(self, token_ids: Sequence[int], *, salt: str | None = None) -> SessionBlocks | None:
        """Whose history the prompt goes on with: who used the last cached block of it last. None: nobody known."""
        ready, _, _ = self._match(token_ids, salt, (len(token_ids) - 1) // self.block_size)
        node = ready[-1] if ready else None
        if node is None or (node.group is not None and node.group.is_shared):
            return None
        return node.user

    # ---- what policies decide ----

    def drop(self, session: SessionBlocks, max_blocks: int | None = None) -> int:
        """Frees the private blocks of a session that nobody holds, at most so many; returns how many."""
        nodes = self._tree.evict_group(session.group, max_blocks)
        self._give_up(nodes, may_wait=False)
        self.num_dropped_blocks += len(nodes)
        return len(nodes)

    def supersede(self, session: SessionBlocks, num_tokens: int) -> int:
        """Lets the private blocks behind the first `num_tokens` tokens of a session's last call go first; how many."""
        return self._tree.supersede(session, -(-num_tokens // self.block_size))

    def demote(self, session: SessionBlocks) -> int:
        """Takes the private blocks of a session that nobody holds off the device; returns how many.

        What is worth it and is not in a lower tier yet is copied there first; without tiers this is `drop`.
        """
        nodes = self._tree.evict_group(session.group)
        self._give_up(nodes, may_wait=True)
        return len(nodes)

    def use_policy(self, block_key: EvictionKey, *, protects_anchors: bool, max_pinned_blocks: int) -> None:
        """Puts a policy in charge of what goes first. Only while nothing is cached."""
        self.order.block_key = block_key
        self.order.compare_with_lru()
        self._tree.protects_anchors = protects_anchors
        self.max_pinned_blocks = max_pinned_blocks

    def rate_by_users(self) -> None:
        """What several sessions use is worth what it is to who values it most. Only while nothing is cached."""
        self._tree.sharing = UserGroups(self.order)
        if self.residency is not None:
            self.losers = {}

    def rekey(self, session: SessionBlocks, key: Key, *, is_pinned: bool = False) -> None:
        """Says what the private blocks of a session are worth."""
        self.order.rekey(session.group, key, is_pinned=is_pinned)
        if self._tree.sharing is not None:
            self._tree.sharing.rekeyed(session)

    # ---- lower tiers ----

    def start_transfers(self) -> list[TransferOrder]:
        """The copies that the executor is to make now."""
        started = [] if self.residency is None else self.residency.start()
        if self.adapters is not None:
            started += self.adapters.start()
        return started

    def locate(self, sequences: Iterable[tuple[Sequence[int], str | None]]) -> Whereabouts:
        """Where the KV of sequences is: token ids and the salt of each. O(their blocks); changes nothing."""
        return locate(self._tree, self.residency, self.block_size, sequences)

    def flush(self) -> None:
        """Begins to copy what is cached to the tier that outlives the engine, if there is one."""
        if self.residency is not None:
            self.residency.write_back.flush(node for node in self._tree.nodes() if node.is_ready)

    def abort_load(self, request_id: str) -> bool:
        """Cuts the load of a request short. True if it is over; False if it will be when its next transfer is done."""
        assert self.residency is not None, "there are no tiers"
        return self.residency.abort_load(request_id)

    def finish_transfer(self, output: TransferOutput) -> LoadProgress | None:
        """Books a copy that is done. If a request waits for it: what came of it, to be committed by the caller.

        After the last one the request runs like any other. What did not come it has to compute.
        """
        assert self.residency is not None, "there are no tiers"
        return self.residency.finish(output)

    def loadable(
        self, token_ids: Sequence[int], *, salt: str | None = None, urgency: Urgency
    ) -> tuple[int, int] | None:
        """How many blocks of `token_ids` are ready, and how many behind them are loaded sooner than computed.

        None if there are none of the latter, or if somebody computes or loads them already.
        """
        path, pending, _ = self._match(token_ids, salt, len(token_ids) // self.block_size)
        if self.residency is None or pending:
            return None
        size, first = self.block_size, len(path)
        blocks = (token_ids[start : start + size] for start in range(first * size, len(token_ids), size))
        found = self.residency.find(path[-1] if path else None, salt, blocks)
        found = self.residency.worth_loading(found, first * size, urgency)
        return (first, len(found)) if found else None

    def make_room_before(self, count: int, key: Key, *, counts_use: bool = False) -> int:
        """Evicts what is worth less than `key` until `count` blocks are free, or will be; how many are free now.

        `counts_use`: among what is worth the same by its group, the block's own worth decides.
        """
        while self._tree.num_cached and self._pool.num_free + self._num_leaving_blocks < count:
            first = self.order.first_worth() if counts_use else self.order.first_key()
            if first is None or first[: len(key)] >= key:
                break
            self._give_up([self._tree.evict_leaf()], may_wait=True)
        return self._pool.num_free

    # ---- parts of these ----

    def _ceil_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _match(
        self, token_ids: Sequence[int], salt: str | None, max_blocks: int
    ) -> tuple[list[RadixNode], list[RadixNode], Trail | None]:
        """The ready nodes for `token_ids`, the pending ones directly behind them, and the trail that led there."""
        trail = self._trails.find(token_ids, salt, max_blocks)
        ready = self._tree.find(token_ids, salt, max_blocks, () if trail is None else trail.path)
        num_ready = len(ready)
        while num_ready and not ready[num_ready - 1].is_ready:
            num_ready -= 1
        pending = ready[num_ready:]
        del ready[num_ready:]
        return ready, pending, trail

    def _make_room(self, count: int, *, may_wait: bool) -> bool:
        """Evicts until `count` blocks are free or will be when they have been copied; whether they are free now.

        `may_wait`: blocks may be copied to a lower tier first. Otherwise what is not there is dropped.
        """
        while self._tree.num_cached:
            missing = count - self._pool.num_free
            if may_wait and self.residency is not None:
                missing -= self.residency.write_back.num_leaving_blocks
            if missing <= 0:
                break
            self._give_up([self._tree.evict_leaf() for _ in range(min(missing, self._tree.num_cached))], may_wait)
        return self._pool.num_free >= count

    def _give_up(self, nodes: Sequence[RadixNode], may_wait: bool) -> None:
        """Frees the blocks of nodes that have left the tree, at once or when they have been copied."""
        self.num_evicted_blocks += len(nodes)
        if self.losers is not None:
            self.losers.update((node.user, None) for node in nodes if node.user is not None)
        if self.residency is not None:
            self.residency.write_back.evicted(nodes, may_wait=may_wait)
            return
        put = self._pool.put
        for node in nodes:
            put(node.block_id)
