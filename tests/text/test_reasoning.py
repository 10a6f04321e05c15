"""Reasoning is told from the answer, however the text is cut."""

from __future__ import annotations

import pytest

from agentserve.text.output import choose_output_format
from agentserve.text.reasoning import THINK, ReasoningParser
from agentserve.text.tokenizer import ByteTokenizer
from agentserve.text.tools.spec import Piece, ReasoningPiece, TextPiece, ToolCallFinished, ToolChoice, ToolSpec

CASES = [
    ("<think>\nhm\n</think>\n\nHi", False, ["r:hm", "Hi"]),
    ("hm\n\nso\n</think>\n\nHi\n", True, ["r:hm\n\nso", "Hi\n"]),
    ("<think>hm</think>Hi", True, ["r:hm", "Hi"]),
    ("\n<think>hm</think>", False, ["r:hm"]),
    ("<think></think>Hi", False, ["Hi"]),
    ("<think>cut off", False, ["r:cut off"]),
    ("<think>cut </thi", False, ["r:cut </thi"]),
    ("no <think>x</think>", False, ["no <think>x</think>"]),
    ("<thi", False, ["<thi"]),
    ("", True, []),
    ("plain", False, ["plain"]),
]


def outline(pieces: list[Piece]) -> list[str]:
    found: list[str] = []
    was_reasoning = None
    for piece in pieces:
        assert isinstance(piece, TextPiece | ReasoningPiece)
        is_reasoning = isinstance(piece, ReasoningPiece)
        if found and was_reasoning == is_reasoning:
            found[-1] += piece.text
        else:
            found.append(("r:" if is_reasoning else "") + piece.text)
        was_reasoning = is_reasoning
    return found


@pytest.mark.parametrize(("text", "is_open", "expected"), CASES)
def test_every_cut(text: str, is_open: bool, expected: list[str]) -> None:
    for parts in ([text], list(text), *([text[:at], text[at:]] for at in range(1, len(text)))):
        parser = ReasoningParser(THINK, is_open=is_open)
        pieces = [piece for part in parts for piece in parser.push(part)]
        assert outline([*pieces, *parser.finish()]) == expected, parts


def test_calls_behind_reasoning() -> None:
    """A call that the model only thinks about is none."""
    output = choose_output_format("<tool_call> </think> tools", ByteTokenizer())
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    parser = output.parser((ToolSpec("f"),), ToolChoice(), "prompt<think>\n")
    pieces = [piece for character in f"{call}</think>{call}" for piece in parser.push(character)] + parser.finish()
    assert "".join(piece.text for piece in pieces if isinstance(piece, ReasoningPiece)) == call
    assert [piece.name for piece in pieces if isinstance(piece, ToolCallFinished)] == ["f"]
