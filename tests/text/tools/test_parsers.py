"""Tool-call parsers: every format, however the text is cut, and what models get wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from agentserve.text.tools.formats import TOOL_FORMATS, detect_tool_format
from agentserve.text.tools.parser import ToolCallParser
from agentserve.text.tools.spec import (
    Piece,
    TextPiece,
    ToolArgumentsDelta,
    ToolCallFinished,
    ToolCallStarted,
    ToolSpec,
)

TOOLS = (
    ToolSpec(
        "f",
        parameters={
            "type": "object",
            "properties": {
                "s": {"type": "string"},
                "n": {"type": "integer"},
                "x": {"type": ["number", "null"]},
                "b": {"type": "boolean"},
                "o": {"type": "object"},
                "r": {"$ref": "#/$defs/list"},
            },
            "$defs": {"list": {"type": "array"}},
        },
    ),
    ToolSpec("g"),
)


def read(parser: ToolCallParser, parts: Sequence[str]) -> list[Piece]:
    pieces = [piece for part in parts for piece in parser.push(part)]
    return joined([*pieces, *parser.finish()])


def joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Neighbours of a kind put together, and call ids left out: they are random."""
    found: list[Piece] = []
    for piece in pieces:
        last = found[-1] if found else None
        if isinstance(piece, TextPiece) and isinstance(last, TextPiece):
            found[-1] = TextPiece(last.text + piece.text)
        elif isinstance(piece, ToolArgumentsDelta) and isinstance(last, ToolArgumentsDelta):
            found[-1] = ToolArgumentsDelta(piece.index, last.text + piece.text)
        elif isinstance(piece, ToolCallStarted):
            found.append(ToolCallStarted(piece.index, "", piece.name))
        else:
            found.append(piece)
    return found


def outline(pieces: Sequence[Piece]) -> list[object]:
    """Texts, and calls as (name, arguments); a cut one as (name, text of its arguments, "cut")."""
    found: list[object] = []
    for piece in pieces:
        if isinstance(piece, TextPiece):
            found.append(piece.text)
        elif isinstance(piece, ToolCallFinished):
            found.append(
                (piece.name, json.loads(piece.arguments)) if piece.complete else (piece.name, piece.arguments, "cut")
            )
    return found


