"""Tools for models whose chat template has no place for them: as text, in the format that the parser reads.

The list of JSON signatures in the system prompt and the results in tags are those of NousResearch's Hermes function
calling, which Qwen's templates use as well; how calls look is up to the format.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

DEFAULT_FORMAT = "hermes"
_INSTRUCTIONS = """You can call functions. These are their signatures, one a line:
<tools>
{signatures}
</tools>
To call a function, answer in this form, {several}:
{example}"""
_EXAMPLE = {
    "function": {
        "name": "the_name_of_the_function",
        "arguments": {"the_name_of_an_argument": "its value"},
    }
}


@dataclass(frozen=True, slots=True)
class _CallText:
    """How the calls of one format are written."""

    show: Callable[[str, Any], str]
    """One call, from its name and its arguments: an object, or JSON that should be one."""
    several: str = "once for each call"
    separator: str = "\n"
    opening: str = ""
    closing: str = ""

    def show_all(self, calls: Sequence[Mapping[str, Any]]) -> str:
        """Calls in OpenAI's form."""
        texts = [self.show(str(call["function"]["name"]), call["function"].get("arguments") or {}) for call in calls]
        return self.opening + self.separator.join(texts) + self.closing


def _parsed(value: Any) -> Any:
    """An object if it is one; what a model got wrong is shown to it as it was."""
    if not isinstance(value, str):
        return value
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return parsed if isinstance(parsed, dict) else value


def _json(value: Any) -> str:
    """JSON that the model wrote stays as it wrote it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _object(name: str, key: str, arguments: Any) -> str:
    return f'{{"name": {json.dumps(name, ensure_ascii=False)}, "{key}": {_json(arguments)}}}'


def _show_xml(name: str, arguments: Any) -> str:
    arguments = _parsed(arguments)
    items = arguments.items() if isinstance(arguments, dict) else [("arguments", arguments)]
    parameters = "".join(f"<parameter={key}>\n{_json(value)}\n</parameter>\n" for key, value in items)
    return f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"


def _show_python(name: str, arguments: Any) -> str:
    arguments = _parsed(arguments)
    if not isinstance(arguments, dict):
        return f"{name}({arguments})"
    return f"{name}({', '.join(f'{key}={json.dumps(value, ensure_ascii=False)}' for key, value in arguments.items())})"


_CALL_TEXTS: Mapping[str, _CallText] = {
    "hermes": _CallText(lambda name, value: f"<tool_call>\n{_object(name, 'arguments', value)}\n</tool_call>"),
    "qwen3_coder": _CallText(_show_xml),
    "llama3_json": _CallText(
        lambda name, value: _object(name, "parameters", value), "with a semicolon between several calls", "; "
    ),
    "llama_pythonic": _CallText(_show_python, "with a comma between several calls", ", ", "[", "]"),
    "mistral": _CallText(lambda name, value: f"[TOOL_CALLS]{name}[ARGS]{_json(value)}", separator=""),
    "mistral_array": _CallText(
        lambda name, value: _object(name, "arguments", value),
        "with a comma between several calls",
        ", ",
        "[TOOL_CALLS][",
        "]",
    ),
}
"""By the name of the tool-call format."""


def with_tools_as_text(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], tool_format: str = DEFAULT_FORMAT
) -> list[dict[str, Any]]:
    """The conversation without tool calls and tool messages, and with the tools in its system prompt.

    Args:
        messages: in OpenAI's form, each with one string as its content.
        tools: in the form of `ToolSpec.for_template`; may be empty, though there were tools earlier.
        tool_format: the name of the format that the answer is parsed in.
    """
    calls = _CALL_TEXTS[tool_format]
    rewritten: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] == "tool":
            text = f"<tool_response>\n{message['content']}\n</tool_response>"
            if rewritten and rewritten[-1]["role"] == "user" and rewritten[-1].get("is_result"):
                rewritten[-1]["content"] += "\n" + text
            else:
                rewritten.append({"role": "user", "content": text, "is_result": True})
        elif message.get("tool_calls"):
            texts = [str(message["content"]), calls.show_all(message["tool_calls"])]
            kept = {name: value for name, value in message.items() if name != "tool_calls"}
            rewritten.append({**kept, "content": "\n".join(text for text in texts if text)})
        else:
            rewritten.append(dict(message))
    for message in rewritten:
        message.pop("is_result", None)
    if tools:
        signatures = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        example = calls.show_all([_EXAMPLE])
        _add_to_system(rewritten, _INSTRUCTIONS.format(signatures=signatures, several=calls.several, example=example))
    return rewritten


def _add_to_system(messages: list[dict[str, Any]], text: str) -> None:
    if messages and messages[0]["role"] in ("system", "developer"):
        content = messages[0]["content"]
        messages[0]["content"] = f"{content}\n\n{text}" if content else text
    else:
        messages.insert(0, {"role": "system", "content": text})
