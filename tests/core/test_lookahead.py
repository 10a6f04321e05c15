"""Two batches of the decode lane in flight: the second is made before the tokens of the first are known."""

from __future__ import annotations

from typing import Any

import pytest

from agentserve.config import ControlConfig
from agentserve.core.batch import PENDING_TOKEN, Batch, Lane
from agentserve.core.events import EndRequest, RequestFinished, SubmitRequest, TokenGenerated
from agentserve.core.request import FinishReason, SamplingParams
from agentserve.errors import ConfigError
from tests.core.builders import MS, config, core, output, submit, virtual


def tokens_of(results: list[Any]) -> dict[str, list[int]]:
    texts: dict[str, list[int]] = {}
    for result in results:
        for event in result.events:
            if isinstance(event, TokenGenerated):
                texts.setdefault(event.request_id, []).append(event.sample.token_id)
    return texts


def reasons(events: tuple[Any, ...]) -> list[FinishReason]:
    return [event.reason for event in events if isinstance(event, RequestFinished)]


def request(request_id: str, prompt: tuple[int, ...], **params: Any) -> SubmitRequest:
    return SubmitRequest(request_id, prompt, SamplingParams(temperature=0.0, **{"max_tokens": 8, **params}))


def start(**params: Any) -> tuple[Any, Batch, Batch]:
    """An engine whose only request has its first token, a batch in flight, and one made ahead."""
    engine = core(decode_lookahead=2, max_model_len=64)
    (prefill,) = engine.step(0, [], [request("a", (1, 2, 3), **params)]).batches
    first, second = engine.step(1, [output(prefill)], []).batches
    return engine, first, second


@pytest.mark.parametrize("slots", ["auto", "stream", "off"])
def test_what_is_generated_does_not_depend_on_it(slots: str) -> None:
    texts = []
    for lookahead in (1, 2):
        driver = virtual(
            num_blocks=40,
            max_model_len=120,
            max_num_seqs=4,
            decode_lookahead=lookahead,
            control=ControlConfig(controller="static", slots=slots),
        )
        for index in range(6):
            driver.at(index * 15 * MS, submit(f"r{index}", 10 + 7 * index, max_tokens=5 + 3 * index, seed=index))
        texts.append(tokens_of(driver.run()))
        assert driver.core.memory.num_available_blocks == 40
    assert texts[0] == texts[1]
    assert {name: len(text) for name, text in texts[0].items()} == {f"r{i}": 5 + 3 * i for i in range(6)}


def test_the_next_batch_is_in_flight_before_this_one_is_done() -> None:
    engine, first, second = start()
    assert [chunk.token_ids for chunk in first.chunks] == [(7,)]  # what the prompt's batch sampled
    (chunk,) = second.chunks
    assert chunk.token_ids == (PENDING_TOKEN,)
    assert chunk.start == first.chunks[0].end == 4
    assert chunk.sample is not None and chunk.sample.output_index == 2
    # Never a third one.
    assert engine.step(2, [], []).batches == ()
    (third,) = engine.step(3, [output(first, token_id=9)], []).batches
    assert third.chunks[0].start == 5
    engine.check_invariants()


def test_the_last_token_that_is_wanted_is_not_looked_beyond() -> None:
    engine, first, second = start(max_tokens=3)
    assert engine.step(2, [output(first)], []).batches == ()
    assert reasons(engine.step(3, [output(second)], []).events) == [FinishReason.LENGTH]
    assert not engine.has_unfinished


def test_after_a_stop_token_the_batch_ahead_is_in_vain_and_keeps_the_blocks_until_it_is_done() -> None:
    engine, first, second = start(stop_token_ids=(5,))
    free = engine.memory.num_free_blocks
    result = engine.step(2, [output(first, token_id=5)], [])
    assert reasons(result.events) == [FinishReason.STOP]
    assert result.batches == () and not engine.has_unfinished
    assert engine.memory.num_free_blocks == free, "the batch ahead still writes to them"
    engine.check_invariants()
    result = engine.step(3, [output(second)], [])
    assert result.events == ()
    assert engine.memory.num_available_blocks == 64
    # The executor is told with the next batch.
    (batch,) = engine.step(4, [], [request("b", (4, 5))]).batches
    assert batch.ended_request_ids == ("a",)


