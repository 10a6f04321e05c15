"""The module of the LoRA adapters: what is loaded and what leaves, in which order, and that no slot is ever lost."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from agentserve.config import AdapterConfig, LoraConfig
from agentserve.core.adapters import AdapterLoad, AdapterLoadOutput, salted
from agentserve.core.memory.modules import AdapterModule
from agentserve.core.queues import rank
from agentserve.core.request import Request, SamplingParams
from agentserve.errors import ConfigError

NAMES = "abcdef"


def module(num_slots: int, *, num_parts: int = 1, part_bytes: int = 100, names: str = NAMES) -> AdapterModule:
    """Adapters `a`, `b`, ... that are copied part by part."""
    adapters = tuple(AdapterConfig(name, num_parts * part_bytes, num_parts) for name in names)
    return AdapterModule(LoraConfig(adapters, num_slots, max_load_bytes=part_bytes))


def request(name: str | None, sequence: int, priority: int = 0) -> Request:
    sampling = SamplingParams(max_tokens=1)
    return Request(f"r{sequence}", (1,), sampling, 0, sequence, priority=priority, adapter=name)


def finish(adapters: AdapterModule, load: AdapterLoad, error: str | None = None) -> list[Request]:
    return list(adapters.finish(AdapterLoadOutput(load.load_id, 0, 1, error)))


def load_all(adapters: AdapterModule) -> list[str]:
    """Makes all copies; which adapter each of them was for."""
    copies = []
    while loads := adapters.start():
        copies += [load.adapter for load in loads]
        assert not any(finish(adapters, load) for load in loads)
    return copies


def use(adapters: AdapterModule, name: str, sequence: int) -> None:
    """A request that comes, runs and ends."""
    r = request(name, sequence)
    adapters.on_request(r)
    load_all(adapters)
    assert adapters.admits(r, set())
    adapters.acquire(r)
    adapters.release(r.request_id)


def resident(adapters: AdapterModule) -> set[str]:
    return {name for name in NAMES if adapters.admits(request(name, 999), set())}


def test_the_adapter_that_was_used_longest_ago_leaves_first() -> None:
    adapters = module(3)
    for sequence, name in enumerate("abcad"):  # when d comes, b was used longest ago
        use(adapters, name, sequence)
    assert resident(adapters) == set("acd")
    assert (adapters.stats().num_loads, adapters.stats().num_evictions) == (4, 1)


def test_an_adapter_in_use_stays_whatever_comes() -> None:
    adapters = module(1)
    first, second = request("a", 0), request("b", 1)
    adapters.on_request(first)
    load_all(adapters)
    slot = adapters.acquire(first)
    adapters.on_request(second)
    assert adapters.start() == []
    adapters.release(first.request_id)
    (load,) = adapters.start()
    assert (load.adapter, load.slot) == ("b", slot)


def test_the_largest_distance_leaves_first() -> None:
    adapters = module(3)
    for sequence, name in enumerate("abc"):
        use(adapters, name, sequence)
    adapters.set_distances({"a": 1.0, "b": 5.0, "c": 3.0, "nobody": 0.0})
    use(adapters, "d", 9)
    assert resident(adapters) == set("acd")


def test_prefetch_takes_the_place_of_what_is_farther_and_of_nothing_else() -> None:
    """ScaleSim, section 4.3: of those below the threshold only what is nearer than an inactive resident comes."""
    adapters = module(2)
    for sequence, name in enumerate("ab"):
        use(adapters, name, sequence)
    adapters.set_distances({"a": 8.0, "b": 5.0, "c": 6.0, "d": 7.5, "e": 100.0}, prefetch_below=8.0)
    assert load_all(adapters) == ["c"]  # for a; d would be farther than b and c, and e is above the threshold
    assert resident(adapters) == set("bc")


def test_of_equally_near_ones_who_was_wanted_first_comes_first() -> None:
    adapters = module(3)
    for name in "cab":
        adapters.set_distances({name: 1.0}, prefetch_below=2.0)
    adapters.set_distances({"c": 1.0}, prefetch_below=2.0)  # nothing new
    assert load_all(adapters) == ["c", "a", "b"]


def test_an_urgent_load_goes_between_the_parts_of_another() -> None:
    adapters = module(2, num_parts=3)
    adapters.set_distances({"a": 1.0}, prefetch_below=2.0)
    (load,) = adapters.start()
    adapters.on_request(request("b", 0))
    finish(adapters, load)
    assert [load.adapter, *load_all(adapters)] == ["a", "b", "b", "b", "a", "a"]
    stats = adapters.stats()
    assert (stats.num_preempted_loads, stats.num_loads, stats.loaded_bytes) == (1, 2, 600)


def test_an_interrupted_load_gives_way_if_there_is_no_other_place() -> None:
    adapters = module(1, num_parts=2)
    adapters.set_distances({"a": 1.0}, prefetch_below=2.0)
    (load,) = adapters.start()
    adapters.on_request(request("b", 0))
    finish(adapters, load)
    assert load_all(adapters) == ["b", "b"]
    assert resident(adapters) == {"b"}


def test_loads_go_by_rank() -> None:
    adapters = module(3)
    for sequence, (name, priority) in enumerate([("a", 1), ("b", 0), ("c", -1)]):
        adapters.on_request(request(name, sequence, priority))
    assert load_all(adapters) == ["c", "b", "a"]


def test_who_waits_longest_for_a_slot_gets_one() -> None:
    """Both slots are in use. Nobody else may start with the adapter that has fewer users, until it is idle."""
    adapters = module(2)
    running = [request(name, sequence) for sequence, name in enumerate("aab")]
    for r in running:
        adapters.on_request(r)
    load_all(adapters)
    for r in running:
        adapters.acquire(r)
    waiting = [request(name, 3 + index) for index, name in enumerate("ccba")]
    for r in waiting:
        adapters.on_request(r)
    held: set[str] = set()
    assert [adapters.admits(r, held) for r in waiting] == [False, False, False, True]
    adapters.release("r2")
    assert load_all(adapters) == ["c"]
    held = set()
    assert [adapters.admits(r, held) for r in waiting] == [True, True, False, True]


def test_a_failed_load_fails_those_who_wait_and_can_be_tried_again() -> None:
    adapters = module(1)
    first, other = request("a", 0), request("b", 1)
    adapters.on_request(first)
    adapters.on_request(other)
    (load,) = adapters.start()
    assert finish(adapters, load, "no such file") == [first]
    assert load_all(adapters) == ["b"]
    adapters.cancel(other)
    adapters.on_request(request("a", 2))
    assert load_all(adapters) == ["a"]
    assert adapters.stats().num_failed_loads == 1


def test_the_copies_of_an_adapter_add_up() -> None:
    adapters = AdapterModule(LoraConfig((AdapterConfig("a", 1000, 7),), max_load_bytes=300))
    adapters.on_request(request("a", 0))
    copies = []
    while loads := adapters.start():
        copies += loads
        finish(adapters, loads[0])
    # A part has 143 bytes at most, so two go at a time.
    assert [(load.first_part, load.num_parts) for load in copies] == [(0, 2), (2, 2), (4, 2), (6, 1)]
    assert sum(load.num_bytes for load in copies) == 1000


def test_salts_differ() -> None:
    """No salt that a client may send is that of an adapter."""
    values: list[tuple[Any, ...]] = [
        (salt, *adapter)
        for salt in (None, "", "x", "\0lora\0a\0", "\0lora\0a\0\0x", "\0salt\0x")
        for adapter in ((None, ""), ("a", ""), ("a", "1"), ("b", "1"))
    ]
    salts = [salted(*value) for value in values]
    assert len(set(salts)) == len(salts)
    assert salted("x", None) == "x"
    assert salted(None, None) is None


@pytest.mark.parametrize(
    ("adapters", "values"),
    [((), {}), ((("a", 1), ("a", 1)), {}), ((("a", 0),), {}), ((("", 1),), {}), ((("a\0", 1),), {})]
    + [((("a", 1),), {name: 0}) for name in ("max_resident", "read_bytes_per_s", "max_load_bytes")],
)
def test_configurations_that_cannot_work(adapters: Any, values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        LoraConfig(tuple(AdapterConfig(*adapter) for adapter in adapters), **values)


class AdapterMachine(RuleBasedStateMachine):
    """Requests that come, start, end, are preempted and give up; copies that succeed and fail; changing distances."""

    @initialize(num_slots=st.integers(1, 4), num_parts=st.integers(1, 3))
    def build(self, num_slots: int, num_parts: int) -> None:
        self.adapters = module(num_slots, num_parts=num_parts)
        self.num_parts = num_parts
        self.flying: list[AdapterLoad] = []
        self.slots: dict[int, tuple[str, int]] = {}
        """What the device holds: adapter and parts."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[Request] = []
        self.running: list[tuple[Request, int]] = []
        self.num_requests = 0

    @rule(name=st.sampled_from(NAMES), priority=st.integers(0, 1))
    def come(self, name: str, priority: int) -> None:
        self.num_requests += 1
        r = request(name, self.num_requests, priority)
        self.adapters.on_request(r)
        self.waiting.append(r)
        self.waiting.sort(key=rank)

    @rule(index=st.integers(0, 3))
    def give_up(self, index: int) -> None:
        if index < len(self.waiting):
            self.adapters.cancel(self.waiting.pop(index))

    @rule(most=st.integers(1, 6))
    def admit(self, most: int) -> None:
        held: set[str] = set()
        admitted = []
        for r in self.waiting:
            if len(admitted) < most and self.adapters.admits(r, held):
                slot = self.adapters.acquire(r)
                assert slot is not None
                assert self.slots[slot] == (r.adapter, self.num_parts), "started without its adapter"
                self.running.append((r, slot))
                admitted.append(r)
        self.waiting = [r for r in self.waiting if r not in admitted]

    @rule(index=st.integers(0, 3), comes_back=st.booleans())
    def end(self, index: int, comes_back: bool) -> None:
        if index < len(self.running):
            r, _ = self.running.pop(index)
            self.adapters.release(r.request_id)
            if comes_back:
                self.adapters.on_request(r)
                self.waiting.append(r)
                self.waiting.sort(key=rank)

    @rule(name=st.sampled_from(NAMES), distance=st.sampled_from([0.5, 1.0, 2.0, float("inf")]))
    def expect(self, name: str, distance: float) -> None:
        self.adapters.set_distances({name: distance}, prefetch_below=1.5)

    @rule()
    def start(self) -> None:
        loads = self.adapters.start()
        assert not (loads and self.flying), "two copies at once"
        for load in loads:
            assert load.slot not in {slot for _, slot in self.running}, "a slot in use is overwritten"
            if load.first_part == 0:
                self.slots[load.slot] = (load.adapter, 0)
            assert self.slots[load.slot] == (load.adapter, load.first_part), "a part is missing or in the wrong slot"
        self.flying += loads

    @precondition(lambda self: self.flying)
    @rule(fails=st.sampled_from([False, False, False, True]))
    def copied(self, fails: bool) -> None:
        load = self.flying.pop()
        failed = finish(self.adapters, load, "broken" if fails else None)
        assert {r.request_id for r in failed} == {
            r.request_id for r in self.waiting if fails and r.adapter == load.adapter
        }
        self.waiting = [r for r in self.waiting if r not in failed]
        if not fails:
            self.slots[load.slot] = (load.adapter, load.first_part + load.num_parts)

    @invariant()
    def holds_together(self) -> None:
        if hasattr(self, "adapters"):
            self.adapters.check_invariants()

    def teardown(self) -> None:
        """Everybody's turn comes: with copies that succeed and requests that end, all get their adapter in order."""
        if not hasattr(self, "adapters"):
            return
        for _ in range(20 * (len(self.waiting) + len(self.running) + 10)):
            if self.flying:
                self.copied(False)
            self.start()
            self.admit(6)
            self.end(0, False)
        assert not self.waiting and not self.running, "a request waits for ever"


TestAdapterMachine = AdapterMachine.TestCase
TestAdapterMachine.settings = settings(max_examples=60, stateful_step_count=60)
