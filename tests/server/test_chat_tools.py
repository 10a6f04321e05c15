"""Tools and reasoning in `/v1/chat/completions`, with the official SDK."""

from __future__ import annotations

import json
from typing import Any

import pytest

from agentserve.core.request import FinishReason
from tests.server.scripted import Run, replying, serve

HELLO: list[Any] = [{"role": "user", "content": "hi"}]
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "d",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
    for name in ("weather", "time")
]
ONE = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
TWO = ONE + '\n<tool_call>\n{"name": "time", "arguments": {"city": "Rome"}}\n</tool_call>'


async def test_whole_calls() -> None:
    async with serve(max_model_len=1000, script=replying("<think>\nhm\n</think>\n\nLet me look.\n" + TWO)) as daemon:
        answer = await daemon.openai().chat.completions.create(model="test-model", messages=HELLO, tools=TOOLS)
        choice = answer.choices[0]
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content == "Let me look."
        assert choice.message.model_extra is not None
        assert choice.message.model_extra["reasoning_content"] == choice.message.model_extra["reasoning"] == "hm"
        calls = choice.message.tool_calls
        assert calls is not None
        assert [call.function.name for call in calls if call.type == "function"] == ["weather", "time"]
        assert [json.loads(call.function.arguments) for call in calls if call.type == "function"] == [
            {"city": "Paris"},
            {"city": "Rome"},
        ]
        assert len({call.id for call in calls}) == 2
        usage = answer.usage
        assert usage is not None and usage.completion_tokens_details is not None
        # "<think>\nhm\n</think>": some of its bytes, and none of the answer's
        assert 0 < (usage.completion_tokens_details.reasoning_tokens or 0) <= len("<think>\nhm\n</think>\n\n")


async def test_streamed_calls() -> None:
    """The first delta of a call has its id, its name and no arguments; the others concatenate to JSON."""
    async with serve(max_model_len=1000, script=replying("<think>\nhm\n</think>\n\nLet me look.\n" + TWO)) as daemon:
        stream = await daemon.openai().chat.completions.create(
            model="test-model", messages=HELLO, tools=TOOLS, stream=True
        )
        firsts: list[Any] = []
        arguments = ["", ""]
        content = reasoning = ""
        async for chunk in stream:
            delta = chunk.choices[0].delta
            content += delta.content or ""
            reasoning += (delta.model_extra or {}).get("reasoning_content", "")
            for call in delta.tool_calls or ():
                assert call.function is not None
                if call.id is not None:
                    assert call.type == "function"
                    assert call.function.arguments == ""
                    assert call.index == len(firsts)
                    firsts.append((call.id, call.function.name))
                else:
                    assert call.function.name is None
                    arguments[call.index] += call.function.arguments or ""
            reason = chunk.choices[0].finish_reason
        assert reason == "tool_calls"
        assert (content, reasoning) == ("Let me look.", "hm")
        assert [name for _, name in firsts] == ["weather", "time"]
        assert [json.loads(text) for text in arguments] == [{"city": "Paris"}, {"city": "Rome"}]


async def test_the_sdk_puts_a_streamed_call_together() -> None:
    async with (
        serve(replying(ONE)) as daemon,
        daemon.openai().chat.completions.stream(model="test-model", messages=HELLO, tools=TOOLS) as stream,
    ):
        final = await stream.get_final_completion()
        calls = final.choices[0].message.tool_calls
        assert calls is not None
        assert json.loads(calls[0].function.arguments) == {"city": "Paris"}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_that_is_cut_off_is_no_call(stream: bool) -> None:
    async with serve(replying(ONE)) as daemon:
        client = daemon.openai()
        # within the arguments
        num_tokens = ONE.index("Paris") + 2
        if stream:
            chunks = await client.chat.completions.create(
                model="test-model", messages=HELLO, tools=TOOLS, max_tokens=num_tokens, stream=True
            )
            reasons = [chunk.choices[0].finish_reason async for chunk in chunks]
            assert reasons[-1] == "length"
        else:
            answer = await client.chat.completions.create(
                model="test-model", messages=HELLO, tools=TOOLS, max_tokens=num_tokens
            )
            assert answer.choices[0].finish_reason == "length"
            assert answer.choices[0].message.tool_calls is None


