"""The asyncio facade: every stream ends once, leaving cancels, slow readers cost little."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from agentserve.core.batch import TokenSample
from agentserve.core.events import (
    Command,
    EndRequest,
    PrefillProgress,
    RequestAdmitted,
    RequestFinished,
    RequestStats,
    SubmitRequest,
    TokenGenerated,
)
from agentserve.core.request import FinishReason, SamplingParams
from agentserve.core.stats import EngineStats
from agentserve.errors import ContextLengthExceededError, EngineError, InvalidRequestError, QueueFullError
from agentserve.runtime.client import EngineClient
from agentserve.runtime.streams import StreamEnd, StreamProgress, StreamTokens

STATS = RequestStats(3, 0, 2, 0, "cold_prefill", 0, 0, 1, 2)
PARAMS = SamplingParams(max_tokens=4)


class Script:
    """A driver that only remembers what was posted."""

    def __init__(self) -> None:
        self.posted: list[Command] = []
        self.down = False

    def post(self, command: Command) -> None:
        if self.down:
            raise EngineError("the engine is down")
        self.posted.append(command)

    def stats(self) -> EngineStats:
        return EngineStats()

    def ask(self, question: Any) -> Any:
        raise EngineError("there is no engine to ask")


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def client(script: Script) -> EngineClient:
    return EngineClient(script, max_model_len=10, max_queued_requests=2)


def token(request_id: str, index: int) -> TokenGenerated:
    return TokenGenerated(request_id, index, TokenSample(request_id, 100 + index), index)


def end(request_id: str) -> RequestFinished:
    return RequestFinished(request_id, 9, FinishReason.LENGTH, STATS)


async def test_a_stream_from_admission_to_end(client: EngineClient) -> None:
    async with client.generate([1, 2, 3], PARAMS, request_id="a") as stream:
        assert (client.num_unfinished, client.num_waiting) == (1, 1)
        client.dispatch([RequestAdmitted("a", 0, 3, 0), PrefillProgress("a", 1, 2, 3)])
        assert client.num_waiting == 0
        assert await anext(stream) == StreamProgress(2, 3)
        client.dispatch([PrefillProgress("a", 2, 3, 3), token("a", 0), token("a", 1)])
        # The reader was slow: two tokens are one event, and progress that is overtaken by tokens is dropped.
        event = await anext(stream)
        assert isinstance(event, StreamTokens)
        assert [sample.token_id for sample in event.samples] == [100, 101]
        client.dispatch([token("a", 2), end("a")])
        assert isinstance(await anext(stream), StreamTokens)
        assert await anext(stream) == StreamEnd(FinishReason.LENGTH, STATS, None)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
    assert client.num_unfinished == 0


async def test_leaving_a_stream_early_cancels_it_once(client: EngineClient, script: Script) -> None:
    async with client.generate([1], PARAMS, request_id="a"):
        pass
    assert script.posted[1:] == [EndRequest("a", FinishReason.CANCELLED)]
    assert client.num_unfinished == client.num_waiting == 0
    client.dispatch([token("a", 0), end("a")])  # they cross with the cancel and reach nobody


async def test_a_cancelled_task_cancels_its_request(client: EngineClient, script: Script) -> None:
    async def consume() -> None:
        async with client.generate([1], PARAMS, request_id="a") as stream:
            async for _ in stream:
                raise AssertionError("nothing was sent")

    task = asyncio.create_task(consume())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert script.posted[-1] == EndRequest("a", FinishReason.CANCELLED)


async def test_a_stop_string_ends_the_request_and_the_end_still_comes(client: EngineClient, script: Script) -> None:
    async with client.generate([1], PARAMS, request_id="a") as stream:
        client.dispatch([token("a", 0)])
        await anext(stream)
        stream.finish(FinishReason.STOP)
        assert script.posted[-1] == EndRequest("a", FinishReason.STOP)
        client.dispatch([RequestFinished("a", 9, FinishReason.STOP, STATS)])
        assert (await anext(stream)) == StreamEnd(FinishReason.STOP, STATS, None)
    assert len(script.posted) == 2


async def test_the_door(client: EngineClient, script: Script) -> None:
    with pytest.raises(InvalidRequestError):
        client.generate([], PARAMS)
    with pytest.raises(ContextLengthExceededError):
        client.generate(range(10), PARAMS)
    with pytest.raises(InvalidRequestError, match="max_tokens is 4"):
        client.generate(range(7), PARAMS)
    assert script.posted == []
    client.generate(range(6), PARAMS, request_id="a")
    with pytest.raises(InvalidRequestError, match="in use"):
        client.generate([1], PARAMS, request_id="a")
    client.generate([1], PARAMS, request_id="b")
    with pytest.raises(QueueFullError):
        client.generate([1], PARAMS, request_id="c")
    client.dispatch([RequestAdmitted("a", 0, 6, 0)])
    client.generate([1], PARAMS, request_id="c")
    assert [c.request_id for c in script.posted if isinstance(c, SubmitRequest)] == ["a", "b", "c"]


async def test_a_dead_engine_ends_every_stream_with_an_error(client: EngineClient, script: Script) -> None:
    async with client.generate([1], PARAMS) as one, client.generate([1], PARAMS) as two:
        script.down = True
        client.fail_all("the engine failed")
        for stream in (one, two):
            event = await anext(stream)
            assert isinstance(event, StreamEnd)
            assert (event.reason, event.error) == (FinishReason.ERROR, "the engine failed")
    with pytest.raises(EngineError):
        client.generate([1], PARAMS)
    assert client.num_unfinished == client.num_waiting == 0


# ---- grammars ----


class Grammars:
    """What `GrammarMasks` is to a client: remembers which requests are open, and has trouble when it is told to."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.closed: list[str] = []
        self.problem: str | None = None

    def open(self, request_id: str, grammar: object) -> None:
        del grammar
        self.opened.append(request_id)

    def close(self, request_id: str) -> str | None:
        self.closed.append(request_id)
        return self.problem if request_id in self.opened else None


