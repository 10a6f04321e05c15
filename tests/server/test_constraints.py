"""The form of an answer: what reaches the engine with a grammar, and what is refused."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.server.scripted import replying, serve
from tests.server.test_chat_tools import HELLO, ONE, TOOLS

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.mark.parametrize(
    "options",
    [
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}},
        {"tools": TOOLS, "tool_choice": "required"},
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "time"}}},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": SCHEMA, "strict": True}}]},
        {"extra_body": {"guided_json": SCHEMA}},
        {"extra_body": {"guided_regex": "[ab]+"}},
        {"extra_body": {"guided_choice": ["yes", "no"]}},
        {"extra_body": {"structured_outputs": {"json": SCHEMA}}},
    ],
)
async def test_a_form_becomes_a_grammar(options: dict[str, Any]) -> None:
    async with serve(replying("x")) as daemon:
        await daemon.openai().chat.completions.create(model="test-model", messages=HELLO, **options)
        assert daemon.driver.submitted[0].sampling.constrained


@pytest.mark.parametrize("options", [{}, {"tools": TOOLS}, {"response_format": {"type": "text"}}])
async def test_free_text_has_none(options: dict[str, Any]) -> None:
    async with serve(replying("x")) as daemon:
        await daemon.openai().chat.completions.create(model="test-model", messages=HELLO, **options)
        assert not daemon.driver.submitted[0].sampling.constrained


async def test_all_dialects() -> None:
    async with serve(replying(ONE), max_model_len=1000) as daemon:
        form: dict[str, Any] = {"type": "json_schema", "schema": SCHEMA}
        await daemon.openai().responses.create(
            model="test-model",
            input="hi",
            text={"format": form | {"name": "n"}},  # type: ignore[typeddict-item, arg-type]
        )
        await daemon.openai().completions.create(
            model="test-model", prompt="hi", extra_body={"response_format": {"type": "json_object"}}
        )
        client = daemon.anthropic()
        await client.messages.create(
            model="claude-x", max_tokens=99, messages=HELLO, extra_body={"output_config": {"format": form}}
        )
        message = await client.messages.create(
            model="claude-x",
            max_tokens=99,
            messages=HELLO,
            tools=[{"name": "weather", "input_schema": {"type": "object"}}],
            tool_choice={"type": "any"},
        )
        assert message.stop_reason == "tool_use"
        assert [submitted.sampling.constrained for submitted in daemon.driver.submitted] == [True] * 4


@pytest.mark.parametrize(
    "options",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "no such type"}}}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"dependencies": {"a": ["b"]}}}}},
        {"extra_body": {"guided_regex": "(["}},
        {"extra_body": {"guided_grammar": "start: nothing_of_this"}},
    ],
)
async def test_what_cannot_be_enforced_is_refused(options: dict[str, Any]) -> None:
    async with serve() as daemon:
        with pytest.raises(openai.BadRequestError) as refused:
            await daemon.openai().chat.completions.create(model="test-model", messages=HELLO, stream=True, **options)
        assert refused.value.param
        assert not daemon.driver.submitted
