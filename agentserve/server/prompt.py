"""From a prompt to token ids. This is the one place where messages become tokens."""

from __future__ import annotations

import datetime
import json
import threading
from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from agentserve.errors import InvalidRequestError
from agentserve.server.history import arrange
from agentserve.server.splice import Render, Spliced, TurnFinder
from agentserve.server.stabilize import Stabilizer
from agentserve.server.token_history import HistoryScope, StoredTurn, TokenHistory
from agentserve.server.tool_text import DEFAULT_FORMAT, with_tools_as_text
from agentserve.server.turns import chain_digests, conversation_name, system_text
from agentserve.server.types import ChatPrompt, Identity, Prompt, TextPrompt
from agentserve.text.tokenizer import Tokenizer

_MAX_SESSIONS = 4096
_NO_NAME = "-"
_NOBODY = Identity()
_NO_SCOPE = HistoryScope(_NO_NAME)


class ChatRenderer(Protocol):
    """Renders a conversation. Called in worker threads. Raises InvalidRequestError for one it cannot render."""

    @property
    def supports_tools(self) -> bool:
        """Whether it shows the model what tools there are."""
        ...

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str: ...


@dataclass(frozen=True, slots=True)
class Conversation:
    """What is known of a rendered conversation besides its text."""

    name: str
    """Of its first message that is no system prompt: the same for all turns of it."""
    digests: tuple[bytes, ...]
    """For each message one of all messages up to it."""
    roles: tuple[str, ...]
    """Of the messages."""
    system: str
    """The system prompt as it was read."""
    tools: str
    """The tools as JSON; empty without any."""
    opening: str | None
    """What the prompt has behind the header of the assistant's turn; None if answers to it cannot be kept."""
    num_reused_turns: int = 0
    """Answers whose own token ids are in the prompt."""


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """What the engine is to continue."""

    token_ids: tuple[int, ...]
    text: str
    """The rendered text; empty for token ids, unless `echo` asked for their text."""
    scope: HistoryScope = _NO_SCOPE
    """Session and salt: what is kept of this prompt is kept for these."""
    conversation: Conversation | None = None
    """None for prompts that are no conversation."""
    packed: bytes = b""
    """The token ids as bytes, four each: texts of tokens are compared a lot."""


@dataclass(frozen=True, slots=True)
class _Rendered:
    scope: HistoryScope
    render: Render
    messages: Sequence[Mapping[str, Any]]
    digests: Sequence[bytes]
    text: str
    prefill: str
    mark: str | None
    """Where the prompt is cut off."""

    def end(self, text: str) -> str:
        """How the prompt ends, if `text` is the end of the rendered conversation."""
        return text + self.prefill if self.mark is None else text.partition(self.mark)[0]


