"""`/v1/messages` with the official SDK."""

from __future__ import annotations

import json
from typing import Any

import aiohttp
import anthropic
import pytest

from agentserve.core.request import FinishReason
from tests.server.scripted import MAX_MODEL_LEN, Run, replying, serve

HELLO: list[Any] = [{"role": "user", "content": "hi"}]
TOOLS: list[Any] = [
    {"name": "weather", "description": "d", "input_schema": {"type": "object", "properties": {}}},
    {"type": "web_search_20250305", "name": "web_search"},
]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
FULL = "<think>\nhm\n</think>\n\nLet me look.\n" + CALL


async def test_whole() -> None:
    async with serve(replying(FULL, num_cached_tokens=16)) as daemon:
        message = await daemon.anthropic().messages.create(
            model="claude-sonnet", max_tokens=150, messages=HELLO, tools=TOOLS
        )
        assert message.model == "claude-sonnet"
        assert message.stop_reason == "tool_use"
        thinking, text, call = message.content
        assert thinking.type == "thinking" and thinking.thinking == "hm" and thinking.signature
        assert text.type == "text" and text.text == "Let me look."
        assert call.type == "tool_use" and call.name == "weather" and call.input == {"city": "Paris"}
        assert call.id.startswith("toolu_")
        usage = message.usage
        # "<tools>weather" + "<user>hi" + "<assistant>": 14 + 8 + 11; 16 of them were there already
        assert (usage.input_tokens, usage.cache_read_input_tokens) == (33 - 16, 16)
        assert usage.output_tokens == len(FULL) + 1


async def test_stream_events_by_name() -> None:
    async with serve(replying(FULL, num_cached_tokens=16)) as daemon, aiohttp.ClientSession() as session:
        body = {"model": "m", "max_tokens": 150, "messages": HELLO, "tools": TOOLS, "stream": True}
        async with session.post(f"{daemon.url}/v1/messages?beta=true", json=body | {"model": "claude-x"}) as response:
            assert response.status == 200
            frames = (await response.text()).strip().split("\n\n")
        events = []
        for frame in frames:
            name, data = frame.split("\n")
            event = json.loads(data.removeprefix("data: "))
            assert name == f"event: {event['type']}"
            events.append(event)
        kinds = [event["type"] for event in events if event["type"] != "content_block_delta"]
        assert kinds == [
            "message_start",
            "ping",
            *["content_block_start", "content_block_stop"] * 3,
            "message_delta",
            "message_stop",
        ]
        starts = [event for event in events if event["type"] == "content_block_start"]
        assert [start["index"] for start in starts] == [0, 1, 2]
        assert [start["content_block"]["type"] for start in starts] == ["thinking", "text", "tool_use"]
        assert starts[2]["content_block"]["input"] == {}


async def test_stream_as_the_sdk_sees_it() -> None:
    async with (
        serve(replying(FULL, num_cached_tokens=16)) as daemon,
        daemon.anthropic().messages.stream(model="claude-x", max_tokens=150, messages=HELLO, tools=TOOLS) as stream,
    ):
        final = await stream.get_final_message()
        assert [block.type for block in final.content] == ["thinking", "text", "tool_use"]
        assert final.content[2].input == {"city": "Paris"}  # type: ignore[union-attr]
        assert final.stop_reason == "tool_use"
        assert (final.usage.input_tokens, final.usage.cache_read_input_tokens) == (17, 16)


@pytest.mark.parametrize(
    ("options", "reason", "stop_sequence"),
    [
        ({}, "end_turn", None),
        ({"max_tokens": 3}, "max_tokens", None),
        ({"stop_sequences": ["lo"]}, "stop_sequence", "lo"),
    ],
)
async def test_stop_reasons(options: dict[str, Any], reason: str, stop_sequence: str | None) -> None:
    async with serve(replying("Hello")) as daemon:
        merged: dict[str, Any] = {"model": "test-model", "max_tokens": 20, "messages": HELLO} | options
        client = daemon.anthropic()
        message = await client.messages.create(**merged)
        assert (message.stop_reason, message.stop_sequence) == (reason, stop_sequence)
        async with client.messages.stream(**merged) as stream:
            streamed = await stream.get_final_message()
        assert (streamed.stop_reason, streamed.stop_sequence) == (reason, stop_sequence)


