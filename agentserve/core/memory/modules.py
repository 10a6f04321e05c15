"""The module of the LoRA adapters: which are on the device, in which slot, and which come next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from agentserve.config import AdapterConfig, LoraConfig
from agentserve.core.adapters import AdapterLoad, AdapterLoadOutput, TransferOrder, salted
from agentserve.core.memory.eviction import Key
from agentserve.core.memory.load_queue import LoadQueue, LoadTask, Urgency, urgency_at, urgency_of
from agentserve.core.request import Request
from agentserve.core.stats import AdapterStats
from agentserve.core.transfers import Tier

_UNKNOWN = float("inf")
_LINK = Tier.HOST
"""Over which adapters come, and KV from host memory, too."""


@dataclass(slots=True, eq=False)
class Adapter:
    """What is known of an adapter."""

    config: AdapterConfig
    sequence: int
    """Its place among those that were registered: the last word in every tie."""
    slot: int | None = None
    """Its place on the device, taken with the first part of it; None: it is not there."""
    num_parts: int = 0
    """Parts that are there."""
    users: set[str] = field(default_factory=set)
    """Requests that run with it: it is locked."""
    waiting: dict[str, Request] = field(default_factory=dict)
    """Requests that wait, for it or for something else."""
    last_used: int = 0
    """When a request last came, started or ended with it, as a count of such events."""
    distance: float = _UNKNOWN
    """Invocation distance of the agents that use it, the smallest one; infinite: nobody knows."""
    is_wanted: bool = False
    """Whether it is to be loaded before anybody asks."""
    wanted_at: int = 0
    """When that, or its distance, changed last, as a count of such events: of equally near ones, who was wanted first
    comes first. KV is loaded beforehand in that order, too, and a call needs both."""

    @property
    def is_resident(self) -> bool:
        """Whether all of it is on the device."""
        return self.num_parts == self.config.num_parts

    @property
    def urgency(self) -> Urgency:
        """Of whoever waits for it, or else of its next use."""
        if self.waiting:
            return min(urgency_of(request) for request in self.waiting.values())
        return urgency_at(self.distance)


AdapterKey: TypeAlias = Callable[[Adapter], Key]
"""What an adapter is worth while nobody uses it: the smallest leaves first."""


def distance_key(adapter: Adapter) -> Key:
    """The largest invocation distance leaves first (ScaleSim, section 4.3), and of those what was used longest ago.

    Without distances that is: least recently used first.
    """
    return (-adapter.distance, adapter.last_used)


class AdapterModule:
    """A `MemoryModule`: which adapters are in which slot of the device, and who uses them. They come from host memory.

    A request needs its adapter from its admission until it ends or is preempted; meanwhile the adapter is locked.
    When all slots are locked and somebody waits for one, the adapter that is expected to be free first takes no new
    requests that come after the one that waits: so everybody's turn comes.
    """

    def __init__(
        self, config: LoraConfig, eviction_key: AdapterKey = distance_key, queue: LoadQueue | None = None
    ) -> None:
        """`queue`: of all loads; None: there are no others."""
        self.eviction_key = eviction_key
        self._queue = LoadQueue() if queue is None else queue
        self._queue.add(self)
        self._num_loads = self._num_evictions = self._num_preempted_loads = self._num_failed_loads = 0
        self._loaded_bytes = self._load_ns = self._num_orders = 0
        self._config = config
        self._adapters = {adapter.name: Adapter(adapter, index) for index, adapter in enumerate(config.adapters)}
        self._free_slots = list(range(config.max_resident - 1, -1, -1))
        """The lowest one is taken first."""
        self._placed: dict[int, Adapter] = {}
        """By slot."""
        self._asked: dict[str, Adapter] = {}
        """Those to be loaded, by name: somebody waits for them, or wants them beforehand."""
        self._used: dict[str, Adapter] = {}
        """By request that runs."""
        self._flying: tuple[AdapterLoad, Adapter] | None = None
        self._num_events = self._num_wishes = 0
        self._changed = True
        """Whether there may be a load that could not go on when somebody asked last."""

    def __contains__(self, name: str) -> bool:
        return name in self._adapters

    @property
    def is_busy(self) -> bool:
        """Whether a copy is under way."""
        return self._flying is not None

    def salt(self, cache_salt: str | None, name: str | None) -> str | None:
        """The salt of the prefix cache for requests with this adapter, or without one."""
        return salted(cache_salt, name, "" if name is None else self._adapters[name].config.fingerprint)

    # ---- requests ----

    def on_request(self, request: Request) -> None:
        """A request has come, or waits again: notes what it needs (`HandleReq` of the paper)."""
        if request.adapter is None:
            return
        adapter = self._adapters[request.adapter]
        adapter.waiting[request.request_id] = request
        self._touch(adapter)
        self._list(adapter)

    def cancel(self, request: Request) -> None:
        """A request that waited has ended."""
        if request.adapter is not None:
            adapter = self._adapters[request.adapter]
            adapter.waiting.pop(request.request_id, None)
            self._list(adapter)

    def admits(self, request: Request, held: set[str]) -> bool:
        """Whether a request may start, as far as its adapter is concerned. Changes nothing but `held`.

        To be asked for those that wait in the order of their ranks, with one set for all of them: it collects the
        adapters that take no requests for the time being.
        """
        name = request.adapter
        if name is None:
            return True
        if name in held:
            return False
        adapter = self._adapters[name]
        if adapter.is_resident:
            return True
        held.add(name)
        if adapter.slot is None:
            self._hold_one(held)
        return False

    @property
    def num_idle_slots(self) -> int:
        """Slots of adapters that no request runs with. O(slots)."""
        return len(self._free_slots) + sum(not adapter.users for adapter in self._placed.values())

    def holds_slot_alone(self, request: Request) -> bool:
        """Whether there is an idle slot more when this request does not run any more."""
        adapter = self._used.get(request.request_id)
        return adapter is not None and len(adapter.users) == 1

    def acquire(self, request: Request) -> int | None:
        """Locks the adapter of a request that starts; its slot. None for a request without adapter."""
        if request.adapter is None:
            return None
        adapter = self._adapters[request.adapter]
        assert adapter.is_resident, f"{request.request_id} starts without its adapter"
        adapter.waiting.pop(request.request_id, None)
        adapter.users.add(request.request_id)
        self._used[request.request_id] = adapter
        self._touch(adapter)
        self._list(adapter)
        return adapter.slot

    def release(self, request_id: str) -> None:
        """Ends what `acquire` began, if it did."""
        adapter = self._used.pop(request_id, None)
        if adapter is not None:
            adapter.users.remove(request_id)
            self._touch(adapter)
            self._changed = True

    def _hold_one(self, held: set[str]) -> None:
        """If all slots are in use: adds to `held` the adapter that is expected to give its slot back first."""
        if self._free_slots or any(not adapter.users for adapter in self._placed.values()):
            return
        others = [adapter for adapter in self._placed.values() if adapter.config.name not in held]
        if others:
            soonest = min(others, key=lambda a: (len(a.users), self.eviction_key(a), a.sequence))
            held.add(soonest.config.name)

    # ---- policies ----

    def set_distances(self, distances: Mapping[str, float], *, prefetch_below: float = 0.0) -> None:
        """Says how far the next use of adapters is; what is not named is as before.

        Those below `prefetch_below` are loaded beforehand, if a slot is free or holds an idle adapter of a larger
        distance (ScaleSim, section 4.3). Names that are not known are ignored: agents may have no adapter.
        """
        for name, distance in distances.items():
            adapter = self._adapters.get(name)
            if adapter is None:
                continue
            is_wanted = distance < prefetch_below
            if (distance, is_wanted) != (adapter.distance, adapter.is_wanted):
                self._num_wishes += 1
                adapter.wanted_at = self._num_wishes
            adapter.distance, adapter.is_wanted = distance, is_wanted
            self._list(adapter)

    # ---- loads ----

    def next_load(self, link: Tier) -> LoadTask | None:
        """See `MemoryModule.next_load`: the most urgent adapter that has a slot, or can have one."""
        if link is not _LINK or not self._changed:
            return None
        asked = [((*a.urgency, a.slot is None, a.wanted_at, a.sequence), a) for a in self._asked.values()]
        found = min(asked, default=None)
        if found is not None and found[1].slot is None and not self._has_slot_for(found[0][:2]):
            # Nor is there one for those that are less urgent.
            found = min((entry for entry in asked if entry[1].slot is not None), default=None)
        self._changed = found is not None
        return None if found is None else LoadTask(found[1].config.name, found[0][:2])

    def load(self, link: Tier, name: str) -> AdapterLoad:  # noqa: ARG002 - there is one link only
        """See `MemoryModule.load`."""
        adapter = self._adapters[name]
        if adapter.slot is None:
            adapter.slot = self.evict(adapter.urgency)
            assert adapter.slot is not None, f"there is no slot for {name}"
            self._placed[adapter.slot] = adapter
        config = adapter.config
        part_bytes = -(-config.num_bytes // config.num_parts)
        num_parts = min(config.num_parts - adapter.num_parts, max(1, self._config.max_load_bytes // part_bytes))
        first, end = adapter.num_parts, adapter.num_parts + num_parts
        # So the bytes of all copies add up to those of the adapter.
        num_bytes = config.num_bytes * end // config.num_parts - config.num_bytes * first // config.num_parts
        order = AdapterLoad(self._num_orders, name, adapter.slot, first, num_parts, num_bytes)
        self._num_orders += 1
        self._flying = (order, adapter)
        return order

    def evict(self, urgency: Urgency) -> int | None:
        """Makes room for an adapter that is so urgent (`Evict` of the paper): a free slot, or that of the idle adapter
        that is worth least; None if all others are in use, or as urgent."""
        if self._free_slots:
            return self._free_slots.pop()
        idle = [adapter for adapter in self._placed.values() if not adapter.users and adapter.urgency > urgency]
        unasked = [adapter for adapter in idle if not adapter.waiting]
        if unasked:
            victim = min(unasked, key=lambda a: (self.eviction_key(a), a.sequence))
        elif idle:
            victim = max(idle, key=lambda a: a.urgency)
        else:
            return None
        self._num_evictions += 1
        return self._clear(victim)

    def preempted(self, name: str) -> None:
        """See `MemoryModule.preempted`. It keeps what it has until somebody needs the slot."""
        self._num_preempted_loads += name in self._asked

    def start(self) -> list[TransferOrder]:
        """The copy over the link of the adapters that the executor is to make now, if there is one."""
        order = self._queue.start(_LINK)
        return [] if order is None else [order]

    def finish(self, output: AdapterLoadOutput) -> tuple[Request, ...]:
        """Books a copy that is done. After a failure the slot is free again.

        Returns the requests that have waited for an adapter that cannot be loaded.
        """
        assert self._flying is not None and self._flying[0].load_id == output.load_id, f"unexpected {output}"
        order, adapter = self._flying
        self._flying = None
        self._load_ns += output.finished_ns - output.started_ns
        failed: tuple[Request, ...] = ()
        if output.error is None:
            adapter.num_parts += order.num_parts
            self._num_loads += adapter.is_resident
            self._loaded_bytes += order.num_bytes
            self._list(adapter)
        else:
            self._num_failed_loads += 1
            failed = tuple(adapter.waiting.values())
            adapter.waiting.clear()
            adapter.is_wanted = False
            self._free_slots.append(self._clear(adapter))
            self._free_slots.sort(reverse=True)
        self._changed = True
        self._queue.finished(_LINK, is_over=adapter.is_resident or output.error is not None)
        return failed

    def _has_slot_for(self, urgency: Urgency) -> bool:
        return bool(self._free_slots) or any(not a.users and a.urgency > urgency for a in self._placed.values())

    def _touch(self, adapter: Adapter) -> None:
        self._num_events += 1
        adapter.last_used = self._num_events

    def _list(self, adapter: Adapter) -> None:
        """Puts an adapter among those to be loaded, or takes it out."""
        self._changed = True
        if not adapter.is_resident and (adapter.waiting or adapter.is_wanted):
            self._asked[adapter.config.name] = adapter
        else:
            self._asked.pop(adapter.config.name, None)

    def _clear(self, adapter: Adapter) -> int:
        """Takes an adapter out of its slot; returns the slot."""
        slot = adapter.slot
        assert slot is not None and not adapter.users, f"{adapter.config.name} cannot leave its slot"
        del self._placed[slot]
        adapter.slot, adapter.num_parts = None, 0
        self._list(adapter)
        return slot

    # ---- views ----

    def stats(self) -> AdapterStats:
        """A snapshot."""
        return AdapterStats(
            num_adapters=len(self._adapters),
            num_slots=self._config.max_resident,
            num_resident=sum(adapter.is_resident for adapter in self._placed.values()),
            num_loads=self._num_loads,
            num_evictions=self._num_evictions,
            num_preempted_loads=self._num_preempted_loads,
            num_failed_loads=self._num_failed_loads,
            loaded_bytes=self._loaded_bytes,
            load_ns=self._load_ns,
        )

    def check_invariants(self) -> None:
        """Raises AssertionError if slots, locks or the queue are wrong. O(adapters)."""
        slots = [*self._free_slots, *self._placed]
        assert sorted(slots) == list(range(self._config.max_resident)), "a slot was lost or is in two places"
        assert self._free_slots == sorted(self._free_slots, reverse=True), "the free slots are out of order"
        for name, adapter in self._adapters.items():
            assert 0 <= adapter.num_parts <= adapter.config.num_parts, f"{name}: wrong number of parts"
            assert (adapter.slot is not None) == (self._placed.get(adapter.slot or 0) is adapter), f"{name}: wrong slot"
            assert adapter.slot is not None or not adapter.num_parts, f"{name} has parts without a slot"
            assert not adapter.users or adapter.is_resident, f"{name} is used but not on the device"
            assert not adapter.users & adapter.waiting.keys(), f"{name}: a request waits and runs"
            is_asked = not adapter.is_resident and bool(adapter.waiting or adapter.is_wanted)
            assert is_asked == (name in self._asked), f"{name}: listed wrongly"
        users = {request_id for adapter in self._adapters.values() for request_id in adapter.users}
        assert users == self._used.keys(), "a lock was lost"
        if self._flying is not None:
            order, adapter = self._flying
            assert adapter.slot == order.slot and adapter.num_parts == order.first_part, "a slot is written for nobody"