@pytest.mark.parametrize("error", [None, "lost"])
def test_a_request_that_is_cancelled_or_fails_in_flight_ends_once(error: str | None) -> None:
    engine, first, second = start()
    engine.step(2, [], [EndRequest("a", FinishReason.CANCELLED)])
    result = engine.step(3, [output(first, error=error)], [])
    assert reasons(result.events) == [FinishReason.ERROR if error else FinishReason.CANCELLED]
    assert engine.step(4, [output(second, error=error)], []).events == ()
    assert engine.memory.num_available_blocks == 64


def test_a_sampler_that_needs_the_tokens_so_far_gets_them() -> None:
    engine = core(decode_lookahead=2)
    (prefill,) = engine.step(0, [], [request("a", (1, 2, 3), presence_penalty=0.5)]).batches
    (batch,) = engine.step(1, [output(prefill)], []).batches
    (batch,) = engine.step(2, [output(batch)], []).batches
    assert batch.chunks[0].sample is not None and batch.chunks[0].sample.history == (1, 2, 3, 7, 7)


def test_a_prompt_that_is_read_in_pieces_by_the_decode_lane_is_not_held_up() -> None:
    driver = virtual(decode_lookahead=2, prefill_chunk=8, control=ControlConfig(controller="static", slots="off"))
    driver.at(0, submit("stream", 8, max_tokens=40))
    driver.at(100 * MS, submit("prompt", 40, max_tokens=1))
    batches = [batch for result in driver.run() for batch in result.batches]
    pieces = [i for i, batch in enumerate(batches) if any(c.request_id == "prompt" for c in batch.chunks)]
    assert len(pieces) == 5  # 40 tokens, 8 in a batch
    assert pieces == list(range(pieces[0], pieces[0] + 5)), "a batch went without it"


def test_new_decodes_join_the_batch_that_is_made_next() -> None:
    driver = virtual(decode_lookahead=2, control=ControlConfig(controller="static", slots="stream"))
    driver.at(0, submit("a", 8, max_tokens=40))
    driver.at(50 * MS, submit("b", 8, max_tokens=20))
    decodes = [b for r in driver.run() for b in r.batches if b.lane is Lane.DECODE]
    assert sum(len(batch.chunks) == 2 for batch in decodes) == 19
    together = [index for index, batch in enumerate(decodes) if len(batch.chunks) == 2]
    # b joins once and stays until its last token: no batch in between goes without it.
    assert together == list(range(together[0], together[0] + 19))


def test_only_one_or_two() -> None:
    with pytest.raises(ConfigError, match="decode_lookahead"):
        config(decode_lookahead=3)


def test_nothing_is_looked_ahead_of_a_request_with_a_grammar() -> None:
    """What it may produce depends on the token that is being sampled. When it has ended, batches are made ahead."""
    engine = core(decode_lookahead=2, max_model_len=64, max_num_seqs=4)
    held = request("held", (4, 5, 6), max_tokens=3, constrained=True)
    result = engine.step(0, [], [request("free", (1, 2, 3)), held])
    in_flight = list(result.batches)
    seen: list[tuple[bool, int]] = []  # of each decode batch: whether it holds the request, how many are behind it
    now = 0
    while in_flight:
        head = in_flight.pop(0)
        if head.lane is Lane.DECODE:
            num_behind = sum(batch.lane is Lane.DECODE for batch in in_flight)
            seen.append((any(chunk.request_id == "held" for chunk in head.chunks), num_behind))
        assert all(chunk.token_ids != (PENDING_TOKEN,) for chunk in head.chunks if chunk.request_id == "held")
        now += 1
        result = engine.step(now, [output(head)], [])
        engine.check_invariants()
        in_flight += result.batches
    assert not engine.has_unfinished
    assert [behind for holds, behind in seen if holds] == [0, 0]  # its first token came with the prompt
    assert 1 in [behind for holds, behind in seen if not holds]
