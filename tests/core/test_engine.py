"""The engine core, driven by hand or on a virtual clock."""

from __future__ import annotations

import pytest

from agentserve.core.batch import Lane
from agentserve.core.events import (
    EndRequest,
    PrefillProgress,
    RequestAdmitted,
    RequestFinished,
    RequestPreempted,
    TokenGenerated,
)
from agentserve.core.request import FinishReason, WorkClass
from agentserve.core.slots import PartitionKind
from agentserve.errors import EngineError
from tests.core.builders import MS, core, finished, output, submit, virtual


def test_a_cold_prompt_is_read_in_chunks_and_then_decoded() -> None:
    driver = virtual(prefill_chunk=16)
    driver.at(0, submit("a", 40, max_tokens=3))
    results = driver.run()
    batches = [batch for result in results for batch in result.batches]
    # 40 = 16 + 16 + 8, and the last chunk samples the first of 3 tokens: two decode steps remain.
    assert [(b.lane, b.chunks[0].start, b.chunks[0].num_tokens) for b in batches] == [
        (Lane.PREFILL, 0, 16),
        (Lane.PREFILL, 16, 16),
        (Lane.PREFILL, 32, 8),
        (Lane.DECODE, 40, 1),
        (Lane.DECODE, 41, 1),
    ]
    assert [b.chunks[0].sample is not None for b in batches] == [False, False, True, True, True]
    assert all(batch.partition.kind is PartitionKind.WHOLE for batch in batches)
    end = finished(results)["a"]
    assert end.reason is FinishReason.LENGTH
    assert (end.stats.num_prompt_tokens, end.stats.num_output_tokens) == (40, 3)
    assert end.stats.first_work_class == WorkClass.COLD_PREFILL


def test_the_second_turn_reuses_everything_but_the_last_partial_block() -> None:
    driver = virtual()
    driver.at(0, submit("turn-1", 30, max_tokens=5))
    results = driver.run()
    tokens = [e.sample.token_id for r in results for e in r.events if isinstance(e, TokenGenerated)]
    first = submit("turn-1", 30).prompt_token_ids
    driver.at(driver.clock.now_ns(), submit("turn-2", (*first, *tokens, 1, 2, 3), max_tokens=1))
    end = finished(driver.run())["turn-2"]
    # 30 + 5 tokens, of which the last was sampled but never computed: 34 have KV, so 8 whole blocks of 4.
    assert end.stats.num_cached_tokens == 32
    assert end.stats.first_work_class == WorkClass.RESUME_PREFILL


def test_a_short_resume_rides_along_with_the_decodes_within_the_budget() -> None:
    engine = core(resume_budget=8, resume_max_steps=2)
    prefix = tuple(range(16))
    result = engine.step(0, [], [submit("a", prefix, max_tokens=50)])
    result = engine.step(1, [output(result.batches[0])], [])
    # b shares a's 16 tokens and adds 12 of its own: more than one budget of 8, at most two.
    result = engine.step(2, [output(result.batches[0])], [submit("b", (*prefix, *range(50, 62)))])
    (batch,) = result.batches
    assert batch.lane is Lane.DECODE
    assert [(c.request_id, c.work_class, c.start, c.num_tokens) for c in batch.chunks] == [
        ("a", WorkClass.DECODE, 17, 1),
        ("b", WorkClass.RESUME_PREFILL, 16, 8),
    ]
    result = engine.step(3, [output(batch)], [])
    assert [(c.request_id, c.start, c.num_tokens) for c in result.batches[0].chunks] == [
        ("a", 18, 1),
        ("b", 24, 4),
    ]


def test_a_long_resume_goes_to_the_prefill_lane() -> None:
    engine = core(resume_budget=8, resume_max_steps=2)
    prefix = tuple(range(16))
    result = engine.step(0, [], [submit("a", prefix, max_tokens=50)])
    result = engine.step(1, [output(result.batches[0])], [])
    result = engine.step(2, [output(result.batches[0])], [submit("b", (*prefix, *range(50, 67)))])
    assert [(b.lane, b.chunks[0].request_id) for b in result.batches] == [
        (Lane.DECODE, "a"),
        (Lane.PREFILL, "b"),
    ]