class PromptBuilder:
    """Renders and tokenizes. May be used from any thread."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat_template: ChatRenderer | None,
        *,
        history: TokenHistory | None = None,
        stabilizer: Stabilizer | None = None,
        max_model_len: int | None = None,
        tool_format: str | None = None,
    ) -> None:
        """`history` has the answers that are read again as they were written; a prompt that would not fit into
        `max_model_len` with them is read without. `tool_format` names the form of tool calls, for a template that shows
        the model none."""
        self._tool_format = tool_format or DEFAULT_FORMAT
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._history = history
        self._stabilizer = stabilizer
        self._max_model_len = max_model_len
        self._clocks = _SessionClocks()
        self._finder: TurnFinder | None = None
        if history is not None and chat_template is not None:
            finder = TurnFinder(partial(self._render, chat_template, (), {}), tokenizer)
            self._finder = finder if finder.is_certain else None

    @property
    def keeps_answers(self) -> bool:
        """Whether answers are kept as they were written: it is wanted, and the template allows it."""
        return self._finder is not None

    def build(
        self, prompt: Prompt, *, echo: bool = False, identity: Identity = _NOBODY, cache_salt: str | None = None
    ) -> TokenizedPrompt:
        """Raises InvalidRequestError for messages that the template cannot render."""
        session = identity.session_id or _NO_NAME
        if isinstance(prompt, ChatPrompt):
            built = self._build_chat(prompt, identity.session_id, cache_salt)
        elif isinstance(prompt, TextPrompt):
            token_ids = tuple(self._tokenizer.encode(prompt.text, add_special_tokens=True))
            built = TokenizedPrompt(token_ids, prompt.text, HistoryScope(session, cache_salt))
        else:
            text = self._tokenizer.decode(prompt.token_ids) if echo else ""
            built = TokenizedPrompt(prompt.token_ids, text, HistoryScope(session, cache_salt))
        if self._max_model_len is not None and len(built.token_ids) >= self._max_model_len:
            return built  # it is going to be refused, and nobody has looked at the ids of one that is too long
        return replace(built, packed=array("I", built.token_ids).tobytes())

    def build_until(
        self, prompt: ChatPrompt, mark: str, *, identity: Identity = _NOBODY, cache_salt: str | None = None
    ) -> tuple[int, ...]:
        """What a conversation has before a mark in it, behind its last answer; empty if the template does not show it.

        Raises InvalidRequestError for messages that the template cannot render.
        """
        built = self._build_chat(prompt, identity.session_id, cache_salt, mark)
        return built.token_ids if mark in built.text else ()

    def _build_chat(
        self, prompt: ChatPrompt, session: str | None, cache_salt: str | None, mark: str | None = None
    ) -> TokenizedPrompt:
        template = self._chat_template
        if template is None:
            raise InvalidRequestError("This model has no chat template; use /v1/completions.", param="messages")
        messages = arrange(prompt.messages)
        name = conversation_name(messages) or _NO_NAME
        scope = HistoryScope(session or name, cache_salt)
        tools = [tool.for_template() for tool in prompt.tools]
        self._stabilize(scope, messages, tools)
        # A date that the template itself writes stays that of the session's first request.
        kwargs = {"strftime_now": self._clocks.of(scope), **prompt.template_kwargs}
        render = partial(self._render, template, tools, kwargs)
        text = render(messages, True)
        digests = chain_digests(messages)
        rendered = _Rendered(scope, render, messages, digests, text, prompt.prefill, mark)
        token_ids, num_reused = self._with_answers(rendered)
        if not num_reused:
            # The template writes the special tokens itself.
            token_ids = self._tokenizer.encode(rendered.end(text), add_special_tokens=False)
        conversation = Conversation(
            name,
            tuple(digests),
            tuple(message["role"] for message in messages),
            system_text(messages),
            json.dumps(tools, ensure_ascii=False) if tools else "",
            self._finder.opening(text) if self._finder is not None and not prompt.prefill else None,
            num_reused,
        )
        return TokenizedPrompt(tuple(token_ids), text + prompt.prefill, scope, conversation)

    def _with_answers(self, rendered: _Rendered) -> tuple[list[int], int]:
        """The prompt with the answers as they were written, and how many there are; 0 if it has to be as it is."""
        if self._history is None or self._finder is None:
            return [], 0
        messages = rendered.messages
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        found = self._history.find(rendered.scope, [rendered.digests[index] for index in answers])
        if not found:
            return [], 0
        spliced = self._finder.splice(rendered.render, messages, rendered.text, [answers[at] for at in found])
        if spliced is None:
            return [], 0
        token_ids = self._join(spliced, list(found.values()), rendered)
        if self._max_model_len is not None and len(token_ids) >= self._max_model_len:
            return [], 0
        return token_ids, len(found)

    def _join(self, spliced: Spliced, turns: Sequence[StoredTurn], rendered: _Rendered) -> list[int]:
        """Each text up to an answer is encoded in one piece, as it was when the answer was written."""
        token_ids: list[int] = []
        for text, turn in zip(spliced.texts, turns, strict=False):
            token_ids += self._tokenizer.encode(text + turn.opening, add_special_tokens=False)
            token_ids += turn.token_ids
        return token_ids + self._tokenizer.encode(rendered.end(spliced.texts[-1]), add_special_tokens=False)

    def _stabilize(
        self, scope: HistoryScope, messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]]
    ) -> None:
        """Changes the system prompt and the descriptions of tools, which are copies, in place."""
        stabilizer = self._stabilizer
        if stabilizer is None:
            return
        if system_text(messages):
            messages[0]["content"] = stabilizer.apply(scope, str(messages[0]["content"]))
        for tool in tools:
            function = tool["function"]
            function["description"] = stabilizer.apply(scope, function["description"])

    def _render(
        self,
        template: ChatRenderer,
        tools: Sequence[Mapping[str, Any]],
        kwargs: Mapping[str, Any],
        messages: Sequence[Mapping[str, Any]],
        opens_answer: bool,
    ) -> str:
        if not template.supports_tools:
            messages, tools = with_tools_as_text(messages, tools, self._tool_format), []
        return template.render(
            messages, tools=tools or None, add_generation_prompt=opens_answer, template_kwargs=kwargs
        )


class _SessionClocks:
    """What the time was when each session began."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begun: OrderedDict[HistoryScope, datetime.datetime] = OrderedDict()

    def of(self, scope: HistoryScope) -> Any:
        """`strftime_now` of a chat template."""
        with self._lock:
            begun = self._begun.setdefault(scope, datetime.datetime.now().astimezone())
            self._begun.move_to_end(scope)
            if len(self._begun) > _MAX_SESSIONS:
                self._begun.popitem(last=False)
        return begun.strftime
