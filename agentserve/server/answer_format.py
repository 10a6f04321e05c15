"""What the server needs of whoever knows how a model writes its answers: parsers, and grammars that constrain it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from agentserve.text.tokenizer import Tokenizer
from agentserve.text.tools.spec import (
    Piece,
    ReasoningPiece,
    TextPiece,
    ToolArgumentsDelta,
    ToolChoice,
    ToolSpec,
)

if TYPE_CHECKING:
    from agentserve.text.grammar.compiler import CompiledGrammar
    from agentserve.text.grammar.source import Constraint


class AnswerParser(Protocol):
    """Reads one answer while it is being written."""

    def push(self, text: str) -> Sequence[Piece]:
        """What more text brings; text that may be the beginning of markup is held back."""
        ...

    def finish(self) -> Sequence[Piece]:
        """What was held back, at the end of the text."""
        ...


class AnswerFormat(Protocol):
    """How a model writes tool calls and reasoning."""

    @property
    def tool_format_name(self) -> str | None:
        """The form of tool calls; None if no calls are looked for."""
        ...

    def parser(self, tools: Sequence[ToolSpec], choice: ToolChoice, prompt: str) -> AnswerParser:
        """A parser for one answer to the rendered `prompt`, whose end may have opened the reasoning already."""
        ...

    def shown(self, tokenizer: Tokenizer) -> Tokenizer:
        """The tokenizer with the special tokens that the parser must see as text, and only those, not special."""
        ...


class Grammars(Protocol):
    """Turns what a request says about the form of its answer into a grammar."""

    async def compile(self, constraint: Constraint, prompt: str) -> CompiledGrammar | None:
        """None if any text will do. Raises InvalidRequestError for what cannot be enforced."""
        ...


@dataclass(frozen=True, slots=True)
class AnswerSupport:
    """What is known of the form of a model's answers."""

    format: AnswerFormat | None = None
    """None for a model whose answers are text and nothing else."""
    grammars: Grammars | None = None
    """None where the form of an answer cannot be enforced: requests that want it are refused."""


def merge(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    """The same with neighbours of one kind put together: tokens that arrive together travel together."""
    merged: list[Piece] = []
    for piece in pieces:
        last = merged[-1] if merged else None
        if isinstance(piece, TextPiece) and isinstance(last, TextPiece):
            merged[-1] = TextPiece(last.text + piece.text)
        elif isinstance(piece, ReasoningPiece) and isinstance(last, ReasoningPiece):
            merged[-1] = ReasoningPiece(last.text + piece.text)
        elif (
            isinstance(piece, ToolArgumentsDelta) and isinstance(last, ToolArgumentsDelta) and piece.index == last.index
        ):
            merged[-1] = ToolArgumentsDelta(piece.index, last.text + piece.text)
        else:
            merged.append(piece)
    return tuple(merged)