async def test_more_tokens_than_the_window_has_are_no_error() -> None:
    """Clients of this dialect always send what the model that they know could write."""
    async with serve(replying("x" * MAX_MODEL_LEN)) as daemon:
        message = await daemon.anthropic().messages.create(
            model="claude-x", max_tokens=32_000, messages=HELLO, timeout=60
        )
        assert message.stop_reason == "model_context_window_exceeded"
        # "<user>hi<assistant>" has 19 tokens
        assert message.usage.output_tokens == MAX_MODEL_LEN - 19


async def test_what_an_agent_sends() -> None:
    """Billing header, markers of the cache, late system messages, results of tools, thoughts of others."""
    system = [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2; cch=0a1b2;"},
        {"type": "text", "text": "You are an agent.", "cache_control": {"type": "ephemeral"}},
    ]
    messages: list[Any] = [
        {"role": "user", "content": [{"type": "text", "text": "go", "cache_control": {"type": "ephemeral"}}]},
        {"role": "system", "content": "a reminder"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "of another server"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "ok"},
                {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Rom"}},
                {"type": "tool_use", "id": "toolu_2", "name": "weather", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "and hurry"},
                {
                    "type": "tool_result",
                    "tool_use_id": "toolu_1",
                    "content": [
                        {"type": "text", "text": "21"},
                        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}},
                        {"type": "tool_reference", "tool_name": "time"},
                    ],
                },
                {"type": "tool_result", "tool_use_id": "toolu_2", "content": "no city", "is_error": True},
            ],
        },
    ]
    async with serve(max_model_len=1000) as daemon:
        await daemon.anthropic().messages.create(
            model="claude-x",
            max_tokens=50,
            system=system,  # type: ignore[arg-type]
            messages=messages,
            tools=TOOLS,
            thinking={"type": "adaptive"},
            metadata={"user_id": "user_1_account__session_0123-abcd"},
            extra_headers={"anthropic-beta": "never-heard-of-2099"},
            extra_body={"output_config": {"effort": "high"}, "context_management": {}},
        )
        submitted = daemon.driver.submitted[0]
        assert submitted.session_id == "0123-abcd"
        assert bytes(submitted.prompt_token_ids).decode() == (
            "<tools>weather<system>You are an agent."
            "<user>go\n\n<system-reminder>\na reminder\n</system-reminder>"
            '<assistant>(hm)ok[weather {"city": "Rom"}][weather {}]'
            "<tool>21\n[image left out: this model reads text only]\ntool: time"
            "<tool>Error: no city<user>and hurry<assistant>"
        )


async def test_cache_control_and_billing_header_do_not_change_the_prompt() -> None:
    async with serve(max_model_len=1000) as daemon:
        client = daemon.anthropic()
        for number in range(2):
            marker: dict[str, Any] = {"cache_control": {"type": "ephemeral"}} if number else {}
            await client.messages.create(
                model="claude-x",
                max_tokens=50,
                system=[
                    {"type": "text", "text": f"x-anthropic-billing-header: cch={number}"},
                    {"type": "text", "text": "S", **marker},  # type: ignore[typeddict-item]
                ],
                messages=[{"role": "user", "content": [{"type": "text", "text": "hi", **marker}]}],
            )
        first, second = daemon.driver.submitted
        assert first.prompt_token_ids == second.prompt_token_ids


async def test_an_answer_that_the_client_has_begun() -> None:
    async with serve(replying("b}")) as daemon:
        message = await daemon.anthropic().messages.create(
            model="claude-x", max_tokens=50, messages=[*HELLO, {"role": "assistant", "content": "{a "}]
        )
        assert message.content[0].text == "b}"  # type: ignore[union-attr]
        assert bytes(daemon.driver.submitted[0].prompt_token_ids) == b"<user>hi<assistant>{a"


@pytest.mark.parametrize(
    ("choice", "num_calls"), [({"type": "auto", "disable_parallel_tool_use": True}, 1), ({"type": "none"}, 0)]
)
async def test_tool_choice(choice: Any, num_calls: int) -> None:
    async with serve(replying(CALL + "\n" + CALL)) as daemon:
        message = await daemon.anthropic().messages.create(
            model="claude-x", max_tokens=150, messages=HELLO, tools=TOOLS, tool_choice=choice
        )
        assert sum(block.type == "tool_use" for block in message.content) == num_calls


