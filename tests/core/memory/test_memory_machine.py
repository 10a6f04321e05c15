"""A state machine drives `MemoryManager` and the naive model side by side; all answers and counts must agree."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from agentserve.core.memory.manager import AllocationOutcome, MemoryManager, PrefixLock, PrefixMatch
from tests.core.memory.naive_memory import NaiveMemory, NaiveRequest

# Two tokens, two salts and blocks of two: most prompts meet in the tree, and many are equal.
TOKEN = st.integers(0, 1)
PROMPT = st.lists(TOKEN, min_size=1, max_size=11)
SALT = st.sampled_from([None, None, None, "salt"])


class MemoryMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(3, 14), block_size=st.sampled_from([1, 2, 2, 3]), caching=st.sampled_from([1, 1, 1, 0])
    )
    def start(self, num_blocks: int, block_size: int, caching: int) -> None:
        self.memory = MemoryManager(num_blocks, block_size, enable_prefix_caching=bool(caching))
        self.model = NaiveMemory(num_blocks, block_size, bool(caching))
        self.locks: dict[str, PrefixLock] = {}
        self.seen: list[tuple[list[int], str | None]] = []  # prompts and turns so far
        self.num_names = 0

    # ---- admission ----

    @rule(prompts=st.lists(PROMPT, min_size=1, max_size=4), salt=SALT)
    def serve(self, prompts: list[list[int]], salt: str | None) -> None:
        """Short requests from admission to end: they fill the cache, use it and cause evictions."""
        for prompt in prompts:
            self._admit(prompt, salt, 0)
            name = f"r{self.num_names}"
            if name in self.model.requests:
                self._advance(name, len(prompt))
                self._free(name)

    @rule(prompt=PROMPT, salt=SALT, reserve=st.sampled_from([0, 0, 1, 3]))
    def admit(self, prompt: list[int], salt: str | None, reserve: int) -> None:
        self._admit(prompt, salt, reserve)

    @precondition(lambda self: self.seen)
    @rule(data=st.data(), more=st.lists(TOKEN, max_size=3))
    def admit_again(self, data: st.DataObject, more: list[int]) -> None:
        """The same prompt, the next turn of a session, or a preempted request that comes back."""
        token_ids, salt = data.draw(st.sampled_from(self.seen))
        self._admit([*token_ids, *more], salt, 0)

    @precondition(lambda self: self.model.requests)
    @rule(data=st.data())
    def admit_twin(self, data: st.DataObject) -> None:
        """A prompt that ends with the block which another request computes next: both will compute it."""
        request = self.model.requests[data.draw(st.sampled_from(sorted(self.model.requests)))]
        end = (request.num_computed // self.model.size + 1) * self.model.size
        self._admit(request.token_ids[:end], request.salt, 0)

    def _admit(self, prompt: list[int], salt: str | None, reserve: int) -> None:
        memory, model = self.memory, self.model
        self.num_names += 1
        name = f"r{self.num_names}"
        num_needed = -(-len(prompt) // model.size)
        if num_needed > model.num_blocks:
            with pytest.raises(ValueError, match="blocks; there are"):
                memory.allocate(name, prompt, salt=salt)
            return
        ready, pending = model.match(prompt, salt, (len(prompt) - 1) // model.size)
        owner = model.cache[pending[0]].owner if pending else None
        assert memory.match_prefix(prompt, salt=salt) == PrefixMatch(
            len(ready) * model.size, len(pending) * model.size, owner
        )
        allocation = memory.allocate(name, prompt, salt=salt, reserve_blocks=reserve)
        num_unheld = sum(not model.cache[content].holders for content in ready)
        if pending:
            assert (allocation.outcome, allocation.pending_owner) == (AllocationOutcome.PENDING_PREFIX, owner)
        elif model.num_available() - num_unheld - (num_needed - len(ready)) < reserve:
            assert allocation.outcome is AllocationOutcome.OUT_OF_BLOCKS
        else:
            assert allocation.outcome is AllocationOutcome.ALLOCATED
            assert allocation.num_cached_tokens == len(ready) * model.size < len(prompt)
            num_new = model.admit(name, prompt, salt, ready)
            block_ids = memory.block_ids(name)
            assert [model.cache[content].block_id for content in ready] == list(block_ids[: len(ready)])
            self._check_fresh(block_ids[len(ready) :], num_new)
            model.place(name, NaiveRequest(salt, list(prompt), allocation.num_cached_tokens, block_ids), ready)
            model.check_readable(name)
            self.seen.append((list(prompt), salt))
            return
        assert not memory.holds(name)

    def _check_fresh(self, block_ids: tuple[int, ...], num_new: int) -> None:
        assert len(block_ids) == len(set(block_ids)) == num_new
        assert self.model.free_ids().issuperset(block_ids), "a block was handed out that was in use"

    # ---- progress ----

    @precondition(lambda self: self.model.requests)
    @rule(data=st.data(), most=st.integers(1, 12))
    def compute(self, data: st.DataObject, most: int) -> None:
        """A chunk of any length, up to the whole prompt."""
        name = data.draw(st.sampled_from(sorted(self.model.requests)))
        request = self.model.requests[name]
        self._advance(name, min(len(request.token_ids), request.num_computed + most))

    @precondition(lambda self: self.model.requests)
    @rule(data=st.data(), output=st.lists(TOKEN, min_size=1, max_size=4))
    def decode(self, data: st.DataObject, output: list[int]) -> None:
        """Finishes the prompt, then some output tokens one by one, as long as there is room."""
        name = data.draw(st.sampled_from(sorted(self.model.requests)))
        request = self.model.requests[name]
        for token in output:
            self._advance(name, len(request.token_ids))
            if not self._extend(name, len(request.token_ids) + 1):
                break
            request.token_ids.append(token)
        self._advance(name, len(request.token_ids))

    def _advance(self, name: str, num_computed: int) -> None:
        self.model.compute(name, num_computed)
        self.memory.commit(name, self.model.requests[name].token_ids, num_computed)
        self.model.commit(name, num_computed)

    @precondition(lambda self: self.model.requests)
    @rule(data=st.data(), more=st.integers(0, 9))
    def extend(self, data: st.DataObject, more: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.model.requests)))
        self._extend(name, len(self.model.requests[name].token_ids) + more)

    def _extend(self, name: str, num_tokens: int) -> bool:
        request = self.model.requests[name]
        num_new = max(0, -(-num_tokens // self.model.size) - len(request.block_ids))
        fits = self.model.num_available() >= num_new
        assert self.memory.extend(name, num_tokens) is fits
        block_ids = self.memory.block_ids(name)
        if fits:
            self.model.evict_for(num_new)
            assert block_ids[: len(request.block_ids)] == request.block_ids
            self._check_fresh(block_ids[len(request.block_ids) :], num_new)
        request.block_ids = block_ids if fits else request.block_ids
        return fits

    # ---- ends and locks ----

    @precondition(lambda self: self.model.requests)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        """The end, a cancel in the middle or a preemption: all the same from here."""
        self._free(data.draw(st.sampled_from(sorted(self.model.requests))))

    def _free(self, name: str) -> None:
        request = self.model.requests[name]
        self.seen.append((request.token_ids, request.salt))
        self.memory.free(name)
        self.model.free(name)
        assert not self.memory.holds(name)

    @precondition(lambda self: self.seen)
    @rule(data=st.data())
    def lock(self, data: st.DataObject) -> None:
        token_ids, salt = data.draw(st.sampled_from(self.seen))
        ready, _ = self.model.match(token_ids, salt, len(token_ids) // self.model.size)
        lock = self.memory.lock(token_ids, salt=salt)
        assert lock.num_tokens == len(ready) * self.model.size
        name = f"lock {lock.lock_id}"
        self.locks[name] = lock
        self.model.lock(name, ready)

    @precondition(lambda self: self.locks)
    @rule(data=st.data())
    def unlock(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.locks)))
        self.memory.unlock(self.locks.pop(name))
        self.model.unlock(name)

    # ---- after every step ----

    @invariant()
    def agrees(self) -> None:
        memory, model = self.memory, self.model
        memory.check_invariants()
        model.check_cache()
        assert memory.num_free_blocks == len(model.free_ids())
        assert memory.num_cached_blocks == model.num_cached()
        assert memory.num_evicted_blocks == model.num_evicted
        held = {b for request in model.requests.values() for b in request.block_ids}
        held.update(entry.block_id for entry in model.cache.values() if entry.holders)
        assert memory.num_available_blocks + len(held) == memory.num_blocks
        for name, request in model.requests.items():
            assert memory.block_ids(name) == request.block_ids
            model.check_readable(name)
        for (salt, prefix), entry in model.cache.items():
            if entry.owner is None:  # the very same entries survived every eviction
                assert memory.match_prefix([*prefix, 0], salt=salt).num_tokens == len(prefix)

    def teardown(self) -> None:
        """Nothing is lost: when all have left, every block is free or evictable, and one request can have them all."""
        if not hasattr(self, "memory"):
            return
        for name in list(self.model.requests):
            self.memory.free(name)
        for lock in self.locks.values():
            self.memory.unlock(lock)
        self.memory.check_invariants()
        assert self.memory.num_available_blocks == self.memory.num_blocks
        everything = [7] * (self.memory.num_blocks * self.memory.block_size)
        assert self.memory.allocate("all", everything).outcome is AllocationOutcome.ALLOCATED
        assert sorted(self.memory.block_ids("all")) == list(range(self.memory.num_blocks))
        self.memory.check_invariants()


MemoryMachine.TestCase.settings = settings(max_examples=300, stateful_step_count=40)
test_manager_agrees_with_the_naive_model = MemoryMachine.TestCase
