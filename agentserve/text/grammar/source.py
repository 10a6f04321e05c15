"""From what a request asks for to a grammar."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, assert_never

from agentserve.errors import InvalidGrammarError, InvalidRequestError
from agentserve.text.grammar.calls import CALL_RULES, CallRules, CallTool
from agentserve.text.grammar.lark import TEXT, LarkBuilder, escape_regex
from agentserve.text.grammar.schema import check_schema, closed, locate
from agentserve.text.output import OutputFormat
from agentserve.text.tools.spec import (
    ChoiceFormat,
    JsonObjectFormat,
    JsonSchemaFormat,
    LarkFormat,
    RegexFormat,
    ResponseFormat,
    TextFormat,
    ToolChoice,
    ToolMode,
    ToolSpec,
)

Check = Callable[[Mapping[str, Any]], str]
"""The problem of a schema, empty if it has none."""
_ANY_CHOICE = ToolChoice()
_ANY_TEXT = TextFormat()
_RESPONSE_FORMAT = "response_format"
_ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


@dataclass(frozen=True, slots=True)
class Grammar:
    """A grammar in llguidance's notation. Equal ones are compiled once."""

    text: str
    param: str
    """The field of the request to blame if it cannot be compiled."""


@dataclass(frozen=True, slots=True)
class Constraint:
    """What a request says about the form of its answer."""

    tools: tuple[ToolSpec, ...] = ()
    choice: ToolChoice = _ANY_CHOICE
    format: ResponseFormat = _ANY_TEXT
    may_reason: bool = True
    """Whether the reader of the answer looks for reasoning before it."""

    @property
    def is_constrained(self) -> bool:
        """Whether a grammar is needed."""
        if self.choice.mode in {ToolMode.REQUIRED, ToolMode.NAMED}:
            return True
        if not isinstance(self.format, TextFormat):
            return True
        return self.choice.mode is ToolMode.AUTO and any(tool.strict for tool in self.tools)


def build_grammar(constraint: Constraint, output: OutputFormat, prompt: str, check: Check) -> Grammar | None:
    """The grammar of an answer to the rendered `prompt`; None if every text is allowed.

    With tools, `response_format` is for answers without calls. `check` is asked about each schema, so that an error
    names the place in the schema that is at fault. Raises InvalidGrammarError.
    """
    if not constraint.is_constrained:
        return None
    builder = LarkBuilder(output.special_ids.get)
    thinking, not_thinking = _thinking(builder, output, prompt) if constraint.may_reason else ("", "")
    mode = constraint.choice.mode
    tools = () if mode is ToolMode.NONE else constraint.tools
    wants_calls = mode in {ToolMode.REQUIRED, ToolMode.NAMED}
    if not wants_calls and not any(tool.strict for tool in tools):
        if isinstance(constraint.format, LarkFormat):
            return _lark(constraint.format, thinking)
        # An answer that is to have a form may still be a call of one of the tools.
        calls = _calls(builder, _tools(constraint, check), output, constraint.choice) if tools else None
        answer = _answer(builder, constraint.format, check, not_thinking)
        start = answer if calls is None else f"({answer} | {calls})"
        return Grammar(builder.build(_behind(thinking, start, is_optional=bool(not_thinking))), _RESPONSE_FORMAT)
    checked = _tools(constraint, check)
    if wants_calls:
        start = _calls(builder, checked, output, constraint.choice)
        return Grammar(builder.build(_behind(thinking, start, is_optional=bool(not_thinking))), "tool_choice")
    start = _free_text_with_calls(builder, checked, output, constraint, check)
    if not not_thinking:
        return Grammar(builder.build(f"{thinking} {start}"), "tools")
    # An answer without thinking must be told from one with it, or the text of a thought would be searched for calls.
    at_once = _free_text_with_calls(builder, checked, output, constraint, check, not_thinking=not_thinking)
    return Grammar(builder.build(f"({thinking} {start} | {at_once})"), "tools")


# ---- answers ----


def _answer(builder: LarkBuilder, format: ResponseFormat, check: Check, not_thinking: str) -> str:
    match format:
        case TextFormat():
            return builder.rule(TEXT)
        case JsonObjectFormat():
            return builder.json(_ANY_OBJECT)
        case JsonSchemaFormat(schema=schema):
            return builder.json(_checked_schema(schema, _RESPONSE_FORMAT, check))
        case RegexFormat(pattern=pattern):
            return builder.terminal(f"{_regex(pattern)} & {not_thinking}" if not_thinking else _regex(pattern))
        case ChoiceFormat(choices=choices):
            return builder.rule(" | ".join(json.dumps(choice) for choice in choices))
        case LarkFormat():
            raise InvalidGrammarError("a grammar cannot be combined with strict tools", param=_RESPONSE_FORMAT)
        case _:
            assert_never(format)


def _regex(pattern: str) -> str:
    """The pattern as an expression; a slash would end it, and a line must not."""
    escaped: list[str] = []
    is_escaped = False
    for character in pattern:
        if character == "/":
            escaped.append("/" if is_escaped else "\\/")
        elif character == "\n":
            escaped.append("n" if is_escaped else "\\n")
        else:
            escaped.append(character)
        is_escaped = character == "\\" and not is_escaped
    return f"/{''.join(escaped)}/"


