"""`/v1/responses` with the official SDK."""

from __future__ import annotations

import json
from typing import Any

import aiohttp
import openai
import pytest

from agentserve.core.request import FinishReason
from tests.server.scripted import MAX_MODEL_LEN, Run, replying, serve
from tests.server.test_streams import Gate

SCHEMA: dict[str, Any] = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS: list[Any] = [
    {"type": "function", "name": "weather", "parameters": SCHEMA, "strict": False},
    {
        "type": "custom",
        "name": "apply_patch",
        "format": {"type": "grammar", "syntax": "lark", "definition": "start: X"},
    },
    {
        "type": "namespace",
        "name": "crm",
        "description": "d",
        "tools": [{"type": "function", "name": "find", "parameters": SCHEMA}],
    },
    {"type": "web_search"},
    {"type": "image_generation"},
    {"type": "tool_search"},
]


def call(name: str, arguments: dict[str, Any]) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


FULL = "<think>\nhm\n</think>\n\nLet me look.\n" + "\n".join(
    [call("weather", {"city": "Paris"}), call("apply_patch", {"input": "a\nb"}), call("crm__find", {"city": "Rome"})]
)
TYPES = ["reasoning", "message", "function_call", "custom_tool_call", "function_call"]


def check_items(output: list[Any]) -> None:
    """`output` is that of the answer FULL."""
    assert [item.type for item in output] == TYPES
    assert output[0].content[0].text == "hm"
    assert output[1].content[0].text == "Let me look."
    assert (output[2].name, json.loads(output[2].arguments)) == ("weather", {"city": "Paris"})
    assert (output[3].name, output[3].input) == ("apply_patch", "a\nb")
    assert (output[4].name, output[4].namespace) == ("find", "crm")
    assert all(item.status == "completed" for item in output)
    assert len({item.id for item in output}) == 5


async def test_whole() -> None:
    async with serve(replying(FULL, num_cached_tokens=16), max_model_len=2000) as daemon:
        response = await daemon.openai().responses.create(
            model="test-model", input="hi", instructions="S", tools=TOOLS, store=False
        )
        check_items(response.output)
        assert response.status == "completed"
        assert response.output_text == "Let me look."
        assert response.store is False  # type: ignore[attr-defined]
        usage = response.usage
        assert usage is not None
        prompt = b"<tools>weather,apply_patch,crm__find<system>S<user>hi<assistant>"
        assert bytes(daemon.driver.submitted[0].prompt_token_ids) == prompt
        assert (usage.input_tokens, usage.input_tokens_details.cached_tokens) == (len(prompt), 16)
        assert usage.output_tokens == len(FULL) + 1
        assert usage.output_tokens_details.reasoning_tokens > 0


async def test_stream() -> None:
    async with serve(replying(FULL), max_model_len=2000) as daemon:
        stream = await daemon.openai().responses.create(model="test-model", input="hi", tools=TOOLS, stream=True)
        events: list[Any] = [event async for event in stream]
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
        last = events[-1]
        assert last.type == "response.completed"
        check_items(last.response.output)
        added = [event.item for event in events if event.type == "response.output_item.added"]
        done = [event.item for event in events if event.type == "response.output_item.done"]
        assert [item.type for item in added] == [item.type for item in done] == TYPES
        assert [item.id for item in added] == [item.id for item in done]
        check_items(done)
        arguments = ["" for _ in TYPES]
        for event in events:
            if event.type == "response.function_call_arguments.delta":
                arguments[event.output_index] += event.delta
        assert json.loads(arguments[2]) == {"city": "Paris"}
        assert json.loads(arguments[4]) == {"city": "Rome"}


async def test_the_sdk_puts_a_stream_together() -> None:
    async with (
        serve(replying("Hello"), max_model_len=2000) as daemon,
        daemon.openai().responses.stream(model="test-model", input="hi") as stream,
    ):
        final = await stream.get_final_response()
        assert final.output_text == "Hello"


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_is_cut_off_is_incomplete(stream: bool) -> None:
    async with serve(replying(FULL), max_model_len=2000) as daemon:
        limit = FULL.index("Paris") + 2
        response: Any = await daemon.openai().responses.create(
            model="test-model", input="hi", tools=TOOLS, max_output_tokens=limit, stream=stream
        )
        if stream:
            events: list[Any] = [event async for event in response]
            assert events[-1].type == "response.incomplete"
            assert "function_call" not in [e.item.type for e in events if e.type == "response.output_item.done"]
            response = events[-1].response
        assert response.status == "incomplete"
        assert response.incomplete_details.reason == "max_output_tokens"
        # Half a call is never shown as one.
        assert [item.type for item in response.output] == ["reasoning", "message"]


