"""What the engine is told of the next prompt, while a tool runs."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from agentserve.core.request import FinishReason
from agentserve.server.caching import CacheOptions
from agentserve.server.types import ChatPrompt
from bench.client_styles.templates import FAMILIES, Family
from tests.server.scripted import Run, ScriptedDaemon, replying, serve
from tests.server.test_chat_tools import HELLO, ONE, TOOLS, TWO
from tests.server.test_token_history import ALICE, Model, calls, said
from tests.server.test_token_history import HELLO as GREETING

MARK = "q0123z"
SPECULATES = CacheOptions(speculates=True)


@pytest.mark.parametrize("keeps_answers", [True, False])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=str)
def test_the_next_prompt_begins_with_it(family: Family, keeps_answers: bool) -> None:
    model = Model(family)
    builder = model.builder if keeps_answers else model.plain
    shown = said("", tool_calls=calls('{"a":1 , "b": 2.0}'))
    cached = model.answer(GREETING, list(b'<think>\nhm\n</think>\n\n  {"a":1 , "b": 2.0}'), shown)
    messages = [*GREETING, shown, {"role": "tool", "tool_call_id": "call_1234", "name": "read", "content": MARK}]
    told = builder.build_until(ChatPrompt(tuple(messages)), MARK, identity=ALICE)
    messages[-1] = {**messages[-1], "content": "found"}
    prompt = builder.build(ChatPrompt(tuple(messages)), identity=ALICE)
    assert prompt.token_ids[: len(told)] == told
    # Nothing of what is known is left out: the result follows at once.
    assert model.text(prompt.token_ids[len(told) :]).lstrip().startswith("found")
    if keeps_answers:
        assert list(told[: len(cached)]) == cached and len(told) > len(cached)


def test_a_template_that_shows_no_results_says_nothing() -> None:
    model = Model(FAMILIES["chatml"])
    assert model.builder.build_until(ChatPrompt(tuple(GREETING)), MARK) == ()


async def chat(daemon: ScriptedDaemon, messages: list[Any], **fields: Any) -> Any:
    client = daemon.openai()
    reply = await client.chat.completions.create(model="test-model", messages=messages, tools=TOOLS, **fields)
    return reply.choices[0].message


@pytest.mark.parametrize("text", [ONE, TWO])
async def test_the_daemon_tells_it_after_a_tool_call(text: str) -> None:
    async with serve(max_model_len=2000, script=replying(text), cache=SPECULATES) as daemon:
        answer = await chat(daemon, HELLO)
        told = await asyncio.wait_for(daemon.driver.speculated.get(), 30)
        assert told.request_id == daemon.driver.submitted[0].request_id
        results = [{"role": "tool", "tool_call_id": call.id, "content": "it rains"} for call in answer.tool_calls]
        await chat(daemon, [*HELLO, answer.model_dump(exclude_none=True), *results])
        prompt = daemon.driver.submitted[1].prompt_token_ids
        assert prompt[: len(told.token_ids)] == told.token_ids
        assert bytes(prompt[len(told.token_ids) :]).startswith(b"it rains")


async def cut_off(run: Run) -> None:
    run.admit()
    for byte in ONE.encode():
        run.token(byte)
    run.finish(FinishReason.LENGTH)


async def test_nothing_is_told_of_what_nobody_knows() -> None:
    async with serve(max_model_len=2000, script=replying("Hello."), cache=SPECULATES) as daemon:
        await chat(daemon, HELLO)
        daemon.driver.script = cut_off
        await chat(daemon, HELLO)
        daemon.driver.script = replying(ONE)
        await chat(daemon, HELLO, n=2)
        await chat(daemon, HELLO)
        told = await asyncio.wait_for(daemon.driver.speculated.get(), 30)
        assert told.request_id == daemon.driver.submitted[-1].request_id, "the first of four"
        assert daemon.driver.speculated.empty()


async def test_nothing_is_told_unless_somebody_wants_to_know() -> None:
    async with serve(max_model_len=2000, script=replying(ONE)) as daemon:
        await chat(daemon, HELLO)
        await daemon.driver.idle.wait()
    assert daemon.driver.speculated.empty()