H_OPEN, H_CLOSE = "<tool_call>\n", "\n</tool_call>"
F = ("f", {"s": "a"})
CASES: list[tuple[str, str, list[object]]] = [
    ("hermes", "just text", ["just text"]),
    ("hermes", "  indented\n", ["  indented\n"]),
    ("hermes", f'{H_OPEN}{{"name": "f", "arguments": {{"s": "a"}}}}{H_CLOSE}', [F]),
    ("hermes", f'Let me see.\n\n{H_OPEN}{{"name": "f", "arguments": {{"s": "a"}}}}{H_CLOSE}\n', ["Let me see.", F]),
    (
        "hermes",
        f'{H_OPEN}{{"name": "f", "arguments": {{"s": "a"}}}}{H_CLOSE}\n'
        f'{H_OPEN}{{"name": "g", "arguments": {{}}}}{H_CLOSE}',
        [F, ("g", {})],
    ),
    ("hermes", '<tool_call>{"arguments": {"s": "a"}, "name": "f"}</tool_call>', [F]),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"s\\": \\"a\\"}"}</tool_call>', [F]),
    ("hermes", '<tool_call>{"name": "g"}</tool_call>', [("g", {})]),
    ("hermes", '<tool_call>{"name": "g", "arguments": null}</tool_call> done', [("g", {}), " done"]),
    ("hermes", "<tool_call>{'name': 'f', 'arguments': {'s': 'it\\'s', 'b': True, 'x': None,}}</tool_call>",
     [("f", {"s": "it's", "b": True, "x": None})]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"s": "a\nb\\d"}}</tool_call>', [("f", {"s": "a\nb\\d"})]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"s": "a"}\n</tool_call>', [F]),  # a brace is missing
    ("hermes", '{"name": "f", "arguments": {"s": "a"}}\n</tool_call>', [F]),  # the opening tag is missing
    ("hermes", '{"name": "f", "arguments": {"s": "a"}}', [F]),
    ("hermes", '{"name": "other", "arguments": {}}', ['{"name": "other", "arguments": {}}']),
    ("hermes", '{"answer": 1}', ['{"answer": 1}']),
    ("hermes", "<tool_call>no call</tool_call>", ["<tool_call>no call</tool_call>"]),
    ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
     ['<tool_call>{"name": "f", "arguments": [1]}</tool_call>']),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"s": bad}}</tool_call>',
     [("f", '{"s": ', "cut"), "bad}}</tool_call>"]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"s": "a', [("f", '{"s": "a', "cut")]),
    ("hermes", '<tool_call>{"name": "f', ['<tool_call>{"name": "f']),
    ("hermes", "a <tool_cal", ["a <tool_cal"]),
    ("qwen3_coder", "<tool_call>\n<function=f>\n<parameter=s>\na\n</parameter>\n</function>\n</tool_call>", [F]),
    (
        "qwen3_coder",
        "Ok.\n<tool_call>\n<function=f>\n<parameter=s>\n  x = \"1\"\n\ty\n</parameter>\n"
        "<parameter=n>\n3\n</parameter>\n"
        "<parameter=x>\nNone\n</parameter>\n<parameter=b>\nTrue\n</parameter>\n"
        "<parameter=o>\n{'k': [1]}\n</parameter>\n"
        "<parameter=r>\n[1, 2]\n</parameter>\n</function>\n</tool_call>",
        ["Ok.", ("f", {"s": '  x = "1"\n\ty', "n": 3, "x": None, "b": True, "o": {"k": [1]}, "r": [1, 2]})],
    ),
    ("qwen3_coder", "<function=f>\n<parameter=s>\na\n</parameter>\n</function>\n</tool_call>", [F]),
    ("qwen3_coder", "<tool_call>\n<function=g>\n</function>\n</tool_call>", [("g", {})]),
    ("qwen3_coder", "<tool_call>\n<function=f>\n<parameter=s>\na\n<parameter=n>\nmany\n</parameter>\n</tool_call>",
     [("f", {"s": "a", "n": "many"})]),
    ("qwen3_coder", "<tool_call>\n<function=f>\n<parameter=s>\n</parameter>\n</function>", [("f", {"s": ""})]),
    ("qwen3_coder", "<tool_call>\n<function=f>\n<parameter=s>\nab", [("f", '{"s": "ab', "cut")]),
    ("qwen3_coder", "<tool_call>hm</tool_call>", ["<tool_call>hm</tool_call>"]),
    ("qwen3_coder", "<function=no name\n>", ["<function=no name\n>"]),
    ("llama3_json", '{"name": "f", "parameters": {"s": "a"}}', [F]),
    ("llama3_json", '<|python_tag|>{"type": "function", "name": "f", "parameters": {"s": "a"}}', [F]),
    ("llama3_json", '{"name": "f", "parameters": {"s": "a"}}; {"name": "g", "parameters": {}}', [F, ("g", {})]),
    ("llama3_json", '{"name": "f", "parameters": {"s": "a"}}\n{"name": "g"}', [F, ("g", {})]),
    ("llama3_json", '{"name": "f", "parameters": {"s": "a"}} and more', [F, " and more"]),
    ("llama3_json", '{"name": "f", "parameters": {"s": "a"}};', [F]),
    ("llama3_json", 'Text {"name": "f"}', ['Text {"name": "f"}']),
    ("llama3_json", "<|python_tag|>print(1)", ["<|python_tag|>print(1)"]),
    ("llama_pythonic", '[f(s="a")]', [F]),
    ("llama_pythonic", "<|python_start|>[f(s='a', n=-1, b=True, x=None), g()]<|python_end|>",
     [("f", {"s": "a", "n": -1, "b": True, "x": None}), ("g", {})]),
    ("llama_pythonic", '[f(s="a, b) ]", o={"k": [1, 2]}, r=("x",), b=true)]',
     [("f", {"s": "a, b) ]", "o": {"k": [1, 2]}, "r": ["x"], "b": True})]),
    ("llama_pythonic", "[1, 2]", ["[1, 2]"]),
    ("llama_pythonic", "[other(a=1)]", ["[other(a=1)]"]),
    ("llama_pythonic", "hello", ["hello"]),
    ("llama_pythonic", "[f(s=open('x'))]", [("f", "", "cut"), "s=open('x'))]"]),
    ("llama_pythonic", '[f(s="a", n=1', [("f", '{"s": "a"', "cut")]),
    ("mistral", '[TOOL_CALLS]f[ARGS]{"s": "a"}', [F]),
    ("mistral", 'Hi [TOOL_CALLS]f[CALL_ID]x1[ARGS]{"s": "a"}[TOOL_CALLS]g[ARGS]{}', ["Hi", F, ("g", {})]),
    ("mistral", '[TOOL_CALLS]f{"s": "a"}', [F]),
    ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"s": "a"}}, {"name": "g", "arguments": {}}]',
     [F, ("g", {})]),
    ("mistral", '[TOOL_CALLS]{"name": "f", "arguments": {"s": "a"}}', [F]),
    ("mistral", "[TOOL_CALLS]f is a function", ["[TOOL_CALLS]f is a function"]),
    ("mistral", '[TOOL_CALLS]f[ARGS]{"s": "a', [("f", '{"s": "a', "cut")]),
    ("mistral", "[TOOL_CALLS]", ["[TOOL_CALLS]"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "expected"), CASES)