def test_a_resume_is_not_held_to_the_budget_when_nobody_decodes() -> None:
    engine = core(resume_budget=8, resume_max_steps=2, prefill_chunk=16)
    prefix = tuple(range(16))
    result = engine.step(0, [], [submit("a", prefix, max_tokens=1)])
    result = engine.step(1, [output(result.batches[0])], [submit("b", (*prefix, *range(50, 62)))])
    (batch,) = result.batches
    assert (batch.lane, batch.chunks[0].num_tokens) == (Lane.DECODE, 12)


def test_the_device_is_split_only_while_both_lanes_are_busy() -> None:
    engine = core(prefill_chunk=16)
    result = engine.step(0, [], [submit("a", 10, max_tokens=50)])
    assert result.batches[0].partition.kind is PartitionKind.WHOLE
    result = engine.step(1, [output(result.batches[0])], [submit("b", 20)])
    decode, prefill = result.batches
    assert (decode.lane, prefill.lane) == (Lane.DECODE, Lane.PREFILL)
    assert decode.co_running and prefill.co_running
    assert decode.partition.kind is PartitionKind.SPLIT
    # Half of 8 units each.
    assert (decode.partition.units(Lane.DECODE), prefill.partition.units(Lane.PREFILL)) == (4, 4)
    # The decode lane goes on while the prefill is still in flight.
    result = engine.step(2, [output(decode)], [])
    assert [b.lane for b in result.batches] == [Lane.DECODE]
    result = engine.step(3, [output(prefill), output(result.batches[0])], [])
    assert {b.lane for b in result.batches} == {Lane.DECODE, Lane.PREFILL}  # 4 tokens of b are left


def test_identical_prompts_that_arrive_together_are_computed_once() -> None:
    prompt = tuple(range(24))
    driver = virtual(prefill_chunk=8)
    for name in "abc":
        driver.at(0, submit(name, (*prompt, ord(name)), max_tokens=2))
    results = driver.run()
    computed = sum(
        chunk.num_tokens
        for result in results
        for batch in result.batches
        for chunk in batch.chunks
        if chunk.work_class is not WorkClass.DECODE
    )
    # The 24 shared tokens (6 blocks) once, and each one's own token.
    assert computed == 24 + 3
    ends = finished(results)
    assert [ends[name].stats.num_cached_tokens for name in "abc"] == [0, 24, 24]


def test_waiting_for_a_prefix_ends_when_its_owner_is_cancelled() -> None:
    prompt = tuple(range(24))
    engine = core(prefill_chunk=8)
    result = engine.step(0, [], [submit("a", prompt), submit("b", (*prompt, 99))])
    (batch,) = result.batches
    assert [chunk.request_id for chunk in batch.chunks] == ["a"]
    engine.step(1, [], [EndRequest("a")])  # in flight: ends with its batch
    result = engine.step(2, [output(batch)], [])
    engine.check_invariants()
    assert finished([result])["a"].reason is FinishReason.CANCELLED
    # What a had computed, 8 tokens, is used by b.
    assert [e.num_cached_tokens for e in result.events if isinstance(e, RequestAdmitted)] == [8]


def test_blocks_run_out_the_last_in_rank_is_preempted_and_computed_again() -> None:
    # 8 blocks of 4 = 32 tokens. Each prompt of 12 takes 3 blocks; together they outgrow the pool at 16 tokens each.
    driver = virtual(num_blocks=8, max_model_len=32, resume_min_cached_tokens=4)
    driver.at(0, submit("a", 12, max_tokens=12, seed=1))
    driver.at(0, submit("b", 12, max_tokens=12, seed=2))
    results = driver.run()
    events = [event for result in results for event in result.events]
    assert [e.request_id for e in events if isinstance(e, RequestPreempted)] == ["b"]
    ends = finished(results)
    assert all(end.reason is FinishReason.LENGTH for end in ends.values())
    assert ends["b"].stats.num_preemptions == 1
    assert ends["b"].stats.num_output_tokens == 12
    alone = virtual(num_blocks=8, max_model_len=32)
    alone.at(0, submit("b", 12, max_tokens=12, seed=2))
    tokens = [e.sample.token_id for e in events if isinstance(e, TokenGenerated) and e.request_id == "b"]
    assert tokens == [e.sample.token_id for r in alone.run() for e in r.events if isinstance(e, TokenGenerated)]
    driver.core.check_invariants()
    assert driver.core.memory.num_available_blocks == 8


