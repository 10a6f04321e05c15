"""Schemas over HTTP, by the real SDKs: answers that fit, and refusals in the words of each dialect."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import anthropic
import jsonschema
import openai
import pytest

from agentserve.text.reasoning import THINK
from bench.structured.schemas import ACCEPTED, REFUSED
from tests.server.scripted import serve as serve_scripted
from tests.server.simulated import serve

HELLO: list[Any] = [{"role": "user", "content": "hi"}]
CLOSED = jsonschema.Draft202012Validator.FORMAT_CHECKER


def chat_format(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}


async def test_schemas_that_cannot_be_enforced_are_refused_in_each_dialect() -> None:
    """Before a header is sent, also for a stream; nothing reaches the engine."""
    async with serve_scripted() as daemon:
        client, claude = daemon.openai(), daemon.anthropic()

        async def refused(name: str, schema: Any, stream: bool) -> None:
            flat: Any = {"type": "json_schema", "name": "n", "schema": schema}
            with pytest.raises(openai.BadRequestError) as chat:
                await client.chat.completions.create(
                    model="test-model", messages=HELLO, response_format=chat_format(schema), stream=stream
                )  # type: ignore[call-overload]
            with pytest.raises(openai.BadRequestError) as completion:
                await client.completions.create(
                    model="test-model", prompt="hi", stream=stream, extra_body={"response_format": chat_format(schema)}
                )
            with pytest.raises(openai.BadRequestError) as responses:
                await client.responses.create(model="test-model", input="hi", stream=stream, text={"format": flat})  # type: ignore[call-overload]
            for caught, field in (
                (chat, "response_format"),
                (completion, "response_format"),
                (responses, "text.format"),
            ):
                body = caught.value.body
                assert isinstance(body, dict), name
                assert set(body) == {"message", "type", "param", "code"}, name
                assert body["type"] == "invalid_request_error"
                # Either the schema cannot be enforced, or it is none at all.
                assert body["param"].startswith(field), name
                assert field in body["message"], name
            form = {"format": {"type": "json_schema", "schema": schema}}
            with pytest.raises(anthropic.BadRequestError) as message:
                await claude.messages.create(
                    model="claude-x", max_tokens=9, messages=HELLO, stream=stream, extra_body={"output_config": form}
                )
            body = message.value.body
            assert isinstance(body, dict) and set(body) == {"type", "error", "request_id"}, name
            assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
            assert "output_config.format" in body["error"]["message"], name

        for index, (name, schema) in enumerate(REFUSED.items()):
            await refused(name, schema, stream=index % 2 == 1)
        assert not daemon.driver.submitted
    assert len(REFUSED) == 25


async def test_a_strict_tool_whose_schema_cannot_be_enforced() -> None:
    parameters = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    async with serve_scripted() as daemon:
        tool: Any = {"type": "function", "function": {"name": "f", "parameters": parameters, "strict": True}}
        with pytest.raises(openai.BadRequestError, match=r"uniqueItems.*/properties/a") as refused:
            await daemon.openai().chat.completions.create(model="test-model", messages=HELLO, tools=[tool])
        assert refused.value.param == "tools[0]"
        with pytest.raises(anthropic.BadRequestError, match=r"uniqueItems.*/properties/a"):
            await daemon.anthropic().messages.create(
                model="claude-x",
                max_tokens=9,
                messages=HELLO,
                tools=[{"name": "f", "input_schema": parameters, "strict": True}],  # type: ignore[typeddict-item]
            )


async def test_answers_fit_their_schemas() -> None:
    """All schemas at once, with free requests between them; the simulated executor follows the masks."""
    async with serve(256, max_model_len=4096, num_blocks=8192, max_num_seqs=32) as daemon:
        client, claude = daemon.openai(), daemon.anthropic()

        async def answer(dialect: int, schema: Any, seed: int) -> str:
            if dialect == 0:
                chat = await client.chat.completions.create(
                    model="m", messages=HELLO, seed=seed, response_format=chat_format(schema)
                )  # type: ignore[call-overload]
                return str(chat.choices[0].message.content)
            if dialect == 1:
                flat: Any = {"type": "json_schema", "name": "n", "schema": schema}
                return (await client.responses.create(model="m", input="hi", text={"format": flat})).output_text
            form = {"format": {"type": "json_schema", "schema": schema}}
            message = await claude.messages.create(
                model="claude-x", max_tokens=4000, messages=HELLO, extra_body={"output_config": form}
            )
            (text,) = [block.text for block in message.content if block.type == "text"]
            return text

        async def free(seed: int) -> str:
            return str((await client.completions.create(model="m", prompt="hi", seed=seed, max_tokens=30)).choices[0])

        names = list(ACCEPTED)
        texts, _ = await asyncio.gather(
            asyncio.gather(*(answer(index % 3, ACCEPTED[name], index) for index, name in enumerate(names))),
            asyncio.gather(*(free(seed) for seed in range(10))),
        )
    for name, text in zip(names, texts, strict=True):
        value = json.loads(text)
        jsonschema.validate(value, ACCEPTED[name], format_checker=CLOSED)
    assert len(names) >= 50


async def test_a_form_is_enforced_behind_reasoning_that_the_prompt_has_opened() -> None:
    """The grammar and the reader of the answer agree on where the answer begins."""
    async with serve(max_model_len=2048, num_blocks=1024, reasoning=THINK) as daemon:
        answer = await daemon.openai().chat.completions.create(
            model="m",
            messages=HELLO,
            seed=3,
            max_tokens=40,
            response_format=chat_format(ACCEPTED["object"]),
            extra_body={"chat_template_kwargs": {"tail": "<think>"}},
        )  # type: ignore[call-overload]
        message = answer.choices[0].message
        # The simulated text never ends a thought, so that the answer is cut off within it: nothing of it is JSON.
        assert (answer.choices[0].finish_reason, message.content) == ("length", "")
        assert message.reasoning_content
        # A completion has no reasoning to be read: its text is JSON from the start.
        completion = await daemon.openai().completions.create(
            model="m",
            prompt="<think>",
            max_tokens=200,
            seed=3,
            extra_body={"response_format": chat_format(ACCEPTED["object"])},
        )
        jsonschema.validate(json.loads(completion.choices[0].text), ACCEPTED["object"])
