"""Tools as text: what the model is shown is what the parser reads, in every format."""

from __future__ import annotations

import json
from typing import Any

import pytest

from agentserve.server.prompt import PromptBuilder
from agentserve.server.tool_text import with_tools_as_text
from agentserve.server.types import ChatPrompt
from agentserve.text.chat import CHATML, ChatTemplate
from agentserve.text.tokenizer import ByteTokenizer
from agentserve.text.tools.formats import TOOL_FORMATS
from agentserve.text.tools.spec import TextPiece, ToolCallFinished, ToolSpec

TOOL = ToolSpec(
    "weather", "d", {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
)
CALLS = [("weather", {"city": 'Rio "de" J\nã', "days": 3}), ("weather", {}), ("weather", {"city": "x"})]


def read(name: str, text: str, tools: list[ToolSpec]) -> list[Any]:
    parser = TOOL_FORMATS[name].make_parser(tools)
    pieces = [*parser.push(text), *parser.finish()]
    assert not [piece for piece in pieces if isinstance(piece, TextPiece)], text
    calls = [piece for piece in pieces if isinstance(piece, ToolCallFinished)]
    assert all(call.complete for call in calls)
    return [(call.name, json.loads(call.arguments)) for call in calls]


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("name", sorted(TOOL_FORMATS))
def test_calls_are_shown_as_they_are_read(name: str, as_text: bool) -> None:
    calls = [
        {"function": {"name": called, "arguments": json.dumps(value) if as_text else value}} for called, value in CALLS
    ]
    messages = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "", "tool_calls": calls}]
    shown = with_tools_as_text(messages, [], name)[1]
    assert "tool_calls" not in shown
    assert read(name, shown["content"], [TOOL]) == CALLS


@pytest.mark.parametrize("name", sorted(TOOL_FORMATS))
def test_the_example_is_a_call(name: str) -> None:
    (system, _) = with_tools_as_text([{"role": "user", "content": "u"}], [TOOL.for_template()], name)
    example = system["content"].split(":\n")[-1]
    tool = ToolSpec("the_name_of_the_function")
    assert read(name, example, [tool]) == [("the_name_of_the_function", {"the_name_of_an_argument": "its value"})]


@pytest.mark.parametrize("name", sorted(TOOL_FORMATS))
def test_what_a_model_got_wrong_is_shown_to_it(name: str) -> None:
    call = {"function": {"name": "weather", "arguments": '{"city": "Rom'}}
    (shown,) = with_tools_as_text([{"role": "assistant", "content": "", "tool_calls": [call]}], [], name)
    assert '{"city": "Rom' in shown["content"]


@pytest.mark.parametrize(
    ("name", "mark"), [("hermes", "<tool_call>\n{"), ("mistral", "[ARGS]"), (None, "<tool_call>\n{")]
)
def test_the_prompt_has_the_format_of_the_parser(name: str | None, mark: str) -> None:
    tokenizer = ByteTokenizer()
    builder = PromptBuilder(tokenizer, ChatTemplate({"default": CHATML}, {}), tool_format=name)
    prompt = ChatPrompt(({"role": "user", "content": "u"},), tools=(TOOL,))
    assert mark in builder.build(prompt).text