def test_whole_text(name: str, text: str, expected: list[object]) -> None:
    pieces = read(TOOL_FORMATS[name].make_parser(TOOLS), [text])
    assert outline(pieces) == expected


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, text, _ in CASES])
def test_every_cut_gives_the_same(name: str, text: str) -> None:
    make = TOOL_FORMATS[name].make_parser
    whole = read(make(TOOLS), [text])
    assert read(make(TOOLS), list(text)) == whole
    for at in range(1, len(text)):
        assert read(make(TOOLS), [text[:at], text[at:]]) == whole, at


_MARKUP = st.sampled_from(
    ["<tool_call>", "</tool_call>", "<function=f>", "</function>", "<parameter=s>", "</parameter>", "[TOOL_CALLS]",
     "[ARGS]", "<|python_tag|>", '{"name": "f"', ', "arguments": {', '"s": "a"', "}", "]", "[f(", "s=", "1", ")", ";",
     ",", "\n", " ", "\\", "'", '"', "{", "text", "é", "None", "[", "f", "<"]
)  # fmt: skip


@given(parts=st.lists(_MARKUP, max_size=14), name=st.sampled_from(sorted(TOOL_FORMATS)))
def test_any_text_in_any_cut(parts: list[str], name: str) -> None:
    make = TOOL_FORMATS[name].make_parser
    text = "".join(parts)
    whole = read(make(TOOLS), [text])
    assert read(make(TOOLS), list(text)) == whole
    assert read(make(TOOLS), parts) == whole
    for index, piece in enumerate(p for p in whole if isinstance(p, ToolCallFinished)):
        assert piece.index == index
        if piece.complete:
            assert isinstance(json.loads(piece.arguments), dict)
    deltas = "".join(piece.text for piece in whole if isinstance(piece, ToolArgumentsDelta))
    assert deltas == "".join(piece.arguments for piece in whole if isinstance(piece, ToolCallFinished))


@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    ),
    dump=st.sampled_from([json.dumps, repr]),
)
def test_arguments_survive(value: object, dump: Callable[[object], str]) -> None:
    """JSON as it is, and Python's notation for the same value."""
    text = f'<tool_call>{{"name": "f", "arguments": {dump({"v": value})}}}</tool_call>'
    assume(dump is json.dumps or "\\" not in text)  # Python has escapes of its own
    assert outline(read(TOOL_FORMATS["hermes"].make_parser(TOOLS), list(text))) == [("f", {"v": value})]


def test_arguments_are_streamed() -> None:
    parser = TOOL_FORMATS["hermes"].make_parser(TOOLS)
    parser.push('<tool_call>{"name": "f", "arguments": {"s": "')
    assert parser.push("abc") == [ToolArgumentsDelta(0, "abc")]


def test_text_of_xml_strings_is_streamed() -> None:
    parser = TOOL_FORMATS["qwen3_coder"].make_parser(TOOLS)
    parser.push("<tool_call>\n<function=f>\n<parameter=s>\n")
    assert parser.push('a "b"\n</par') == [ToolArgumentsDelta(0, 'a \\"b\\"')]
    assert parser.push("is") == [ToolArgumentsDelta(0, "\\n</paris")]


def test_call_ids_are_unique() -> None:
    text = '<tool_call>{"name": "g"}</tool_call>' * 2
    pieces = TOOL_FORMATS["hermes"].make_parser(TOOLS).push(text)
    ids = [piece.call_id for piece in pieces if isinstance(piece, ToolCallStarted)]
    assert len(set(ids)) == 2
    assert all(call_id.startswith("call_") and len(call_id) == 29 for call_id in ids)


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ('{% if tools %}... <tool_call>\n{"name": <function-name>', "hermes"),
        ("<tool_call>\n<function=example>\n<parameter=a>", "qwen3_coder"),
        ("{{ '<|python_tag|>' }} Environment: ipython", "llama3_json"),
        ("[func_name1(params_name1=params_value1)]", "llama_pythonic"),
        ("[AVAILABLE_TOOLS] [TOOL_CALLS] [", "mistral_array"),
        ("[TOOL_CALLS]{{ name }}[ARGS]", "mistral"),
        ("{{ messages }}", None),
    ],
)
def test_detection(template: str, name: str | None) -> None:
    found = detect_tool_format(template)
    assert (found.name if found else None) == name
