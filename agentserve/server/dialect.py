"""What a dialect is: a pure parser from a body to a call, and an encoder of one answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from agentserve.server.errors import ErrorReply
from agentserve.server.types import ChoiceFinished, GenerateRequest, GenerationEvent, TokenLogprob, Usage
from agentserve.text.tools.spec import ReasoningPiece, TextPiece

JsonObject = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ParsedCall:
    """A request and how its answer is to be sent. Dialects add what else their encoder must know."""

    generate: GenerateRequest
    model: str | None
    """As the client wrote it; None if it did not say."""
    stream: bool


@dataclass(frozen=True, slots=True)
class ReplyHeader:
    """What every object of one answer repeats."""

    id: str
    model: str
    created: int
    """Unix time in seconds."""
    request_id: str
    """The id of the HTTP request."""
    num_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A complete tool call."""

    call_id: str
    name: str
    arguments: str
    """JSON."""


Part = TextPiece | ReasoningPiece | ToolCall


@dataclass(frozen=True, slots=True)
class ChoiceResult:
    """A whole choice, for answers that are not streamed."""

    parts: tuple[Part, ...]
    """In the order in which they were written; never two texts beside each other."""
    logprobs: tuple[TokenLogprob, ...]
    end: ChoiceFinished

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts if isinstance(part, TextPiece))

    @property
    def reasoning(self) -> str:
        return "".join(part.text for part in self.parts if isinstance(part, ReasoningPiece))

    @property
    def tool_calls(self) -> list[ToolCall]:
        return [part for part in self.parts if isinstance(part, ToolCall)]


class Encoder(Protocol):
    """Turns the events of one generation into JSON objects of a dialect. Holds the state of one answer."""

    @property
    def names_events(self) -> bool:
        """Whether each object is sent under the name in its `type`."""
        ...

    @property
    def sends_done(self) -> bool:
        """Whether `[DONE]` ends a stream."""
        ...

    def open(self) -> Iterable[JsonObject]:
        """What is sent before the first event."""
        ...

    def encode(self, event: GenerationEvent) -> Iterable[JsonObject]: ...

    def fail(self, error: ErrorReply) -> Iterable[JsonObject]:
        """What ends a stream in the middle."""
        ...

    def keep_alive(self) -> JsonObject | None:
        """What is sent after a silence; None for a comment, which no client sees."""
        ...

    def whole(self, choices: Sequence[ChoiceResult], usage: Usage) -> JsonObject:
        """The answer when it is not streamed."""
        ...