def _lark(format: LarkFormat, thinking: str) -> Grammar:
    if thinking:
        raise InvalidRequestError(
            "a grammar cannot be combined with reasoning; switch one of them off", param="grammar"
        )
    return Grammar(f"%llguidance {{}}\n{format.grammar}", "grammar")


def _checked_schema(schema: Mapping[str, Any] | bool, param: str, check: Check) -> Mapping[str, Any]:
    checked = closed(check_schema(schema, param))
    problem = check(checked)
    if problem:
        raise InvalidGrammarError(locate(checked, param, problem, check), param=param)
    return checked


# ---- calls ----


def _tools(constraint: Constraint, check: Check) -> list[CallTool]:
    """The tools that may be called. The schema of one that is not strict is left out if it is not supported."""
    checked = []
    for index, tool in enumerate(constraint.tools):
        if constraint.choice.mode is ToolMode.NAMED and tool.name != constraint.choice.name:
            continue
        param = f"tools[{index}]"
        try:
            parameters = _checked_schema(_as_object(tool.parameters, param), param, check)
        except InvalidGrammarError:
            if tool.strict:
                raise
            parameters = _ANY_OBJECT
        checked.append(CallTool(tool.name, parameters, tool.strict, param))
    if not checked:
        name = constraint.choice.name
        what = "there are no tools" if name is None else f"there is no tool {name!r}"
        raise InvalidRequestError(f"tool_choice: {what}", param="tool_choice")
    return checked


def _as_object(parameters: Mapping[str, Any] | None, param: str) -> Mapping[str, Any]:
    if not parameters:
        return _ANY_OBJECT
    if not isinstance(parameters, Mapping):
        raise InvalidGrammarError(f"{param}: the parameters must be a JSON Schema, an object", param=param)
    return parameters if "type" in parameters or "$ref" in parameters else {"type": "object", **parameters}


def _rules(builder: LarkBuilder, tools: Sequence[CallTool], output: OutputFormat) -> CallRules:
    if output.tool_format is None:
        raise InvalidRequestError(
            "how this model writes tool calls is not known; start the server with --tool-call-parser",
            param="tool_choice",
        )
    return CALL_RULES[output.tool_format.name](builder, list(tools))


def _calls(builder: LarkBuilder, tools: Sequence[CallTool], output: OutputFormat, choice: ToolChoice) -> str:
    """One call or more, and nothing else."""
    rules = _rules(builder, tools, output)
    trigger = builder.literal(rules.trigger) if rules.trigger else ""
    between = f"{rules.separator} {'' if rules.opening else trigger}"
    more = f"({between} {rules.call})*" if choice.parallel else ""
    return builder.rule(f"{trigger} {rules.opening} {rules.call} {more} {rules.closing}")


def _free_text_with_calls(
    builder: LarkBuilder,
    tools: Sequence[CallTool],
    output: OutputFormat,
    constraint: Constraint,
    check: Check,
    *,
    not_thinking: str = "",
) -> str:
    """An answer in which the grammar begins where a call begins.

    `not_thinking` is a pattern that the answer's text must fit as well.
    """
    is_text = isinstance(constraint.format, TextFormat)
    rules = _rules(builder, tools, output)
    also = f" & {not_thinking}" if not_thinking else ""
    if not is_text or not rules.trigger:
        calls = _calls(builder, tools, output, constraint.choice)
        if not is_text:
            return f"({_answer(builder, constraint.format, check, not_thinking)} | {calls})"
        # What starts like a call is one.
        text = builder.terminal(f"/[^{chr(92)}{rules.first}{chr(92)}s](?s:.*)/{also}")
        return f"({text} | {calls})?"
    text = builder.rule(TEXT)
    head = builder.until(rules.trigger)
    first_text, first_head = text, head
    if not_thinking:
        first_text = builder.terminal(TEXT + also)
        first_head = builder.until(rules.trigger, not_thinking)
    if rules.opening:
        more = f"({rules.separator} {rules.call})*" if constraint.choice.parallel else ""
        return f"({first_text} | {first_head} {rules.opening} {rules.call} {more} {rules.closing})"
    if not constraint.choice.parallel:
        return f"({first_text} | {first_head} {rules.call})"
    return f"({first_text} | {first_head} {rules.call} ({head} {rules.call})* {text})"


# ---- reasoning ----


def _thinking(builder: LarkBuilder, output: OutputFormat, prompt: str) -> tuple[str, str]:
    """The expression for the reasoning before the answer, empty for a model that does not reason.

    And what tells an answer that starts without reasoning from one with it: a pattern for its text, empty if it must
    start with reasoning.
    """
    reasoning = output.reasoning
    if reasoning is None:
        return "", ""
    rest = f"{builder.until(reasoning.close)} {builder.rule('/[ ' + chr(92) + 'n]{0,3}/')}"
    if reasoning.is_open_in(prompt):
        return rest, ""
    return f"{builder.literal(reasoning.open)} {rest}", f"~/(?s:[ {chr(92)}n]*{escape_regex(reasoning.open)}.*)/"


def _behind(thinking: str, start: str, *, is_optional: bool) -> str:
    """An answer that no thought can be taken for, and perhaps a thought before it."""
    return f"({thinking})? {start}" if is_optional else f"{thinking} {start}"