GRAMMAR: Any = SimpleNamespace(eos_token_ids=(7,))
HELD = SamplingParams(max_tokens=4, stop_token_ids=(7, 8))


def with_grammars(script: Script, grammars: Any) -> EngineClient:
    return EngineClient(script, max_model_len=10, max_queued_requests=2, masks=grammars)


async def test_a_grammar_is_open_from_the_submission_to_the_end(script: Script) -> None:
    grammars = Grammars()
    client = with_grammars(script, grammars)
    async with client.generate([1], HELD, request_id="a", grammar=GRAMMAR) as stream:
        (submitted,) = script.posted
        assert isinstance(submitted, SubmitRequest) and submitted.sampling.constrained
        assert (grammars.opened, grammars.closed) == (["a"], [])
        client.dispatch([token("a", 0), end("a")])
        assert grammars.closed == ["a"]
        assert [event async for event in stream][-1] == StreamEnd(FinishReason.LENGTH, STATS, None)
    async with client.generate([1], HELD, request_id="free"):
        assert not script.posted[-1].sampling.constrained  # type: ignore[union-attr]
    assert grammars.opened == ["a"]


async def test_a_grammar_stays_until_the_engine_is_done_with_a_request_that_was_left(script: Script) -> None:
    grammars = Grammars()
    client = with_grammars(script, grammars)
    async with client.generate([1], HELD, request_id="a", grammar=GRAMMAR):
        pass
    assert grammars.closed == []  # the engine may be sampling
    client.dispatch([RequestFinished("a", 9, FinishReason.CANCELLED, STATS)])
    assert grammars.closed == ["a"]


async def test_an_answer_that_left_its_grammar_is_an_error(script: Script) -> None:
    grammars = Grammars()
    grammars.problem = "the grammar could not be followed"
    client = with_grammars(script, grammars)
    for reason, expected in ((FinishReason.STOP, FinishReason.ERROR), (FinishReason.LENGTH, FinishReason.LENGTH)):
        async with client.generate([1], HELD, request_id=reason.value, grammar=GRAMMAR) as stream:
            client.dispatch([RequestFinished(reason.value, 9, reason, STATS)])
            event = await anext(stream)
            assert isinstance(event, StreamEnd)
            assert event.reason is expected
            assert (event.error == grammars.problem) == (expected is FinishReason.ERROR)


async def test_grammars_that_cannot_be(script: Script, client: EngineClient) -> None:
    with pytest.raises(InvalidRequestError, match="cannot hold its output"):
        client.generate([1], HELD, grammar=GRAMMAR)
    grammars = Grammars()
    held = with_grammars(script, grammars)
    with pytest.raises(InvalidRequestError, match="ignore_eos"):
        held.generate([1], PARAMS, grammar=GRAMMAR)
    with pytest.raises(InvalidRequestError, match="min_tokens"):
        held.generate([1], replace(HELD, min_tokens=2), grammar=GRAMMAR)
    assert (script.posted, grammars.opened) == ([], [])
    script.down = True
    with pytest.raises(EngineError):
        held.generate([1], HELD, request_id="a", grammar=GRAMMAR)
    assert (grammars.opened, grammars.closed) == (["a"], ["a"])


async def test_a_dead_engine_closes_every_grammar(script: Script) -> None:
    grammars = Grammars()
    client = with_grammars(script, grammars)
    client.generate([1], HELD, request_id="a", grammar=GRAMMAR)
    client.fail_all("the engine failed")
    assert grammars.closed == ["a"]


# ---- consumers that do not read ----


async def test_what_is_not_read_is_bounded(script: Script) -> None:
    client = EngineClient(script, max_model_len=100, max_queued_requests=2, max_unread_tokens=5)
    async with client.generate([1], SamplingParams(max_tokens=50), request_id="a") as stream:
        client.dispatch([token("a", index) for index in range(5)])
        assert len(script.posted) == 1
        client.dispatch([token("a", index) for index in range(5, 20)])
        assert script.posted[1:] == [EndRequest("a", FinishReason.CANCELLED)]
        client.dispatch([RequestFinished("a", 9, FinishReason.CANCELLED, STATS)])
        event = await anext(stream)
        assert isinstance(event, StreamTokens)
        assert [sample.token_id for sample in event.samples] == [100, 101, 102, 103, 104]
        assert await anext(stream) == StreamEnd(FinishReason.CANCELLED, STATS, None, overflowed=True)


async def test_alternatives_count_and_reading_makes_room(script: Script) -> None:
    client = EngineClient(script, max_model_len=100, max_queued_requests=2, max_unread_tokens=5)
    top = ((1, -1.0), (2, -2.0))
    async with client.generate([1], SamplingParams(max_tokens=50, logprobs=2), request_id="a") as stream:
        for index in range(10):
            client.dispatch([TokenGenerated("a", index, TokenSample("a", 3, -1.0, top), index)])
            await anext(stream)
        assert len(script.posted) == 1
        # Three each: the second one is too much.
        client.dispatch([TokenGenerated("a", index, TokenSample("a", 3, -1.0, top), index) for index in (10, 11)])
        assert script.posted[1:] == [EndRequest("a", FinishReason.CANCELLED)]
