"""Conversations to prompts, by the model's own chat template (Jinja, in a sandbox)."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from agentserve.errors import InvalidRequestError, ModelFormatError
from agentserve.text.call_ids import demands_short_ids, with_short_ids
from agentserve.text.hf_tokenizer import read_tokenizer_config
from agentserve.text.source import TextSource
from agentserve.text.tokenizer import Tokenizer

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The template of `ByteTokenizer`."""

ROLES = ("system", "developer", "user", "assistant", "tool")
_DEFAULT, _TOOL_USE = "default", "tool_use"
_RENDER_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


class ChatTemplate:
    """Renders conversations. May be used from any thread."""

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        """`templates` has a `default`, and perhaps a `tool_use` that is taken when there are tools.

        Raises ModelFormatError for a template that is no Jinja.
        """
        assert _DEFAULT in templates
        environment = _environment()
        self._templates = {name: _compile(environment, name, text) for name, text in templates.items()}
        self._special_tokens = dict(special_tokens)
        self.supports_tools = _TOOL_USE in templates or "tools" in templates[_DEFAULT]
        """Whether the template shows the model what tools there are."""
        self.text = "\n".join(templates[name] for name in (_DEFAULT, _TOOL_USE) if name in templates)
        """The template itself, with that for tools: it tells how the model writes its answers."""
        self._demands_short_ids = demands_short_ids(self.text)
        self._names_developer = any("developer" in text for text in templates.values())

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt, special tokens included: encode it without adding them again.

        Args:
            messages: as in OpenAI's chat API.
            tools: as in OpenAI's chat API; ignored by a template without `supports_tools`.
            add_generation_prompt: whether to open the assistant's turn.
            template_kwargs: further variables of the template, such as `enable_thinking`.

        Raises InvalidRequestError(param="messages") when the template cannot render them.
        """
        if not messages:
            _refuse("messages is empty")
        normalized = [self._normalize(message, index) for index, message in enumerate(messages)]
        variables = {
            **self._special_tokens,
            **(template_kwargs or {}),
            "messages": with_short_ids(normalized) if self._demands_short_ids else normalized,
            "tools": list(tools) if tools else None,
            "add_generation_prompt": add_generation_prompt,
        }
        template = self._templates[_TOOL_USE if tools and _TOOL_USE in self._templates else _DEFAULT]
        try:
            return template.render(variables)
        except _RENDER_ERRORS as error:  # the template's own complaint, or a message that it does not expect
            _refuse(f"the model's chat template cannot render these messages: {error}", error)

    def _normalize(self, message: Mapping[str, Any], index: int) -> dict[str, Any]:
        """A copy in the form that templates expect."""
        if not isinstance(message, Mapping):
            _refuse(f"messages[{index}] must be an object")
        role = message.get("role")
        if role not in ROLES:
            _refuse(f"messages[{index}].role is {role!r}; known are {', '.join(ROLES)}")
        normalized = dict(message)
        if role == "developer" and not self._names_developer:
            normalized["role"] = "system"
        normalized["content"] = _join(message.get("content"), index)
        calls = message.get("tool_calls")
        if calls:
            if not isinstance(calls, list | tuple):
                _refuse(f"messages[{index}].tool_calls must be a list")
            normalized["tool_calls"] = [_parse_arguments(call, index) for call in calls]
        return normalized


def load_chat_template(source: TextSource | None, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The template of a model, None if it has none (a base model); without a source, ChatML.

    Raises ModelFormatError when a file is damaged.
    """
    templates = {_DEFAULT: CHATML} if source is None else read_templates(source)
    return ChatTemplate(templates, tokenizer.special_tokens) if _DEFAULT in templates else None


def read_templates(source: TextSource) -> dict[str, str]:
    """All templates of a model by name. Raises ModelFormatError when a file is damaged."""
    if source.path is None:
        return {}
    if source.kind != "gguf":
        return _read_directory(source.path)
    prefix = "tokenizer.chat_template"
    return {
        _DEFAULT if key == prefix else key.removeprefix(prefix + "."): text
        for key, text in source.gguf_metadata().items()
        if isinstance(text, str) and (key == prefix or key.startswith(prefix + "."))
    }


def _read_directory(directory: Path) -> dict[str, str]:
    # The newer files win over the older entry of tokenizer_config.json.
    templates: dict[str, str] = {}
    stated = read_tokenizer_config(directory).get("chat_template")
    if isinstance(stated, str):
        templates[_DEFAULT] = stated
    elif isinstance(stated, list):
        templates |= {entry["name"]: entry["template"] for entry in stated if {"name", "template"} <= set(entry)}
    files = {path.stem: path for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    if (directory / "chat_template.jinja").is_file():
        files[_DEFAULT] = directory / "chat_template.jinja"
    for name, path in files.items():
        try:
            templates[name] = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelFormatError(f"cannot read {path}: {error}") from error
    return templates


def _refuse(message: str, cause: Exception | None = None) -> NoReturn:
    raise InvalidRequestError(message, param="messages") from cause


def _join(content: Any, index: int) -> str:
    """Text, or a list of text parts; parts are separate paragraphs, so that words do not run together."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        _refuse(f"messages[{index}].content must be a string or a list of text parts")
    texts: list[str] = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            _refuse(f"messages[{index}].content has a part of type {kind!r}; this model takes text only")
        texts.append(text)
    return "\n".join(texts)


def _parse_arguments(call: Any, index: int) -> dict[str, Any]:
    """Templates want the arguments of a call as an object; the API sends them as JSON text."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        _refuse(f"messages[{index}].tool_calls has an entry without a function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            parsed = None
        # What the model got wrong once is shown to it as it was.
        arguments = parsed if isinstance(parsed, dict) else arguments
    return {**call, "function": {**function, "arguments": arguments}}


class _Generation(Extension):
    """`{% generation %}`, with which templates mark the assistant's text for training; here it has no effect."""

    tags = {"generation"}  # noqa: RUF012 - the type that Jinja declares

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """What templates may count on: the helpers that transformers documents for chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _compile(environment: ImmutableSandboxedEnvironment, name: str, text: str) -> Template:
    try:
        return environment.from_string(text)
    except TemplateError as error:
        raise ModelFormatError(f"the chat template {name!r} of the model is damaged: {error}") from error


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, > and &, which would show the model another text.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().astimezone().strftime(pattern)
