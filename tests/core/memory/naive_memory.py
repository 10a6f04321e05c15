"""A second implementation of `MemoryManager` to hold the first against: slow, flat and without any cleverness.

It knows no tree: the cache is a dictionary from everything a block depends on (salt and all tokens up to its end) to an
entry; who holds what is a set of names; the victim of an eviction is found by looking at all entries. It also plays the
executor: a store says for each place of each block what was written there last.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

Content: TypeAlias = tuple[str | None, tuple[int, ...]]
"""Salt and all tokens up to here: what the KV of the last of them depends on."""


@dataclass
class Entry:
    block_id: int
    owner: str | None
    sequence: int
    holders: set[str]
    last_access: int


@dataclass
class NaiveRequest:
    salt: str | None
    token_ids: list[int]
    num_computed: int
    block_ids: tuple[int, ...]
    held: list[Content] = field(default_factory=list)


class NaiveMemory:
    def __init__(self, num_blocks: int, block_size: int, caching: bool) -> None:
        self.num_blocks = num_blocks
        self.size = block_size
        self.caching = caching
        self.cache: dict[Content, Entry] = {}
        self.requests: dict[str, NaiveRequest] = {}
        self.locks: dict[str, list[Content]] = {}
        self.store: dict[tuple[int, int], Content] = {}
        self.num_evicted = 0
        self.clock = 0
        self.num_created = 0

    # ---- what the manager must answer ----

    def match(self, token_ids: list[int], salt: str | None, max_blocks: int) -> tuple[list[Content], list[Content]]:
        """Ready and pending contents, in order."""
        path = []
        for index in range(max_blocks):
            content = (salt, tuple(token_ids[: (index + 1) * self.size]))
            if content not in self.cache:
                break
            path.append(content)
        ready = [content for content in path if self.cache[content].owner is None]
        assert path[: len(ready)] == ready, "ready behind pending"
        return ready, path[len(ready) :]

    def free_ids(self) -> set[int]:
        used = {entry.block_id for entry in self.cache.values()}
        for request in self.requests.values():
            used.update(request.block_ids)
        return set(range(self.num_blocks)) - used

    def num_cached(self) -> int:
        return sum(not entry.holders for entry in self.cache.values())

    def num_available(self) -> int:
        return len(self.free_ids()) + self.num_cached()

    # ---- changes ----

    def evict_for(self, num_new: int) -> None:
        while len(self.free_ids()) < num_new:
            leaves = [content for content, entry in self.cache.items() if not entry.holders and self.is_leaf(content)]
            del self.cache[min(leaves, key=lambda c: (self.cache[c].last_access, self.cache[c].sequence))]
            self.num_evicted += 1

    def is_leaf(self, content: Content) -> bool:
        salt, prefix = content
        return not any(
            s == salt and len(other) > len(prefix) and other[: len(prefix)] == prefix for s, other in self.cache
        )

    def touch(self, contents: list[Content]) -> None:
        self.clock += 1
        for content in contents:
            self.cache[content].last_access = self.clock

    def admit(self, name: str, token_ids: list[int], salt: str | None, ready: list[Content]) -> int:
        """Holds `ready` and evicts; returns how many new blocks are to be taken."""
        for content in ready:
            self.cache[content].holders.add(name)
        self.touch(ready)
        num_new = -(-len(token_ids) // self.size) - len(ready)
        self.evict_for(num_new)
        return num_new

    def place(self, name: str, request: NaiveRequest, ready: list[Content]) -> None:
        """Records an admission with the block ids that the manager chose."""
        request.held = list(ready)
        self.requests[name] = request
        if self.caching:
            for index in range(len(ready), len(request.token_ids) // self.size):
                content = self.content(request, (index + 1) * self.size)
                if content in self.cache:
                    assert (index + 1) * self.size == len(request.token_ids), "not the last block"
                    break
                self.create(content, request.block_ids[index], name, owner=name)
                request.held.append(content)

    def compute(self, name: str, num_computed: int) -> None:
        """What an executor does: reads everything before, writes the places of the new tokens."""
        request = self.requests[name]
        self.check_readable(name)
        shared = {entry.block_id for entry in self.cache.values() if entry.owner != name}
        shared.update(b for other, r in self.requests.items() if other != name for b in r.block_ids)
        for position in range(request.num_computed, num_computed):
            block_id = request.block_ids[position // self.size]
            assert block_id not in shared, f"{name} writes to block {block_id}, which is not its own"
            self.store[block_id, position % self.size] = self.content(request, position + 1)

    def commit(self, name: str, num_computed: int) -> None:
        request = self.requests[name]
        if self.caching:
            for index in range(request.num_computed // self.size, num_computed // self.size):
                content = self.content(request, (index + 1) * self.size)
                entry = self.cache.get(content)
                if entry is None:
                    self.create(content, request.block_ids[index], name, owner=None)
                elif entry.owner is not None:
                    entry.owner = None
                    entry.block_id = request.block_ids[index]
                self.cache[content].holders.add(name)
                if content not in request.held:
                    request.held.append(content)
        request.num_computed = num_computed

    def free(self, name: str) -> None:
        request = self.requests.pop(name)
        self.touch(request.held)
        for content in request.held:
            self.cache[content].holders.discard(name)
            if self.cache[content].owner == name:
                del self.cache[content]

    def lock(self, name: str, contents: list[Content]) -> None:
        for content in contents:
            self.cache[content].holders.add(name)
        self.touch(contents)
        self.locks[name] = contents

    def unlock(self, name: str) -> None:
        contents = self.locks.pop(name)
        self.touch(contents)
        for content in contents:
            self.cache[content].holders.discard(name)

    # ---- checks ----

    def check_readable(self, name: str) -> None:
        """Whatever the request believes to be computed is in its blocks, for exactly its tokens and salt."""
        request = self.requests[name]
        for position in range(request.num_computed):
            place = (request.block_ids[position // self.size], position % self.size)
            assert self.store.get(place) == self.content(request, position + 1), f"{name} lost position {position}"

    def check_cache(self) -> None:
        """Ready entries hold what they promise, to the last token."""
        for (salt, prefix), entry in self.cache.items():
            if entry.owner is None:
                for offset in range(self.size):
                    end = len(prefix) - self.size + offset + 1
                    assert self.store.get((entry.block_id, offset)) == (salt, prefix[:end])

    def content(self, request: NaiveRequest, length: int) -> Content:
        return request.salt, tuple(request.token_ids[:length])

    def create(self, content: Content, block_id: int, name: str, owner: str | None) -> None:
        self.num_created += 1
        self.cache[content] = Entry(block_id, owner, self.num_created, {name}, self.clock)
