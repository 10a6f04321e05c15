"""A state machine over a memory with lower tiers: it plays the executor, byte by byte, and copies may fail.

Every place of every block knows what was written there. A copy that fails leaves rubbish. So whatever a request or a
tier believes to have is looked up in the bytes after each step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from agentserve.config import WRITE_BACKS, TierConfig, TieringConfig
from agentserve.core.memory.manager import AllocationOutcome, MemoryManager, PrefixLock
from agentserve.core.memory.tiers import child_id, root_id
from agentserve.core.transfers import Tier, Transfer, TransferKind, TransferOutput

TOKEN = st.integers(0, 1)
PROMPT = st.lists(TOKEN, min_size=1, max_size=11)
SALT = st.sampled_from([None, None, None, "salt"])
COSTS = [None, None, lambda start, num_tokens: 0, lambda start, num_tokens: 10**12 if num_tokens > 2 else 0]
"""A load is always worth it; never; only of several blocks."""

Bytes: TypeAlias = list[tuple[str | None, tuple[int, ...]] | str]
"""For each place of a block: salt and all tokens up to here, which is what KV depends on."""


@dataclass
class Running:
    salt: str | None
    token_ids: list[int]
    num_computed: int
    is_loading: bool = False
    locked: list[int] = field(default_factory=list)


class TierMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(3, 9),
        slots=st.lists(st.integers(1, 6), min_size=1, max_size=2),
        write_back=st.sampled_from(WRITE_BACKS),
        most=st.sampled_from([1, 2, 64]),
        cost=st.sampled_from(COSTS),
        size=st.sampled_from([1, 2]),
        names=st.sampled_from([("host", "cxl"), ("host", "disk"), ("disk",)]),
    )
    def start(self, num_blocks, slots, write_back, most, cost, size, names) -> None:
        tiers = tuple(TierConfig(name, count, 1e9, 1e9, 10) for name, count in zip(names, slots, strict=False))
        tiering = TieringConfig(100, tiers, write_back, most)
        self.size = size
        self.memory = MemoryManager(num_blocks, size, tiering=tiering, recompute_ns=cost)
        self.bytes: dict[Tier, list[Bytes]] = {Tier.DEVICE: [["never written"] * size for _ in range(num_blocks)]}
        self.bytes |= {Tier(t.name): [["never written"] * size for _ in range(t.num_blocks)] for t in tiers}
        self.most = most
        self.requests: dict[str, Running] = {}
        self.locks: dict[int, tuple[PrefixLock, list[int]]] = {}
        self.flying: list[Transfer] = []
        self.sources: dict[int, list[Bytes]] = {}
        self.seen: list[tuple[list[int], str | None]] = []
        self.num_names = 0

    # ---- requests ----

    @rule(prompts=st.lists(PROMPT, min_size=1, max_size=3), salt=SALT)
    def serve(self, prompts: list[list[int]], salt: str | None) -> None:
        """Short requests from admission to end, as far as they need no copies."""
        for prompt in prompts:
            name = self._admit(prompt, salt)
            if name is not None and not self.requests[name].is_loading:
                self._compute(name, len(prompt))
                self._free(name)

    @rule(prompt=PROMPT, salt=SALT)
    def admit(self, prompt: list[int], salt: str | None) -> None:
        self._admit(prompt, salt)

    @precondition(lambda self: self.seen)
    @rule(data=st.data(), more=st.lists(TOKEN, max_size=3))
    def admit_again(self, data: st.DataObject, more: list[int]) -> None:
        token_ids, salt = data.draw(st.sampled_from(self.seen))
        self._admit([*token_ids, *more], salt)

    def _admit(self, prompt: list[int], salt: str | None) -> str | None:
        memory = self.memory
        if -(-len(prompt) // self.size) > memory.num_blocks:
            return None
        self.num_names += 1
        name = f"r{self.num_names}"
        allocation = memory.allocate(name, prompt, salt=salt)
        self._start_transfers()
        if allocation.outcome is not AllocationOutcome.ALLOCATED:
            assert not memory.holds(name)
            return None
        assert allocation.num_cached_tokens + allocation.num_loading_tokens < len(prompt)
        self.seen.append((list(prompt), salt))
        is_loading = allocation.num_loading_tokens > 0
        self.requests[name] = Running(salt, list(prompt), allocation.num_cached_tokens, is_loading)
        return name

    def _ready(self) -> list[str]:
        return sorted(name for name, request in self.requests.items() if not request.is_loading)

    @precondition(lambda self: self._ready())
    @rule(data=st.data(), most=st.integers(1, 12))
    def compute(self, data: st.DataObject, most: int) -> None:
        name = data.draw(st.sampled_from(self._ready()))
        request = self.requests[name]
        self._compute(name, min(len(request.token_ids), request.num_computed + most))

    def _compute(self, name: str, num_computed: int) -> None:
        """What an executor does: it reads all that came before and writes the places of the new tokens."""
        request = self.requests[name]
        self._check_readable(name)
        block_ids = self.memory.block_ids(name)
        for position in range(request.num_computed, num_computed):
            content = (request.salt, tuple(request.token_ids[: position + 1]))
            self.bytes[Tier.DEVICE][block_ids[position // self.size]][position % self.size] = content
        self.memory.commit(name, request.token_ids, num_computed)
        request.num_computed = num_computed
        self._start_transfers()

    @precondition(lambda self: self._ready())
    @rule(data=st.data(), output=st.lists(TOKEN, min_size=1, max_size=4))
    def decode(self, data: st.DataObject, output: list[int]) -> None:
        name = data.draw(st.sampled_from(self._ready()))
        request = self.requests[name]
        for token in output:
            self._compute(name, len(request.token_ids))
            if not self.memory.extend(name, len(request.token_ids) + 1):
                break
            request.token_ids.append(token)

    @precondition(lambda self: self._ready())
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self._free(data.draw(st.sampled_from(self._ready())))

    def _free(self, name: str) -> None:
        request = self.requests.pop(name)
        self.seen.append((request.token_ids, request.salt))
        self.memory.free(name)
        self._start_transfers()

    @precondition(lambda self: len(self._ready()) < len(self.requests))
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        """A cancel while blocks are on their way."""
        name = data.draw(st.sampled_from(sorted(set(self.requests) - set(self._ready()))))
        is_flying = any(
            t.kind is TransferKind.LOAD and set(t.destination_ids) & set(self.memory.block_ids(name))
            for t in self.flying
        )
        assert self.memory.abort_load(name) is not is_flying
        if not is_flying:
            self.requests[name].is_loading = False

    @precondition(lambda self: self.seen)
    @rule(data=st.data())
    def lock(self, data: st.DataObject) -> None:
        token_ids, salt = data.draw(st.sampled_from(self.seen))
        lock = self.memory.lock(token_ids, salt=salt)
        block_ids = [node.block_id for node in self.memory._locks[lock.lock_id]]
        self.locks[lock.lock_id] = (lock, block_ids)

    @precondition(lambda self: self.locks)
    @rule(data=st.data())
    def unlock(self, data: st.DataObject) -> None:
        self.memory.unlock(self.locks.pop(data.draw(st.sampled_from(sorted(self.locks))))[0])

    # ---- copies ----

    @rule()
    def flush(self) -> None:
        """As at the end of a daemon, but it goes on."""
        self.memory.flush()
        self._start_transfers()

    def _start_transfers(self) -> None:
        for transfer in self.memory.start_transfers():
            assert all(transfer.link != other.link for other in self.flying), "two copies at once on one link"
            assert 1 <= len(transfer.source_ids) == len(transfer.destination_ids) <= self.most
            assert transfer.num_bytes == 100 * len(transfer.source_ids)
            self.flying.append(transfer)
            self.sources[transfer.transfer_id] = self._read(transfer)

    def _read(self, transfer: Transfer) -> list[Bytes]:
        return [list(self.bytes[transfer.source][index]) for index in transfer.source_ids]

    @precondition(lambda self: self.flying)
    @rule(data=st.data(), fails=st.sampled_from([False, False, False, True]))
    def complete(self, data: st.DataObject, fails: bool) -> None:
        self._complete(data.draw(st.integers(0, len(self.flying) - 1)), fails)

    def _complete(self, index: int, fails: bool) -> None:
        transfer = self.flying.pop(index)
        content = self._read(transfer)
        assert content == self.sources.pop(transfer.transfer_id), "the source changed while it was copied"
        for place, copied in zip(transfer.destination_ids, content, strict=True):
            self.bytes[transfer.destination][place] = ["rubbish"] * self.size if fails else copied
        progress = self.memory.finish_transfer(TransferOutput(transfer.transfer_id, 0, 1, "broken" if fails else None))
        assert (progress is None) is (transfer.kind is TransferKind.STORE)
        if progress is not None:
            request = self.requests[progress.request_id]
            assert progress.num_blocks == (0 if fails else len(transfer.source_ids))
            request.num_computed += progress.num_blocks * self.size
            self.memory.commit(progress.request_id, request.token_ids, request.num_computed)
            request.is_loading = not progress.is_over
        self._start_transfers()

    # ---- after every step ----

    def _check_readable(self, name: str) -> None:
        request, block_ids = self.requests[name], self.memory.block_ids(name)
        for position in range(request.num_computed):
            found = self.bytes[Tier.DEVICE][block_ids[position // self.size]][position % self.size]
            assert found == (request.salt, tuple(request.token_ids[: position + 1])), f"{name} lost {position}"

    @invariant()
    def everything_is_in_its_place(self) -> None:
        if not hasattr(self, "memory"):
            return
        memory = self.memory
        memory.check_invariants()
        for name in self.requests:
            self._check_readable(name)
        for lock_id, (_, block_ids) in self.locks.items():
            assert [node.block_id for node in memory._locks[lock_id]] == block_ids, "a locked block moved"
        for node in memory._tree.nodes():
            if node.is_ready:
                prefix, above = [], node
                while above is not None and above.parent is not None:
                    prefix, above = [*above.key, *prefix], above.parent
                self._check_block(self.bytes[Tier.DEVICE][node.block_id], node.salt, prefix)
        for store in memory.residency._tiers:
            for entry in store.entries():
                if entry.is_ready:
                    salt, prefix = self.bytes[store.tier][entry.slot][-1]
                    self._check_block(self.bytes[store.tier][entry.slot], salt, list(prefix))
                    assert self._id(salt, prefix) == entry.content_id

    def _check_block(self, content: Bytes, salt: str | None, prefix: list[int]) -> None:
        ends = range(len(prefix) - self.size + 1, len(prefix) + 1)
        assert content == [(salt, tuple(prefix[:end])) for end in ends]

    def _id(self, salt: str | None, prefix: tuple[int, ...]) -> bytes:
        found = root_id(salt)
        for start in range(0, len(prefix), self.size):
            found = child_id(found, prefix[start : start + self.size])
        return found

    def teardown(self) -> None:
        """All copies come to an end, and then one request can have every block of the device."""
        if not hasattr(self, "memory"):
            return
        for _ in range(1000):
            if not self.flying:
                break
            self._complete(0, fails=False)
        assert not self.flying, "copies go on for ever"
        assert not any(request.is_loading for request in self.requests.values()), "a load was forgotten"
        for name in list(self.requests):
            self._free(name)
        for lock, _ in self.locks.values():
            self.memory.unlock(lock)
        everything = [7] * (self.memory.num_blocks * self.size)
        for _ in range(1000):
            if self.memory.allocate("all", everything).outcome is AllocationOutcome.ALLOCATED:
                break
            self._start_transfers()
            assert self.flying, "memory is short, but nothing is being copied"
            self._complete(0, fails=False)
        assert sorted(self.memory.block_ids("all")) == list(range(self.memory.num_blocks))
        self.memory.check_invariants()


TierMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40)
test_nothing_is_lost_between_tiers = TierMachine.TestCase
