"""Where the KV of a block is besides the device: copies down, loads up, and what is worth either.

    device pool                blocks: free, held, cached, or *leaving* (evicted, but still being copied down)
      | ^   link of tier 0, one copy at a time each way
    tier 0 (host)              slots: free, arriving, ready, or locked by whoever reads them
      | ^   link of tier 1; loads from tier 1 go straight to the device
    tier 1 (CXL or disk) ...

A block that has to leave and is not below yet is copied first, and the admission that needs its place waits until that
is done; a sequence that grows does not wait, so then the block is dropped. Two modes of writing back say when copies
are made besides. `incremental`: a prefix that nobody uses any more is copied down in the background while it stays on
the device, so that evicting it later is free. `on_evict`: not before it has to leave, which moves fewer bytes.

Either way a run of blocks goes down only if loading it back is predicted to be cheaper than computing it again. Loads
are cut into transfers of a few blocks, and the most urgent load goes next at each cut: so an urgent one preempts the
others (as in ScaleSim). A load that fails is a miss.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

from agentserve.config import TieringConfig
from agentserve.core.adapters import TransferOrder
from agentserve.core.memory.copies import Copy
from agentserve.core.memory.eviction import EvictionGroup, EvictionOrder
from agentserve.core.memory.load_queue import LoadQueue, LoadTask, Urgency
from agentserve.core.memory.loads import BlockLoads, Load, LoadProgress, Place
from agentserve.core.memory.radix import RadixNode
from agentserve.core.memory.tiers import TierEntry, TierStore, child_id, content_id, root_id
from agentserve.core.memory.write_back import WriteBack
from agentserve.core.stats import TierStats
from agentserve.core.transfers import Tier, TierContents, Transfer, TransferKind, TransferOutput

RecomputeCost: TypeAlias = Callable[[int, int], int]
"""`(start, num_tokens)`: nanoseconds to compute the KV of so many tokens behind `start` others."""


class Residency:
    """The tiers below the device pool and all transfers between them. Belongs to `MemoryManager`.

    To the queue of loads it is the `MemoryModule` of the prefix cache.
    """

    def __init__(
        self,
        config: TieringConfig,
        block_size: int,
        *,
        order: EvictionOrder,
        free_block: Callable[[int], None],
        recompute_ns: RecomputeCost | None,
        queue: LoadQueue,
    ) -> None:
        """Makes empty tiers.

        Args:
            config: the tiers, the nearest one first.
            block_size: tokens in a block.
            order: what blocks are worth, by the eviction policy.
            free_block: gives a block of the device back to its pool.
            recompute_ns: what computing costs; None: a copy is always taken to be cheaper.
            queue: of all loads.
        """
        self.num_queued_tokens: Callable[[], int] = lambda: 0
        """Tokens that the device has to compute anyway, before anything that is decided now."""
        self._config = config
        self._size = block_size
        self._recompute_ns = recompute_ns
        self._tiers = [TierStore(tier) for tier in config.tiers]
        order.on_rekey = self._rekeyed
        self._counts: list[Counter[str]] = [Counter() for _ in self._tiers]
        self.write_back = WriteBack(
            config,
            block_size,
            self._tiers,
            self._counts,
            worth=order.worth,
            free_block=free_block,
            is_worth=self._is_worth,
            is_busy=lambda index: (index, False) in self._flying,
        )
        """What goes down."""
        self._loads = BlockLoads(self._tiers, config.max_transfer_blocks)
        self._queue = queue
        queue.add(self)
        self._flying: dict[tuple[int, bool], tuple[Transfer, list[Copy] | Load]] = {}
        """What each link (tier, goes up) is copying."""
        self._num_transfers = 0

    @property
    def is_busy(self) -> bool:
        """Whether a transfer is under way."""
        return bool(self._flying)

    @property
    def is_freeing(self) -> bool:
        """Whether copies are under way that will free blocks of the device, or let them be evicted."""
        return self.write_back.num_leaving_blocks + self.write_back.num_copying_blocks > 0

    # ---- what is below ----

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """The nearest one first."""
        return tuple(store.tier for store in self._tiers)

    def tiers_with(self, block: bytes) -> list[Tier]:
        """The tiers that have a block ready, by the id of its content."""
        found = ((store.tier, store.find(block)) for store in self._tiers)
        return [tier for tier, entry in found if entry is not None and entry.is_ready]

    def restore(self, contents: TierContents) -> None:
        """Takes in what a tier held before. Must come before any transfer."""
        assert not self._num_transfers, "a tier is restored after it was used"
        next(store for store in self._tiers if store.tier is contents.tier).restore(contents.blocks)

    def find(self, parent: RadixNode | None, salt: str | None, blocks: Iterable[Sequence[int]]) -> list[Place]:
        """Ready blocks behind `parent` (None: the root of `salt`), each in the nearest tier that has it."""
        above = root_id(salt) if parent is None else content_id(parent)
        found = []
        for token_ids in blocks:
            above = child_id(above, token_ids)
            places = ((index, store.find(above)) for index, store in enumerate(self._tiers))
            place = next(((index, e) for index, e in places if e is not None and e.is_ready), None)
            if place is None:
                break
            found.append(place)
        return found

    def worth_loading(self, found: list[Place], start: int, urgency: Urgency) -> list[Place]:
        """The runs of `found`, each in one tier, up to the first that is computed sooner than it is loaded.

        `start`: tokens before them. What is queued for the same link and goes first counts, and on the other side what
        the device has to compute first.
        """
        if not found:
            return found
        backlog = self._loads.backlog(urgency)
        num_before = self.num_queued_tokens() if backlog else 0
        end = 0
        while end < len(found):
            tier, first = found[end][0], end
            while end < len(found) and found[end][0] == tier:
                end += 1
            if not self._is_worth(tier, end - first, start + first * self._size, backlog[tier], num_before):
                return found[:first]
        return found

    def hurry(self, request_id: str, urgency: Urgency) -> None:
        """Somebody waits for a load from now on."""
        self._loads.hurry(request_id, urgency)

    def is_loading(self, request_id: str) -> bool:
        """Whether something comes for the request."""
        return request_id in self._loads

    def begin_load(self, request_id: str, places: Sequence[Place], block_ids: Sequence[int], urgency: Urgency) -> None:
        """Queues the copies into `block_ids`, which belong to the request until the load is over."""
        self._loads.begin(request_id, places, block_ids, urgency)

    def abort_load(self, request_id: str) -> bool:
        """Cuts a load short. True if it is over now; False if it will be when the transfer under way is done."""
        return self._loads.abort(request_id)

    # ---- transfers ----

    def start(self) -> list[TransferOrder]:
        """What the executor is to copy now: at most one transfer for each link and direction.

        Loads of other modules that share a link are among them.
        """
        started: list[TransferOrder] = []
        for index, store in enumerate(self._tiers):
            for transfer in (self._queue.start(store.tier), self._start_store(index)):
                if transfer is not None:
                    started.append(transfer)
        return started

    def next_load(self, link: Tier) -> LoadTask | None:
        """See `MemoryModule.next_load`."""
        load = self._loads.next_on(self.tiers.index(link)) if self._loads else None
        return None if load is None else LoadTask(load.request_id, load.order[0])

    def load(self, link: Tier, name: str) -> Transfer:
        """See `MemoryModule.load`."""
        load = self._loads.start_piece(name)
        ids = [(entry.slot, block_id, entry) for _, entry, block_id in load.flying]
        return self._fly(self.tiers.index(link), link, ids, load)

    def preempted(self, name: str) -> None:
        """See `MemoryModule.preempted`. What has come stays, and so do the blocks for the rest."""

    def finish(self, output: TransferOutput) -> LoadProgress | None:
        """Books a transfer that is done; says so if a request waits for it."""
        link = next((key for key, (t, _) in self._flying.items() if t.transfer_id == output.transfer_id), None)
        assert link is not None, f"unexpected {output}"
        transfer, cargo = self._flying.pop(link)
        counts = self._counts[link[0]]
        if output.error is not None:
            counts["failed"] += 1
        else:
            counts["loaded_bytes" if link[1] else "stored_bytes"] += transfer.num_bytes
            counts["loads" if link[1] else "stores"] += 1
        if isinstance(cargo, Load):
            progress = self._loads.finish(cargo, ok=output.error is None)
            self._queue.finished(transfer.source, is_over=progress.is_over)
            counts["hit_blocks"] += progress.num_blocks
            return progress
        for copy in cargo:
            self.write_back.stored(link[0], copy, ok=output.error is None)
        return None

    def stats(self) -> tuple[TierStats, ...]:
        """The tiers as they are now, the nearest one first."""
        return tuple(s.stats(counts, self._size) for s, counts in zip(self._tiers, self._counts, strict=True))

    def num_used_blocks(self) -> tuple[int, ...]:
        """Blocks in each tier, those included that are being written."""
        return tuple(store.num_used_blocks for store in self._tiers)

    def check_invariants(self) -> None:
        """Raises AssertionError if a block is in two places or in none, or a lock belongs to no transfer."""
        locks = self._loads.locks()
        copies = [copy for _, cargo in self._flying.values() if isinstance(cargo, list) for copy in cargo]
        self.write_back.check_invariants(copies)
        copies += self.write_back.urgent_copies()
        locks.update((c.origin[0], c.origin[1].content_id) for c in copies if c.origin is not None)
        for index, store in enumerate(self._tiers):
            store.check_invariants()
            arriving = {c.content_id for c in copies if c.entry is not None and store.find(c.content_id) is c.entry}
            for entry in store.entries():
                num_locks = locks.pop((index, entry.content_id), 0)
                assert entry.num_refs == num_locks, f"{store.tier}: a block has {entry.num_refs} locks, not {num_locks}"
                assert entry.is_ready != (entry.content_id in arriving), f"{store.tier}: a block arrives from nowhere"
        assert not locks, "a transfer reads a block that is gone"

    # ---- parts of these ----

    def _rekeyed(self, group: EvictionGroup) -> None:
        for store in self._tiers:
            store.rekeyed(group)

    def _start_store(self, index: int) -> Transfer | None:
        if (index, False) in self._flying:
            return None
        copies = self.write_back.take(index)
        if not copies:
            return None
        origin = copies[0].origin
        source = Tier.DEVICE if origin is None else self._tiers[origin[0]].tier
        ids = [(copy.source_id, copy.entry.slot, copy.entry) for copy in copies if copy.entry is not None]
        return self._fly(index, source, ids, copies)

    def _fly(
        self, index: int, source: Tier, ids: list[tuple[int, int, TierEntry]], cargo: list[Copy] | Load
    ) -> Transfer:
        """Puts a transfer on the link of a tier. `ids`: sources and destinations, and the tier's entries."""
        is_load = isinstance(cargo, Load)
        transfer = Transfer(
            transfer_id=self._num_transfers,
            kind=TransferKind.LOAD if is_load else TransferKind.STORE,
            source=source,
            destination=Tier.DEVICE if is_load else self._tiers[index].tier,
            source_ids=tuple(source_id for source_id, _, _ in ids),
            destination_ids=tuple(destination_id for _, destination_id, _ in ids),
            num_bytes=len(ids) * self._config.block_bytes,
            content_ids=tuple(entry.content_id for _, _, entry in ids),
            parent_ids=tuple(entry.parent_id for _, _, entry in ids),
        )
        self._num_transfers += 1
        self._flying[index, is_load] = (transfer, cargo)
        return transfer

    def _is_worth(self, tier: int, num_blocks: int, start: int, num_queued: int = 0, num_before: int = 0) -> bool:
        """Whether loading a run of blocks, behind others on the same link, is predicted to beat computing it behind
        `num_before` other tokens."""
        if self._recompute_ns is None:
            return True
        load_ns = self._config.load_ns(tier, num_queued + num_blocks)
        return load_ns < self._recompute_ns(start, num_before + num_blocks * self._size)