async def test_count_tokens_is_exact_and_free() -> None:
    async with serve() as daemon:
        client = daemon.anthropic()
        counted = await client.messages.count_tokens(model="claude-x", system="S", messages=HELLO, tools=TOOLS)
        assert not daemon.driver.submitted
        await client.messages.create(model="claude-x", max_tokens=50, system="S", messages=HELLO, tools=TOOLS)
        assert counted.input_tokens == len(daemon.driver.submitted[0].prompt_token_ids)


async def test_errors_have_the_shape_of_the_dialect() -> None:
    async with serve(max_queued_requests=0, api_key="k") as daemon:
        with pytest.raises(anthropic.AuthenticationError):
            await daemon.anthropic().messages.create(model="claude-x", max_tokens=5, messages=HELLO)
        client = daemon.anthropic(api_key="k")
        with pytest.raises(anthropic.BadRequestError, match="messages") as wrong:
            await client.messages.create(model="claude-x", max_tokens=5, messages=[])
        assert wrong.value.body == {
            "type": "error",
            "error": {"type": "invalid_request_error", "message": wrong.value.body["error"]["message"]},  # type: ignore[index]
            "request_id": wrong.value.request_id,
        }
        with pytest.raises(anthropic.NotFoundError) as unknown:
            await client.messages.create(model="gpt-9", max_tokens=5, messages=HELLO)
        assert unknown.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]
        long: list[Any] = [{"role": "user", "content": "x" * MAX_MODEL_LEN}]
        with pytest.raises(anthropic.BadRequestError, match=f"prompt is too long: 217 tokens > {MAX_MODEL_LEN} max"):
            await client.messages.create(model="claude-x", max_tokens=5, messages=long)
        with pytest.raises(anthropic.APIStatusError) as full:
            await client.messages.create(model="claude-x", max_tokens=5, messages=HELLO)
        assert full.value.status_code == 503
        assert full.value.body["error"]["type"] == "overloaded_error"  # type: ignore[index]
        assert full.value.response.headers["Retry-After"] == "5"
        bearer = anthropic.AsyncAnthropic(base_url=daemon.url, auth_token="k", max_retries=0)
        async with bearer:
            assert (await bearer.messages.count_tokens(model="claude-x", messages=HELLO)).input_tokens == 19


async def test_an_engine_failure_within_a_stream() -> None:
    async def script(run: Run) -> None:
        run.token(65)
        run.finish(FinishReason.ERROR, "the device is on fire")

    async with serve(script) as daemon:
        with pytest.raises(anthropic.APIStatusError, match="the device is on fire"):
            async with daemon.anthropic().messages.stream(model="claude-x", max_tokens=5, messages=HELLO) as stream:
                await stream.get_final_message()


async def test_discovery_lists_names_that_the_client_takes() -> None:
    async with serve(aliases=("claude-own",)) as daemon:
        models = [model async for model in daemon.anthropic().models.list()]
        assert [model.id for model in models] == ["claude-test-model", "claude-own"]
        assert [model.id async for model in daemon.openai().models.list()] == ["test-model", "claude-own"]


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [3]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "'image'"),
        ({"messages": [{"role": "user", "content": [{"type": {}}]}]}, "unknown"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "tool_use_id"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use"}]}]}, "content[0].id"),
        ({"system": 3}, "system"),
        ({"system": [{"type": "image"}]}, "system[0]"),
        ({"tools": [{"name": "f"}, {"name": "f"}]}, "two tools"),
        ({"tools": [{"name": 3}]}, "tools[0].name"),
        ({"tool_choice": {"type": "any"}}, "no tools"),
        ({"tool_choice": {"type": []}}, "tool_choice.type"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"output_format": {"type": "x"}}, "output_format.type"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
    ],
)
async def test_wrong_fields_are_named(fields: dict[str, Any], part: str) -> None:
    async with serve() as daemon, aiohttp.ClientSession() as session:
        body = {"model": "claude-x", "max_tokens": 5, "messages": HELLO} | fields
        async with session.post(f"{daemon.url}/v1/messages", json=body) as response:
            answer = await response.json()
            assert response.status == 400, answer
            assert part in answer["error"]["message"]
        assert not daemon.driver.submitted
