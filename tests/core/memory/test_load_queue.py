"""The one queue of loads: order over modules, turns, preemption, and one copy at a time on each link."""

from __future__ import annotations

import random
from typing import Any

from agentserve.config import AdapterConfig, LoraConfig, TierConfig, TieringConfig
from agentserve.core.adapters import AdapterLoad, AdapterLoadOutput
from agentserve.core.events import SetDistances
from agentserve.core.memory.load_queue import LoadQueue, LoadTask, Urgency, urgency_at, urgency_of
from agentserve.core.request import Request, SamplingParams
from agentserve.core.transfers import Tier, Transfer, TransferKind, TransferOutput
from tests.core.builders import MS, finished, submit, virtual


class Module:
    """Loads of so many copies each, over the link to the host unless something else is said."""

    def __init__(self, name: str, queue: LoadQueue) -> None:
        self.name = name
        self.loads: dict[str, tuple[Urgency, int, Tier]] = {}
        self.num_preempted = 0
        queue.add(self)

    def want(self, name: str, urgency: Urgency, *, num_copies: int = 1, link: Tier = Tier.HOST) -> None:
        self.loads[name] = (urgency, num_copies, link)

    def next_load(self, link: Tier) -> LoadTask | None:
        tasks = [LoadTask(name, urgency) for name, (urgency, _, on) in self.loads.items() if on is link]
        return min(tasks, key=lambda task: task.urgency, default=None)

    def load(self, link: Tier, name: str) -> AdapterLoad:
        urgency, num_copies, on = self.loads[name]
        assert on is link
        self.loads[name] = (urgency, num_copies - 1, on)
        if num_copies == 1:
            del self.loads[name]
        return AdapterLoad(0, f"{self.name}{name}", 0, 0, 1, 1)

    def preempted(self, name: str) -> None:
        self.num_preempted += 1


def request(sequence: int, priority: int = 0) -> Request:
    return Request(f"r{sequence}", (1,), SamplingParams(max_tokens=1), 0, sequence, priority=priority)


def copy(queue: LoadQueue, *modules: Module) -> str:
    """Makes the next copy over the link to the host; what it was of, or nothing."""
    order = queue.start(Tier.HOST)
    if order is None:
        return ""
    assert isinstance(order, AdapterLoad)
    assert queue.start(Tier.HOST) is None, "two copies at once"
    queue.finished(Tier.HOST, is_over=all(order.adapter != m.name + name for m in modules for name in m.loads))
    return order.adapter


def test_the_most_urgent_load_of_all_modules_goes_first() -> None:
    queue = LoadQueue()
    kv, adapters = Module("kv/", queue), Module("adapter/", queue)
    kv.want("far", urgency_at(5.0))
    kv.want("waits", urgency_of(request(7)))
    adapters.want("near", urgency_at(0.5))
    adapters.want("first", urgency_of(request(9, priority=-1)))
    adapters.want("there", urgency_at(0.0))  # who may call at any time, but has not
    order = [copy(queue, kv, adapters) for _ in range(6)]
    assert order == ["adapter/first", "kv/waits", "adapter/there", "adapter/near", "kv/far", ""]


def test_modules_take_turns_between_loads_that_are_as_urgent() -> None:
    queue = LoadQueue()
    kv, adapters = Module("kv/", queue), Module("adapter/", queue)
    for name in "ab":
        kv.want(name, urgency_at(1.0), num_copies=2)
        adapters.want(name, urgency_at(1.0))
    order = [copy(queue, kv, adapters) for _ in range(6)]
    assert order == ["adapter/a", "kv/a", "kv/a", "adapter/b", "kv/b", "kv/b"]
    assert kv.num_preempted == adapters.num_preempted == 0


def test_an_urgent_load_of_another_module_goes_between_two_copies() -> None:
    queue = LoadQueue()
    kv, adapters = Module("kv/", queue), Module("adapter/", queue)
    kv.want("a", urgency_at(1.0), num_copies=3)
    assert copy(queue, kv, adapters) == "kv/a"
    adapters.want("b", urgency_of(request(0)))
    assert [copy(queue, kv, adapters) for _ in range(3)] == ["adapter/b", "kv/a", "kv/a"]
    assert kv.num_preempted == 1


def test_links_do_not_wait_for_each_other() -> None:
    queue = LoadQueue()
    kv = Module("kv/", queue)
    kv.want("a", urgency_at(1.0), link=Tier.DISK)
    kv.want("b", urgency_at(2.0))
    assert queue.start(Tier.HOST) is not None and queue.start(Tier.DISK) is not None


def test_kv_and_adapters_come_over_one_link_one_copy_at_a_time() -> None:
    """Random calls and distances, with 3 slots for 6 adapters and 24 blocks: both kinds come and go all the time."""
    lora = LoraConfig(tuple(AdapterConfig(f"s{index}", 6000, 3) for index in range(6)), 3, 4e6, 0, 2000)
    host = TieringConfig(4000, (TierConfig("host", 64, 4e6, 4e6),), max_transfer_blocks=2)
    driver = virtual(
        num_blocks=24, max_model_len=64, max_num_seqs=3, policy="invocation_distance", tiering=host, lora=lora
    )
    core, step, flying = driver.core, driver.core.step, dict[tuple[str, int], str]()
    kinds: list[str] = []

    def watched(now_ns: int, completions: Any, commands: Any) -> Any:
        for output in completions:
            if isinstance(output, TransferOutput):
                flying.pop(("kv", output.transfer_id), None)
            elif isinstance(output, AdapterLoadOutput):
                del flying["adapter", output.load_id]
        result = step(now_ns, completions, commands)
        for order in result.transfers:
            if isinstance(order, AdapterLoad):
                flying["adapter", order.load_id] = order.adapter
                kinds.append("adapter")
            elif isinstance(order, Transfer) and order.kind is TransferKind.LOAD:
                flying["kv", order.transfer_id] = "kv"
                kinds.append("kv")
        assert len(flying) <= 1, "two copies over one link"
        core.check_invariants()
        return result

    core.step = watched  # type: ignore[method-assign]
    source = random.Random(5)
    for index in range(40):
        name, at_ns = f"s{source.randrange(6)}", source.randrange(3000) * MS
        prompt = [1000 * int(name[1:]) + i for i in range(source.randrange(9, 29))]
        driver.at(at_ns, submit(f"r{index}", prompt, max_tokens=2, session_id=name, adapter=name))
        told = tuple((f"s{agent}", float(source.randrange(6))) for agent in range(6))
        driver.at(at_ns + source.randrange(100) * MS, SetDistances(told))
    assert len(finished(driver.run())) == 40
    assert min(kinds.count("kv"), kinds.count("adapter")) > 20
