"""How a model writes its answers: its tool-call format, its reasoning tags, and the parser that follows from both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from agentserve.errors import ConfigError
from agentserve.text.reasoning import MISTRAL_THINK, THINK, ReasoningFormat, ReasoningParser
from agentserve.text.tokenizer import Tokenizer
from agentserve.text.tools.formats import TOOL_FORMATS, ToolFormat, detect_tool_format
from agentserve.text.tools.parser import PlainParser, ToolCallParser
from agentserve.text.tools.spec import Piece, TextPiece, ToolChoice, ToolMode, ToolSpec

T = TypeVar("T")
AUTO, NONE = "auto", "none"
REASONING_FORMATS: Mapping[str, ReasoningFormat] = {"think": THINK, "mistral": MISTRAL_THINK}
TOOL_PARSERS = (AUTO, NONE, *TOOL_FORMATS)
"""Values of `--tool-call-parser`."""
REASONING_PARSERS = (AUTO, NONE, *REASONING_FORMATS)
"""Values of `--reasoning-parser`."""


class OutputParser:
    """Reads one answer: reasoning first, then tool calls in what is left."""

    def __init__(self, reasoning: ReasoningParser | None, tools: ToolCallParser) -> None:
        self._reasoning = reasoning
        self._tools = tools

    def push(self, text: str) -> list[Piece]:
        """What is certain with more text; what may be the beginning of markup is held back."""
        return self._through(self._reasoning.push(text)) if self._reasoning else self._tools.push(text)

    def finish(self) -> list[Piece]:
        """What was held back, at the end of the text."""
        pieces = self._through(self._reasoning.finish()) if self._reasoning else []
        return pieces + self._tools.finish()

    def _through(self, pieces: Iterable[Piece]) -> list[Piece]:
        found: list[Piece] = []
        for piece in pieces:
            found += self._tools.push(piece.text) if isinstance(piece, TextPiece) else [piece]
        return found


class OutputFormat:
    """What is known of a model's answers. May be used from any thread."""

    def __init__(self, tool_format: ToolFormat | None, reasoning: ReasoningFormat | None, tokenizer: Tokenizer) -> None:
        self.tool_format = tool_format
        self.reasoning = reasoning
        markers = [
            *(tool_format.markers if tool_format else ()),
            *((reasoning.open, reasoning.close) if reasoning else ()),
        ]
        special = ((marker, special_token_id(tokenizer, marker)) for marker in markers)
        self.special_ids = {marker: token_id for marker, token_id in special if token_id is not None}
        """Those markers that are special tokens of the model."""

    @property
    def tool_format_name(self) -> str | None:
        """None if no calls are looked for."""
        return None if self.tool_format is None else self.tool_format.name

    def parser(self, tools: Sequence[ToolSpec], choice: ToolChoice, prompt: str) -> OutputParser:
        """A parser for one answer to the rendered `prompt`, whose end may have opened the reasoning already."""
        reasoning = None
        if self.reasoning is not None:
            reasoning = ReasoningParser(self.reasoning, is_open=self.reasoning.is_open_in(prompt))
        if not tools or choice.mode is ToolMode.NONE or self.tool_format is None:
            return OutputParser(reasoning, PlainParser())
        return OutputParser(reasoning, self.tool_format.make_parser(tools))

    def shown(self, tokenizer: Tokenizer) -> Tokenizer:
        """The tokenizer, for which the special tokens that a parser has to see are text."""
        return ShownTokenizer(tokenizer, self.special_ids.values()) if self.special_ids else tokenizer


class ShownTokenizer:
    """A `Tokenizer` some of whose special tokens count as text."""

    def __init__(self, tokenizer: Tokenizer, shown_ids: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._shown_ids = frozenset(shown_ids)
        self.vocab_size = tokenizer.vocab_size
        self.eos_token_ids = tokenizer.eos_token_ids
        self.bos_token_id = tokenizer.bos_token_id
        self.special_tokens = tokenizer.special_tokens
        self.strips_leading_space = tokenizer.strips_leading_space

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        if skip_special_tokens:
            token_ids = [token_id for token_id in token_ids if not self.is_special(token_id)]
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        return self._tokenizer.token_bytes(token_id)

    def is_special(self, token_id: int) -> bool:
        return token_id not in self._shown_ids and self._tokenizer.is_special(token_id)


def special_token_id(tokenizer: Tokenizer, text: str) -> int | None:
    """The id of the special token `text`, None if it is ordinary text to the model."""
    token_ids = tokenizer.encode(text)
    return token_ids[0] if len(token_ids) == 1 and tokenizer.is_special(token_ids[0]) else None


def choose_output_format(
    template: str | None,
    tokenizer: Tokenizer,
    *,
    tool_parser: str = AUTO,
    reasoning_parser: str = AUTO,
    fallback: str = "hermes",
) -> OutputFormat:
    """The format of a model, by its chat template where the user did not name one.

    Args:
        template: the text of the chat template; None for a model without one.
        tokenizer: the model's.
        tool_parser: one of `TOOL_PARSERS`.
        reasoning_parser: one of `REASONING_PARSERS`.
        fallback: the tool format of a model whose template has no tools, so that we describe them to it.

    Raises ConfigError for another name.
    """
    text = template or ""
    tools = _choose("tool_call_parser", tool_parser, TOOL_FORMATS, lambda: _tool_format(text, fallback))
    reasoning = _choose("reasoning_parser", reasoning_parser, REASONING_FORMATS, lambda: _reasoning_format(text))
    return OutputFormat(tools, reasoning, tokenizer)


def _choose(option: str, name: str, known: Mapping[str, T], detect: Callable[[], T | None]) -> T | None:
    if name == AUTO:
        return detect()
    if name == NONE:
        return None
    if name not in known:
        raise ConfigError(f"{option} must be one of {', '.join((AUTO, NONE, *known))}, not {name!r}")
    return known[name]


def _tool_format(template: str, fallback: str) -> ToolFormat | None:
    found = detect_tool_format(template)
    # A template that shows tools in a way that we do not know must not be read as something else.
    return TOOL_FORMATS[fallback] if found is None and "tools" not in template else found


def _reasoning_format(template: str) -> ReasoningFormat | None:
    return next((format for format in REASONING_FORMATS.values() if format.close in template), None)