async def test_what_a_coding_agent_sends() -> None:
    """The whole history in items of all types; thoughts come back sealed."""
    async with serve(replying("<think>\nhm\n</think>\n\nok"), max_model_len=2000) as daemon:
        client = daemon.openai()
        first = await client.responses.create(
            model="test-model", input="hi", include=["reasoning.encrypted_content"], store=False
        )
        reasoning: Any = first.output[0]
        assert reasoning.encrypted_content
        items: list[Any] = [
            {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "D"}]},
            {"role": "user", "content": "hi"},
            {"type": "reasoning", "summary": [], "encrypted_content": reasoning.encrypted_content},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "ok"}]},
            {"type": "function_call", "call_id": "1", "name": "weather", "arguments": '{"city": "Rom"}'},
            {"type": "custom_tool_call", "call_id": "2", "name": "apply_patch", "input": "x"},
            {"type": "function_call", "call_id": "3", "name": "find", "namespace": "crm", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "1", "output": "21"},
            {"type": "custom_tool_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "done"}]},
            {"type": "function_call_output", "call_id": "3", "output": [{"type": "input_image", "image_url": "x"}]},
            {"type": "web_search_call", "id": "w", "status": "completed"},
            {"type": "reasoning", "summary": [], "encrypted_content": "of another server"},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "go"}]},
        ]
        await client.responses.create(
            model="test-model",
            instructions="S",
            input=items,
            parallel_tool_calls=False,
            prompt_cache_key="session-1",
            reasoning={"effort": "medium", "summary": "auto"},
            extra_body={"client_metadata": {"x": "y"}, "text": {"verbosity": "low"}},
        )
        submitted = daemon.driver.submitted[1]
        assert submitted.session_id == "session-1"
        assert bytes(submitted.prompt_token_ids).decode() == (
            "<system>S\n\nD<user>hi"
            '<assistant>(hm)ok[weather {"city": "Rom"}][apply_patch {"input": "x"}][crm__find {}]'
            "<tool>21<tool>done<tool>[input_image left out: this model reads text only]<user>go<assistant>"
        )


async def test_silence_is_filled_with_events() -> None:
    gate = Gate()
    async with serve(gate, sse_ping_interval_s=0.002) as daemon:
        stream = await daemon.openai().responses.create(model="test-model", input="hi", stream=True)
        kinds: list[str] = []
        numbers: list[int] = []
        async for event in stream:
            kinds.append(event.type)
            numbers.append(event.sequence_number)
            if len(kinds) == 5:
                gate.go_on.set()
        assert kinds[:5] == ["response.created"] + ["response.in_progress"] * 4
        assert kinds[-1] == "response.completed"
        assert numbers == list(range(len(numbers)))


async def test_a_failure_ends_the_stream_with_an_event() -> None:
    async def script(run: Run) -> None:
        run.token(65)
        run.finish(FinishReason.ERROR, "the device is on fire")

    async with serve(script) as daemon:
        stream = await daemon.openai().responses.create(model="test-model", input="hi", stream=True)
        events: list[Any] = [event async for event in stream]
        assert events[-1].type == "response.failed"
        assert events[-1].response.error.message == "the device is on fire"


async def test_overflow_and_state() -> None:
    async with serve() as daemon:
        client = daemon.openai()
        with pytest.raises(openai.BadRequestError) as overflow:
            await client.responses.create(model="test-model", input="x" * MAX_MODEL_LEN, stream=True)
        assert overflow.value.code == "context_length_exceeded"
        for name in ("previous_response_id", "conversation"):
            fields: dict[str, Any] = {name: "x"}
            with pytest.raises(openai.BadRequestError) as state:
                await client.responses.create(model="test-model", input="hi", **fields)
            assert (state.value.param, state.value.code) == (name, "unsupported_parameter")


async def test_input_tokens_are_exact_and_free() -> None:
    async with serve() as daemon:
        client = daemon.openai()
        counted = await client.responses.input_tokens.count(model="test-model", input="hi", tools=TOOLS)
        assert not daemon.driver.submitted
        await client.responses.create(model="test-model", input="hi", tools=TOOLS)
        assert counted.input_tokens == len(daemon.driver.submitted[0].prompt_token_ids)


async def test_logprobs() -> None:
    async with serve(replying("ab")) as daemon:
        response = await daemon.openai().responses.create(
            model="test-model", input="hi", include=["message.output_text.logprobs"], top_logprobs=1
        )
        part: Any = response.output[0].content[0]  # type: ignore[union-attr, index]
        assert [entry.token for entry in part.logprobs] == ["a", "b"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [3]}, "input[0]"),
        ({"input": [{"type": 3}]}, "input[0].type"),
        ({"input": [{"role": "narrator", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call_output"}]}, "input[0].call_id"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        ({"input": [{"type": "web_search_call"}]}, "input"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{"type": []}]}, "tools[0].type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "g"}}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format.type"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "x"}}, "prompt"),
        ({"max_output_tokens": 0}, "max_tokens"),
        ({"temperature": "hot"}, "temperature"),
    ],
)
async def test_wrong_fields_are_named(fields: dict[str, Any], param: str) -> None:
    async with serve() as daemon, aiohttp.ClientSession() as session:
        async with session.post(f"{daemon.url}/v1/responses", json={"input": "hi"} | fields) as response:
            answer = await response.json()
            assert (response.status, answer["error"]["param"]) == (400, param), answer
        assert not daemon.driver.submitted