def test_a_priority_request_goes_before_those_that_wait() -> None:
    driver = virtual(max_num_seqs=1)
    driver.at(0, submit("first", 8))
    driver.at(1, submit("normal", 8))
    driver.at(2, submit("urgent", 8, priority=-1))
    order = [e.request_id for r in driver.run() for e in r.events if isinstance(e, RequestFinished)]
    assert order == ["first", "urgent", "normal"]


def test_a_failed_batch_ends_its_requests_and_no_others() -> None:
    engine = core()
    result = engine.step(0, [], [submit("a", 8, max_tokens=50)])
    result = engine.step(1, [output(result.batches[0])], [submit("b", 8)])
    decode, prefill = result.batches
    result = engine.step(2, [output(decode), output(prefill, error="out of luck")], [])
    end = finished([result])
    assert set(end) == {"b"}
    assert (end["b"].reason, end["b"].error) == (FinishReason.ERROR, "out of luck")
    engine.check_invariants()
    assert [b.chunks[0].request_id for b in result.batches] == ["a"]


@pytest.mark.parametrize("num_tokens", [0, 256, 300])
def test_a_prompt_that_cannot_fit_ends_in_an_error(num_tokens: int) -> None:
    engine = core(max_model_len=256)
    result = engine.step(0, [], [submit("a", num_tokens)])
    assert finished([result])["a"].reason is FinishReason.ERROR
    assert not engine.has_unfinished
    engine.check_invariants()


def test_the_window_ends_a_generation() -> None:
    driver = virtual(max_model_len=20, num_blocks=8)
    driver.at(0, submit("a", 17, max_tokens=100))
    end = finished(driver.run())["a"]
    assert (end.reason, end.stats.num_output_tokens) == (FinishReason.LENGTH, 3)


def test_cancelling_what_waits_what_runs_and_what_is_gone() -> None:
    engine = core(max_num_seqs=1)
    result = engine.step(0, [], [submit("a", 8), submit("b", 8)])
    assert finished([engine.step(1, [], [EndRequest("b")])])["b"].reason is FinishReason.CANCELLED
    assert finished([engine.step(2, [], [EndRequest("a"), EndRequest("a", FinishReason.STOP)])]) == {}
    done = engine.step(3, [output(result.batches[0])], [])
    assert finished([done])["a"].reason is FinishReason.CANCELLED
    assert not any(isinstance(event, (TokenGenerated, PrefillProgress)) for event in done.events)
    assert engine.step(4, [], [EndRequest("a")]).events == ()
    engine.check_invariants()
    assert engine.memory.num_available_blocks == engine.config.num_blocks


def test_progress_and_times_are_reported() -> None:
    driver = virtual(prefill_chunk=16)
    driver.at(5 * MS, submit("a", 20, max_tokens=2))
    results = driver.run()
    progress = [e for r in results for e in r.events if isinstance(e, PrefillProgress)]
    # 16 tokens at 1 ms each (8 ms for the weights is less), then 4 tokens: 8 ms of weights is more.
    # KV: 16 and 20 tokens at 1 us each come on top.
    assert [(e.at_ns, e.num_computed_tokens, e.num_total_tokens) for e in progress] == [
        (21 * MS + 16_000, 16, 20),
        (29 * MS + 36_000, 20, 20),
    ]
    stats = finished(results)["a"].stats
    assert stats.arrival_ns == stats.first_scheduled_ns == 5 * MS
    assert stats.first_token_ns == 29 * MS + 36_000
    assert stats.last_token_ns == 37 * MS + 57_000


def test_time_must_not_go_backwards() -> None:
    engine = core()
    engine.step(10, [], [])
    with pytest.raises(ValueError, match="backwards"):
        engine.step(9, [], [])


def test_the_virtual_driver_raises_when_nothing_will_wake_the_core() -> None:
    driver = virtual()
    driver.core.step(0, [], [submit("a", 8)])  # its batch is never handed to the executor
    with pytest.raises(EngineError, match="nothing will ever wake"):
        driver.run()
