"""Grammars: what they allow, where schemas are wrong, and what is compiled when."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from agentserve.config import REASONING_PARSERS as REASONING_OPTIONS
from agentserve.config import TOOL_CALL_PARSERS as TOOL_OPTIONS
from agentserve.errors import EngineError, InvalidGrammarError, InvalidRequestError
from agentserve.text.grammar.compiler import CompiledGrammar, GrammarCompiler
from agentserve.text.grammar.masks import GrammarMasks
from agentserve.text.grammar.source import Constraint
from agentserve.text.output import REASONING_PARSERS, TOOL_PARSERS, choose_output_format
from agentserve.text.tokenizer import ByteTokenizer
from agentserve.text.tools.formats import TOOL_FORMATS
from agentserve.text.tools.spec import (
    ChoiceFormat,
    JsonObjectFormat,
    JsonSchemaFormat,
    LarkFormat,
    RegexFormat,
    ToolCallFinished,
    ToolChoice,
    ToolMode,
    ToolSpec,
)
from bench.structured.schemas import ACCEPTED, REFUSED

TOKENIZER = ByteTokenizer()
EOS = TOKENIZER.eos_token_ids[0]
WEATHER = ToolSpec(
    "weather",
    parameters={
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "unit": {"enum": ["c", "f"]}},
        "required": ["city"],
    },
    strict=True,
)
TOOLS = (WEATHER, ToolSpec("now"))
REQUIRED = ToolChoice(ToolMode.REQUIRED)
WEATHER_CALLS = {
    "hermes": '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "unit": "f"}}\n</tool_call>',
    "qwen3_coder": "<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n<parameter=unit>\nf\n"
    "</parameter>\n</function>\n</tool_call>",
    "llama3_json": '{"name": "weather", "parameters": {"city": "Rome", "unit": "f"}}',
    "llama_pythonic": '[weather(city="Rome", unit="f")]',
    "mistral": '[TOOL_CALLS]weather[ARGS]{"city": "Rome", "unit": "f"}',
    "mistral_array": '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Rome", "unit": "f"}}]',
}


@pytest.fixture
def compiler() -> Iterator[GrammarCompiler]:
    made = GrammarCompiler(TOKENIZER, choose_output_format(None, TOKENIZER))
    yield made
    made.close()


def accepts(grammar: CompiledGrammar, text: str) -> bool:
    """Whether `text` is a whole answer."""
    matcher = grammar.prototype.deep_copy()
    token_ids = TOKENIZER.encode(text)
    return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()


@pytest.mark.parametrize("name", sorted(TOOL_FORMATS))
@pytest.mark.parametrize("choice", [REQUIRED, ToolChoice(), ToolChoice(ToolMode.NAMED, "weather")])
def test_calls_are_what_the_parser_reads(name: str, choice: ToolChoice) -> None:
    output = choose_output_format(None, TOKENIZER, tool_parser=name, reasoning_parser="think")
    compiler = GrammarCompiler(TOKENIZER, output)
    try:
        call = WEATHER_CALLS[name]
        grammar = compiler.submit(Constraint(TOOLS, choice), "").result()
        assert accepts(grammar, call)
        assert accepts(grammar, f"<think>\nhm\n</think>\n\n{call}")
        assert not accepts(grammar, call.replace("weather", "whether"))
        assert not accepts(grammar, call.replace("city", "town"))
        assert accepts(grammar, "no call") == (choice.mode is ToolMode.AUTO)
        parser = output.parser(TOOLS, choice, "")
        (found,) = [p for p in [*parser.push(call), *parser.finish()] if isinstance(p, ToolCallFinished)]
        assert (found.name, json.loads(found.arguments)) == ("weather", {"city": "Rome", "unit": "f"})
    finally:
        compiler.close()


def test_one_call_or_several(compiler: GrammarCompiler) -> None:
    call = WEATHER_CALLS["hermes"]
    several = compiler.submit(Constraint(TOOLS, REQUIRED), "").result()
    one = compiler.submit(Constraint(TOOLS, ToolChoice(ToolMode.REQUIRED, parallel=False)), "").result()
    assert accepts(several, f"{call}\n{call}")
    assert accepts(one, call)
    assert not accepts(one, f"{call}\n{call}")


def test_formats(compiler: GrammarCompiler) -> None:
    def compiled(constraint: Constraint) -> CompiledGrammar:
        return compiler.submit(constraint, "").result()

    regex = compiled(Constraint(format=RegexFormat("a/b|[0-9]{2}\\/")))
    assert [accepts(regex, text) for text in ("a/b", "12/", "a", "xa/b", "")] == [True, True, False, False, False]
    choice = compiled(Constraint(format=ChoiceFormat(("yes", 'n"o'))))
    assert [accepts(choice, text) for text in ("yes", 'n"o', "ye", "yesn")] == [True, True, False, False]
    lark = compiled(Constraint(format=LarkFormat('start: "a" b\nb: /[0-9]/')))
    assert [accepts(lark, text) for text in ("a1", "a")] == [True, False]
    either = compiled(Constraint((ToolSpec("now"),), format=JsonObjectFormat()))
    assert accepts(either, '{"a": [1]}')
    assert accepts(either, '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>')
    assert not accepts(either, "text")


@pytest.mark.parametrize("name", sorted(ACCEPTED))
def test_accepted_schemas(compiler: GrammarCompiler, name: str) -> None:
    compiler.submit(Constraint(format=JsonSchemaFormat(ACCEPTED[name])), "").result()


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_schemas(compiler: GrammarCompiler, name: str) -> None:
    with pytest.raises(InvalidGrammarError, match="response_format") as caught:
        compiler.submit(Constraint(format=JsonSchemaFormat(REFUSED[name])), "").result()
    assert caught.value.param == "response_format"


def test_place_in_the_schema(compiler: GrammarCompiler) -> None:
    schema = {
        "type": "object",
        "properties": {"a/b": {"type": "array", "items": {"anyOf": [{"type": "null"}, {"not": {}}]}}},
    }
    with pytest.raises(InvalidGrammarError, match=r"\(in the schema at /properties/a~1b/items/anyOf/1\)"):
        compiler.submit(Constraint(format=JsonSchemaFormat(schema)), "").result()


def test_a_client_cannot_loosen_the_checks(compiler: GrammarCompiler) -> None:
    schema = {"not": {}, "x-guidance": {"lenient": True}}
    with pytest.raises(InvalidGrammarError, match="not"):
        compiler.submit(Constraint(format=JsonSchemaFormat(schema)), "").result()


def test_schemas_of_tools(compiler: GrammarCompiler) -> None:
    """One that is not supported is refused for a strict tool, and loosened to any object for another one."""
    parameters = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    with pytest.raises(InvalidGrammarError, match=r"tools\[0\].*/properties/a\)"):
        compiler.submit(Constraint((ToolSpec("t", "", parameters, strict=True),), REQUIRED), "").result()
    loose = compiler.submit(Constraint((ToolSpec("t", "", parameters),), REQUIRED), "").result()
    assert accepts(loose, '<tool_call>\n{"name": "t", "arguments": {"b": 1}}\n</tool_call>')
    with pytest.raises(InvalidRequestError, match="no tool 'u'"):
        compiler.submit(Constraint(TOOLS, ToolChoice(ToolMode.NAMED, "u")), "").result()


async def test_grammars_are_kept(compiler: GrammarCompiler) -> None:
    constraint = Constraint(format=JsonObjectFormat())
    first = await compiler.compile(constraint, "")
    assert await compiler.compile(Constraint(format=JsonObjectFormat()), "x") is first
    assert (compiler.num_compiled, compiler.num_hits) == (1, 1)
    assert await compiler.compile(Constraint(TOOLS[1:]), "") is None


def test_no_more_than_so_many_are_kept() -> None:
    compiler = GrammarCompiler(TOKENIZER, choose_output_format(None, TOKENIZER), num_kept=2)
    try:
        for text in ("a", "b", "c", "c", "a"):
            compiler.submit(Constraint(format=ChoiceFormat((text,))), "").result()
        assert (compiler.num_compiled, compiler.num_hits) == (4, 1)  # a was dropped for c
    finally:
        compiler.close()


def allowed(mask: bytes) -> list[int]:
    return [token_id for token_id in range(len(mask) * 8) if mask[token_id // 8] >> token_id % 8 & 1]


def test_masks_follow_the_tokens(compiler: GrammarCompiler) -> None:
    grammar = compiler.submit(Constraint(format=ChoiceFormat(("ab", "ac"))), "").result()
    masks = GrammarMasks()
    try:
        masks.open("r", grammar)
        assert allowed(masks.mask("r", 0)) == [ord("a")]
        masks.accept("r", ord("a"))
        assert allowed(masks.mask("r", 1)) == [ord("b"), ord("c")]
        with pytest.raises(EngineError, match="is at token 1"):
            masks.mask("r", 0)
        masks.accept("r", ord("c"))
        assert allowed(masks.mask("r", 2)) == sorted(TOKENIZER.eos_token_ids)
        masks.accept("r", EOS)
        assert masks.close("r") is None
        with pytest.raises(EngineError, match="no grammar"):
            masks.mask("r", 3)
    finally:
        masks.shutdown()


def test_a_grammar_that_gives_up_ends_the_request(compiler: GrammarCompiler) -> None:
    masks = GrammarMasks()
    try:
        masks.open("r", compiler.submit(Constraint(format=ChoiceFormat(("ab",))), "").result())
        masks.mask("r", 0)
        masks.accept("r", ord("x"))  # what no sampler does
        assert allowed(masks.mask("r", 1)) == sorted(TOKENIZER.eos_token_ids)
        problem = masks.close("r")
        assert problem is not None and "could not be followed" in problem
    finally:
        masks.shutdown()


def test_the_options_name_all_parsers() -> None:
    assert set(TOOL_OPTIONS) == set(TOOL_PARSERS)
    assert set(REASONING_OPTIONS) == set(REASONING_PARSERS)


# ---- reasoning ----


def test_a_trigger_within_a_thought_does_not_start_the_grammar() -> None:
    """Also where the tags are ordinary text to the tokenizer, and whoever opened the thought."""
    call = WEATHER_CALLS["hermes"]
    output = choose_output_format(None, TOKENIZER, reasoning_parser="think")
    compiler = GrammarCompiler(TOKENIZER, output)
    try:
        grammar = compiler.submit(Constraint(TOOLS), "").result()
        thought = "<think>I could write <tool_call> or <tool_call>{no JSON}</tool_call>.</think>"
        for text in (
            "no call",
            "",
            "<thin",
            "<thinker",
            "a <think> b",
            call,
            f"a {call}\n{call} b",
            "<think>a</think>b",
        ):
            assert accepts(grammar, text), text
        assert accepts(grammar, f"{thought}\n\n{call}")
        assert accepts(grammar, f"{thought}no call")
        assert not accepts(grammar, f"{thought}\n\n{call.replace('city', 'town')}")
        assert not accepts(grammar, f"{thought}<tool_call>{{no JSON}}</tool_call>")
        assert not accepts(grammar, thought.removesuffix("</think>"))  # a thought has to end
        opened = compiler.submit(Constraint(TOOLS), "...<think>\n").result()
        assert accepts(opened, f"{thought.removeprefix('<think>')}{call}")
        assert not accepts(opened, call)
        # Where nobody looks for reasoning there is none.
        plain = compiler.submit(Constraint(format=JsonObjectFormat(), may_reason=False), "<think>").result()
        assert accepts(plain, "{}")
        assert not accepts(plain, "<think>a</think>{}")
    finally:
        compiler.close()


@pytest.mark.parametrize("name", ["llama3_json", "llama_pythonic"])
def test_formats_without_a_trigger_behind_a_thought(name: str) -> None:
    output = choose_output_format(None, TOKENIZER, tool_parser=name, reasoning_parser="think")
    compiler = GrammarCompiler(TOKENIZER, output)
    try:
        grammar = compiler.submit(Constraint(TOOLS), "").result()
        call = WEATHER_CALLS[name]
        assert accepts(grammar, f"<think>{{[</think>{call}")
        assert not accepts(grammar, f"<think>{{[</think>{call.replace('city', 'town')}")
        assert accepts(grammar, "<think>{[</think>no call")
    finally:
        compiler.close()


def test_a_pattern_behind_a_thought() -> None:
    compiler = GrammarCompiler(TOKENIZER, choose_output_format(None, TOKENIZER, reasoning_parser="think"))
    try:
        grammar = compiler.submit(Constraint(format=RegexFormat("(?s:.){1,4}")), "").result()
        assert [accepts(grammar, text) for text in ("ab", "abcde", "<think>long thoughts</think>ab")] == [
            True,
            False,
            True,
        ]
        assert not accepts(grammar, "<think>long thoughts</think>abcde")
    finally:
        compiler.close()


# ---- bare text ----


def strict_tool(schema: Any) -> ToolSpec:
    shared = {key: value for key, value in schema.items() if key == "$defs"}
    value = {key: value for key, value in schema.items() if key != "$defs"}
    parameters = {"type": "object", "properties": {"v": value}, "required": ["v"], **shared}
    return ToolSpec("t", "", parameters, strict=True)


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "string", "maxLength": 3}, ["", "abc", "a\nb", "é\n\n"], ["abcd", "</parameter>"]),
        ({"type": "string", "minLength": 2}, ["ab", "</param"], ["", "a"]),
        ({"type": "string", "pattern": "^[A-Z]{2}/[0-9]+$"}, ["AB/1", "AB/123"], ["ab/1", "AB/", "xAB/1"]),
        ({"type": "string", "pattern": "[0-9]{2}"}, ["12", "a12b"], ["a1b"]),
        ({"type": "string", "pattern": "^(yes|no)", "maxLength": 5}, ["yes", "no!", "yesno"], ["yesnono", "maybe"]),
        ({"enum": ["a", "b c"]}, ["a", "b c"], ["c", "a "]),
        ({"enum": ["a", 1, None]}, ["a", "1", "null"], ["2", "b"]),
        ({"const": "x"}, ["x"], ["y"]),
        ({"type": ["string", "null"], "maxLength": 2}, ["ab", "null"], ["abc"]),
        ({"anyOf": [{"type": "string", "maxLength": 2}, {"type": "null"}]}, ["ab", "null"], ["abc"]),
        ({"$ref": "#/$defs/s", "$defs": {"s": {"type": "string", "maxLength": 2}}}, ["ab"], ["abc"]),
        ({"type": "string"}, ["anything", "x\n<parameter"], ["x\n<parameter=a>", "x</parameter>"]),
    ],
)
def test_bare_text_of_strict_tools(schema: Any, good: list[str], bad: list[str]) -> None:
    """What is allowed is read as a value that fits the schema, and all of it is read."""
    output = choose_output_format(None, TOKENIZER, tool_parser="qwen3_coder")
    compiler = GrammarCompiler(TOKENIZER, output)
    tool = strict_tool(schema)
    try:
        grammar = compiler.submit(Constraint((tool,), REQUIRED), "").result()
        for value in good + bad:
            call = f"<tool_call>\n<function=t>\n<parameter=v>\n{value}\n</parameter>\n</function>\n</tool_call>"
            assert accepts(grammar, call) == (value in good), value
            if value in good:
                parser = output.parser((tool,), REQUIRED, "")
                (found,) = [p for p in [*parser.push(call), *parser.finish()] if isinstance(p, ToolCallFinished)]
                arguments = json.loads(found.arguments)
                jsonschema.validate(arguments, dict(tool.parameters or {}))
                assert str(arguments["v"]) in (value, "None")
    finally:
        compiler.close()


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"type": "string", "format": "date"}, "format"),
        ({"type": ["string", "integer"], "maxLength": 2}, "maxLength"),
        ({"anyOf": [{"type": "string", "maxLength": 2}, {"type": "integer"}]}, "integer"),
        ({"type": "string", "pattern": "a|^b$"}, "pattern"),
        ({"enum": ["1", 1]}, "enum"),
    ],
)
def test_bare_text_that_cannot_be_enforced(schema: Any, keyword: str) -> None:
    compiler = GrammarCompiler(TOKENIZER, choose_output_format(None, TOKENIZER, tool_parser="qwen3_coder"))
    try:
        with pytest.raises(InvalidGrammarError, match=rf"tools\[0\].*{keyword}.*/properties/v"):
            compiler.submit(Constraint((strict_tool(schema),), REQUIRED), "").result()
        loose = ToolSpec("t", "", {"type": "object", "properties": {"v": schema}})
        compiler.submit(Constraint((loose,), REQUIRED), "").result()
    finally:
        compiler.close()