async def test_one_call_at_a_time() -> None:
    """The engine is told to stop after the first call."""
    async with serve(replying(TWO), max_model_len=1000) as daemon:
        answer = await daemon.openai().chat.completions.create(
            model="test-model", messages=HELLO, tools=TOOLS, parallel_tool_calls=False
        )
        calls = answer.choices[0].message.tool_calls
        assert calls is not None and len(calls) == 1
        assert answer.choices[0].finish_reason == "tool_calls"
        assert daemon.driver.ended == [(daemon.driver.submitted[0].request_id, FinishReason.STOP)]


async def test_without_tools_markup_is_text() -> None:
    async with serve(replying(ONE)) as daemon:
        client = daemon.openai()
        for options in ({}, {"tools": TOOLS, "tool_choice": "none"}):
            answer = await client.chat.completions.create(model="test-model", messages=HELLO, **options)
            assert answer.choices[0].message.content == ONE
            assert answer.choices[0].message.tool_calls is None
        prompts = [bytes(submitted.prompt_token_ids).decode() for submitted in daemon.driver.submitted]
        # Tools that must not be called this time are shown: the prompt stays the same from its start.
        assert prompts == ["<user>hi<assistant>", "<tools>weather,time<user>hi<assistant>"]


async def test_choices_have_calls_of_their_own() -> None:
    async def script(run: Run) -> None:
        run.admit()
        await run.reply(ONE if run.id.endswith("-0") else "no call")

    async with serve(script) as daemon:
        answer = await daemon.openai().chat.completions.create(model="test-model", messages=HELLO, tools=TOOLS, n=2)
        assert [choice.finish_reason for choice in answer.choices] == ["tool_calls", "stop"]
        assert answer.choices[1].message.content == "no call"


async def test_history_with_calls_results_and_thoughts() -> None:
    messages: list[Any] = [
        *HELLO,
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "hm",
            "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "21"}]},
        {"role": "assistant", "content": "warm", "reasoning": "ok"},
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "and now?"},
    ]
    async with serve() as daemon:
        await daemon.openai().chat.completions.create(model="test-model", messages=messages)
        assert bytes(daemon.driver.submitted[0].prompt_token_ids).decode() == (
            '<user>hi<assistant>(hm)[weather {"city": "Paris"}]<tool>21<assistant>(ok)warm'
            "<user><system-reminder>\nbe brief\n</system-reminder>\n\nand now?<assistant>"
        )


async def test_progress_on_request() -> None:
    async def script(run: Run) -> None:
        run.admit()
        run.progress(7)
        await run.reply("x")

    async with serve(script) as daemon:
        stream = await daemon.openai().chat.completions.create(
            model="test-model", messages=HELLO, stream=True, extra_body={"return_progress": True}
        )
        progress = [chunk.model_extra["prompt_progress"] async for chunk in stream if chunk.model_extra]
        assert [(seen["processed"], seen["total"]) for seen in progress] == [(7, 19)]


async def test_thinking_switches_reach_the_template() -> None:
    async with serve() as daemon:
        kwargs: list[Any] = []
        render = daemon.state.generation._prompts._chat_template.render  # type: ignore[union-attr]

        def spy(messages: Any, **options: Any) -> str:
            kwargs.append(options["template_kwargs"])
            return render(messages, **options)

        daemon.state.generation._prompts._chat_template.render = spy  # type: ignore[union-attr, method-assign]
        await daemon.openai().chat.completions.create(
            model="test-model", messages=HELLO, reasoning_effort="low", extra_body={"enable_thinking": False}
        )
        for given in kwargs:
            del given["strftime_now"]  # the session's own clock
        assert kwargs == [{"enable_thinking": False, "reasoning_effort": "low"}]
