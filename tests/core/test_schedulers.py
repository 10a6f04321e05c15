"""What goes into the batches: taking turns, order with aging, and the baselines."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest

from agentserve.config import ControlConfig
from agentserve.core.batch import Batch, Lane
from agentserve.core.controllers import BatchObservation, ControlSignal, Decision
from agentserve.core.engine import EngineCore
from agentserve.core.events import ControlDecided, TokenGenerated
from agentserve.core.request import WorkClass
from agentserve.core.slots import PartitionKind, build_partition_table
from agentserve.runtime.virtual import VirtualDriver
from tests.core.builders import MS, config, finished, simulated, submit, virtual

TURNS = {"control": ControlConfig(controller="static", slots="off")}
STREAM = {"control": ControlConfig(controller="static", slots="stream")}


def batches_of(results: Sequence[Any]) -> list[Batch]:
    return [batch for result in results for batch in result.batches]


def contents(batch: Batch) -> list[tuple[str, int]]:
    return [(chunk.request_id, chunk.num_tokens) for chunk in batch.chunks]


def first_tokens(results: Sequence[Any]) -> list[str]:
    """Requests in the order of their first tokens."""
    return [
        event.request_id
        for result in results
        for event in result.events
        if isinstance(event, TokenGenerated) and event.output_index == 0
    ]


def test_taking_turns_reads_prompts_in_the_batches_of_the_decodes() -> None:
    driver = virtual(prefill_chunk=16, **TURNS)
    driver.at(0, submit("a", 8, max_tokens=12))
    driver.at(20 * MS, submit("b", 40, max_tokens=2))
    batches = batches_of(driver.run())
    assert not any(batch.co_running for batch in batches)
    assert {batch.partition.kind for batch in batches} == {PartitionKind.WHOLE}
    mixed = [contents(batch) for batch in batches if len(batch.chunks) == 2 and batch.num_tokens > 2]
    # 40 tokens of b in chunks of 16, each beside a decode of a.
    assert mixed == [[("a", 1), ("b", 16)], [("a", 1), ("b", 16)], [("a", 1), ("b", 8)]]


def test_a_stream_partition_gives_both_lanes_everything() -> None:
    driver = virtual(prefill_chunk=16, **STREAM)
    driver.at(0, submit("a", 8, max_tokens=12))
    driver.at(20 * MS, submit("b", 40, max_tokens=2))
    together = [batch for batch in batches_of(driver.run()) if batch.co_running]
    assert {batch.lane for batch in together} == set(Lane)
    assert {batch.partition.label for batch in together} == {"stream:8+8"}


def test_a_budget_for_all_batches_bounds_the_mixed_ones() -> None:
    driver = virtual(prefill_chunk=64, max_num_batched_tokens=20, **TURNS)
    for index in range(3):
        driver.at(0, submit(f"d{index}", 4, max_tokens=20))
    driver.at(30 * MS, submit("long", 100, max_tokens=2))
    assert max(batch.num_tokens for batch in batches_of(driver.run())) == 20


def test_a_change_of_mind_is_an_event_and_only_then() -> None:
    driver = virtual(num_blocks=100, control=ControlConfig())
    driver.at(0, submit("a", 20, max_tokens=30))
    driver.at(50 * MS, submit("b", 100, max_tokens=2))
    decisions = [e.decision for r in driver.run() for e in r.events if isinstance(e, ControlDecided)]
    assert decisions and all(a != b for a, b in itertools.pairwise(decisions))


# ---- the order of prompts ----


def test_a_short_prompt_overtakes_a_long_one_that_is_being_read() -> None:
    values: dict[str, Any] = {"num_blocks": 100, "prefill_chunk": 16, "prefill_order": "shortest"}
    for order, expected in (("shortest", ["short", "long"]), ("fcfs", ["long", "short"])):
        driver = virtual(**{**values, "prefill_order": order})
        driver.at(0, submit("long", 200, max_tokens=1))
        driver.at(20 * MS, submit("short", 20, max_tokens=1))
        assert first_tokens(driver.run()) == expected


def test_a_long_prompt_does_not_starve() -> None:
    """A short prompt of 20 tokens arrives every 20 ms, and the device reads about one token in a ms: it is full.

    The long prompt has 180 tokens more than they have, and 500 tokens a second for its age: those that come more than
    0.36 s after it stand behind it.
    """
    driver = virtual(num_blocks=400, max_num_seqs=64, prefill_chunk=16, prefill_order="shortest")
    driver.at(0, submit("long", 200, max_tokens=1))
    for index in range(60):
        own_words = range(10_000 + 20 * index, 10_020 + 20 * index)
        driver.at(index * 20 * MS, submit(f"s{index:02}", own_words, max_tokens=1))
    order = first_tokens(driver.run())
    overtaken_by = [int(name[1:]) for name in order[: order.index("long")]]
    assert 5 < max(overtaken_by) <= 17  # that one comes 0.34 s after it
    assert len(order) == 61


def test_resumes_that_keep_coming_do_not_starve_a_cold_prompt_when_lanes_take_turns() -> None:
    """Resumes bring 8 new tokens every 8 ms, more than the 16 of a step of 18 ms."""
    driver = virtual(
        num_blocks=2000, max_num_seqs=200, prefill_chunk=16, max_model_len=2000, prefill_order="shortest", **TURNS
    )
    prefix = range(500, 516)
    driver.at(0, submit("stream", 4, max_tokens=300))
    driver.at(0, submit("first", prefix, max_tokens=1))
    driver.at(100 * MS, submit("cold", 100, max_tokens=1))
    for index in range(120):
        own_words = range(10_000 + 8 * index, 10_008 + 8 * index)
        driver.at((100 + 8 * index) * MS, submit(f"r{index:03}", (*prefix, *own_words), max_tokens=1))
    order = first_tokens(driver.run())
    overtaken_by = [int(name[1:]) for name in order[: order.index("cold")] if name.startswith("r")]
    # 92 tokens more than a resume: those that come more than 0.184 s after it stand behind it, with 8 ms between them.
    assert 5 < max(overtaken_by) <= 23


def test_a_prompt_that_is_nearly_done_does_not_wait_for_a_whole_chunk_of_the_next_one() -> None:
    driver = virtual(prefill_chunk=64, control=ControlConfig(controller="static", slots="stream"))
    driver.at(0, submit("stream", 8, max_tokens=60))
    # Both come while the lane reads this one.
    driver.at(20 * MS, submit("first", 64, max_tokens=1))
    driver.at(30 * MS, submit("short", 10, max_tokens=1))
    driver.at(30 * MS, submit("long", 90, max_tokens=1))
    batches = [contents(batch) for batch in batches_of(driver.run()) if batch.lane is Lane.PREFILL]
    # Not 10 + 54 of 64: a quarter of the chunk is what the short one waits for.
    assert batches == [[("stream", 8)], [("first", 64)], [("short", 10), ("long", 6)], [("long", 64)], [("long", 20)]]


def test_without_a_resume_budget_all_prompts_are_read_in_the_prefill_lane() -> None:
    class Apart:
        decision = Decision(build_partition_table(8, 1, 1).split_nearest(0.5), 0, 16)

        def observe(self, observation: BatchObservation) -> None:
            """Nothing to learn."""

        def decide(self, signal: ControlSignal) -> Decision:
            return self.decision

    engine = EngineCore(config(num_blocks=200), build_partition_table(8, 1, 1), Apart())
    driver = VirtualDriver(engine, simulated(200, 4))
    driver.at(0, submit("before", range(32), max_tokens=1))
    driver.at(100 * MS, submit("stream", 8, max_tokens=60))
    driver.at(150 * MS, submit("resume", range(36), max_tokens=1))
    batches = batches_of(driver.run())
    resumes = [batch for batch in batches for c in batch.chunks if c.work_class is WorkClass.RESUME_PREFILL]
    assert resumes and {batch.lane for batch in resumes} == {Lane.PREFILL}
    assert any(batch.co_running for batch in resumes)


def test_priority_goes_before_length() -> None:
    driver = virtual(num_blocks=100, prefill_chunk=16, prefill_order="shortest")
    driver.at(0, submit("urgent", 60, max_tokens=1, priority=-1))
    driver.at(0, submit("short", 20, max_tokens=1))
    assert first_tokens(driver.run()) == ["urgent", "short"]


# ---- baselines ----


def run_baseline(scheduler: str, budget: int = 32) -> list[Batch]:
    """One stream decodes; two prompts of 40 and 24 tokens come at 20 ms."""
    driver = virtual(num_blocks=100, scheduler=scheduler, max_num_batched_tokens=budget)
    driver.at(0, submit("a", 8, max_tokens=12))
    driver.at(20 * MS, submit("b", 40, max_tokens=3))
    driver.at(20 * MS, submit("c", 24, max_tokens=3))
    results = driver.run()
    assert {end.stats.num_output_tokens for end in finished(results).values()} == {12, 3}
    batches = batches_of(results)
    assert not any(batch.co_running for batch in batches)
    assert {batch.partition.kind for batch in batches} == {PartitionKind.WHOLE}
    assert max(batch.num_tokens for batch in batches) <= budget
    return batches


def test_chunked_fills_the_budget_beside_the_decodes() -> None:
    batches = run_baseline("chunked")
    prompts = [contents(b) for b in batches if any(c.work_class is WorkClass.COLD_PREFILL for c in b.chunks)]
    # 31 + 9 tokens of b, then 22 of c fit beside a (31 - 9); the 2 that are left come with the decodes of a and b.
    assert prompts == [
        [("a", 8)],
        [("a", 1), ("b", 31)],
        [("a", 1), ("b", 9), ("c", 22)],
        [("a", 1), ("b", 1), ("c", 2)],
    ]


def test_prefill_first_lets_streams_wait() -> None:
    batches = run_baseline("prefill-first")
    assert all(len({chunk.work_class for chunk in batch.chunks}) == 1 for batch in batches), "never mixed"
    at = next(i for i, batch in enumerate(batches) if batch.chunks[0].request_id == "b")
    # 32 + 32 tokens are two batches of prompts in a row.
    assert [batch.lane for batch in batches[at : at + 3]] == [Lane.PREFILL, Lane.PREFILL, Lane.DECODE]
    assert [contents(batch) for batch in batches[at : at + 2]] == [[("b", 32)], [("b", 8), ("c", 24)]]


def test_fcfs_takes_whole_prompts_in_order_of_arrival() -> None:
    batches = run_baseline("fcfs", budget=2048)
    assert next(contents(b) for b in batches if len(b.chunks) == 3) == [("a", 1), ("b", 40), ("c", 24)]


@pytest.mark.parametrize("scheduler", ["chunked", "prefill-first", "fcfs"])
def test_baselines_survive_a_shortage_of_memory(scheduler: str) -> None:
    driver = virtual(num_blocks=16, max_model_len=60, scheduler=scheduler)
    for index in range(4):
        driver.at(0, submit(f"r{index}", 12, max_tokens=20, seed=index))
    results = driver.run()
    ends = finished(results)
    assert {end.stats.num_output_tokens for end in ends.values()} == {20}
    assert sum(end.stats.num_preemptions for end in ends.values()) > 0, "there was no shortage"


def test_spare_budget_goes_to_prompts_that_wait_for_the_prefill_lane() -> None:
    class Sharing:
        """A split whose decode lane takes 8 tokens of whatever waits."""

        def __init__(self, shares: bool) -> None:
            table = build_partition_table(8, 1, 1)
            self.decision = Decision(table.split_nearest(0.5), 8, 16, shares_budget=shares)

        def observe(self, observation: BatchObservation) -> None:
            """Nothing to learn."""

        def decide(self, signal: ControlSignal) -> Decision:
            return self.decision

    lanes_of: dict[bool, set[Lane]] = {}
    for shares in (False, True):
        engine = EngineCore(config(num_blocks=200), build_partition_table(8, 1, 1), Sharing(shares))
        driver = VirtualDriver(engine, simulated(200, 4))
        driver.at(0, submit("stream", 8, max_tokens=60))
        driver.at(50 * MS, submit("first", 60, max_tokens=1))
        driver.at(50 * MS, submit("second", 60, max_tokens=1))
        batches = batches_of(driver.run())
        lanes_of[shares] = {batch.lane for batch in batches for c in batch.chunks if c.request_id == "second"}
        first = {batch.lane for batch in batches for c in batch.chunks if c.request_id == "first"}
        assert first == {Lane.PREFILL}
        beside = [
            sum(c.num_tokens for c in b.chunks if c.work_class is not WorkClass.DECODE)
            for b in batches
            if b.lane is Lane.DECODE
        ]
        assert max(beside) <= 8
    assert lanes_of == {False: {Lane.PREFILL}, True: {Lane.PREFILL, Lane.DECODE}}
