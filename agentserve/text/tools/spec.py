"""What a request says about tools and the form of its answer, and the typed pieces of that answer.

Plain data without a dialect: the server parses a body into these and encodes the pieces.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeAlias

# ---- what comes in ----


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """A function that the model may call."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None
    """JSON Schema of the arguments, an object. None: no parameters are declared, any object is accepted."""
    strict: bool = False
    """Whether arguments that do not fit `parameters` must be made impossible."""

    def for_template(self) -> dict[str, Any]:
        """The form that chat templates expect, which is OpenAI's."""
        parameters = self.parameters if self.parameters is not None else {"type": "object", "properties": {}}
        function = {"name": self.name, "description": self.description, "parameters": dict(parameters)}
        return {"type": "function", "function": function}


class ToolMode(StrEnum):
    """Whether the answer may, must or must not contain tool calls."""

    AUTO = "auto"
    NONE = "none"
    REQUIRED = "required"
    NAMED = "named"


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """How tools are to be used."""

    mode: ToolMode = ToolMode.AUTO
    name: str | None = None
    """The tool that must be called; for `ToolMode.NAMED` only."""
    parallel: bool = True
    """Whether an answer may hold more than one call. Enforced when the answer is constrained by a grammar."""

    def __post_init__(self) -> None:
        assert (self.name is not None) == (self.mode is ToolMode.NAMED)


@dataclass(frozen=True, slots=True)
class TextFormat:
    """Any text."""


@dataclass(frozen=True, slots=True)
class JsonObjectFormat:
    """Some JSON object."""


@dataclass(frozen=True, slots=True)
class JsonSchemaFormat:
    """JSON that fits a schema."""

    schema: Mapping[str, Any] | bool
    name: str = ""


@dataclass(frozen=True, slots=True)
class RegexFormat:
    """Text that matches `pattern` as a whole."""

    pattern: str


@dataclass(frozen=True, slots=True)
class ChoiceFormat:
    """Exactly one of `choices`, which is not empty."""

    choices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LarkFormat:
    """Text of a context-free grammar, in llguidance's variant of Lark's notation."""

    grammar: str


ResponseFormat: TypeAlias = TextFormat | JsonObjectFormat | JsonSchemaFormat | RegexFormat | ChoiceFormat | LarkFormat


# ---- what goes out ----


@dataclass(frozen=True, slots=True)
class TextPiece:
    """Visible text."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningPiece:
    """Text of the model's thinking, without its tags."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStarted:
    """A call begins; its arguments follow."""

    index: int
    """Of the calls of this answer, from 0."""
    call_id: str
    """Unique: `call_` and 24 hexadecimal digits."""
    name: str


@dataclass(frozen=True, slots=True)
class ToolArgumentsDelta:
    """The next piece of a call's arguments. All pieces of a call together are JSON, unless it was cut off."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class ToolCallFinished:
    """A call ends."""

    index: int
    name: str
    arguments: str
    """All of its arguments: the deltas put together."""
    complete: bool
    """False: the text ended within the call, so `arguments` is a prefix of JSON and must not be acted upon."""


Piece: TypeAlias = TextPiece | ReasoningPiece | ToolCallStarted | ToolArgumentsDelta | ToolCallFinished
