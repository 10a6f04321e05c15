"""Sessions of ten turns in the manner of four kinds of clients, with the official SDKs.

Each turn the client sends the whole conversation again, in the way that is told of it: what it drops, what it writes
anew, and what it changes in every request.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from anthropic import AsyncAnthropic
from openai import AsyncOpenAI

from agentserve.runtime.script import ScriptLine
from bench.client_styles.templates import Family

NUM_TURNS = 10
_MODEL = "scripted"
_SYSTEM = "You are a careful engineer. Read before you write, and say what you do.\n" + "\n".join(
    f"Rule {number}: keep every change as small as it can be, and test it." for number in range(1, 25)
)
_TOOL = "read_file"
_DESCRIPTION = "Reads a file of the project and returns its text with line numbers."
_PARAMETERS = {
    "type": "object",
    "properties": {"path": {"type": "string"}, "limit": {"type": "number"}, "exact": {"type": "boolean"}},
    "required": ["path"],
}
_QUESTIONS = (4, 7)
"""Turns that begin with a question of the user; the answer before them calls no tool."""


@dataclass(frozen=True, slots=True)
class TurnUsage:
    """Tokens of one request, as the API reports them."""

    num_prompt: int
    num_cached: int
    num_output: int


def script(family: Family) -> tuple[ScriptLine, ...]:
    """The answers of a session: thinking, text and a call, written with spaces that no template writes."""
    lines = []
    for turn in range(1, NUM_TURNS + 1):
        thinking = f"Turn {turn}. " + "The user wants me to look at the next module before I change anything. " * 3
        reply = f"{'' if family.opens_thinking else '<think>'}\n{thinking.strip()}\n</think>\n\n"
        arguments = f'{{"path":"src/module_{turn}.py" ,  "limit": {turn}.0, "exact":true}}'
        if turn + 1 in _QUESTIONS or turn == NUM_TURNS:
            reply += f"Module {turn} is fine:  nothing to change.\n"
        elif family.tool_format == "llama3_json":
            reply += f'{{"name":"{_TOOL}", "parameters":{arguments}}}'
        elif family.tool_format == "mistral_array":
            reply += f'[TOOL_CALLS][{{"name":"{_TOOL}","arguments":{arguments}}}]'
        else:
            reply += (
                f'I look at module {turn}.\n<tool_call>\n{{"name":"{_TOOL}","arguments":{arguments}}}\n</tool_call>'
            )
        lines.append(ScriptLine(reply, match=(_step(turn),), unless=(_step(turn + 1),)))
    return tuple(lines)


def _step(turn: int) -> str:
    return f"[step {turn}]"


def _question(turn: int) -> str:
    return f"{_step(turn)} Please look at the module of this step."


def _result(turn: int) -> str:
    return f"{_step(turn)}\n" + "\n".join(f"{line:4} value_{line} = compute({line})" for line in range(1, 15))


# ---- the clients ----


async def claude_code(url: str) -> list[TurnUsage]:
    """Messages, streamed: a billing line that always changes, rolling cache markers, thinking sent back."""
    session = str(uuid.uuid4())
    usages: list[TurnUsage] = []
    messages: list[Any] = [{"role": "user", "content": [{"type": "text", "text": _question(1)}]}]
    async with AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as client:
        for turn in range(1, NUM_TURNS + 1):
            marker = {"cache_control": {"type": "ephemeral"}}
            shown = [*messages[:-1], {**messages[-1], "content": [*messages[-1]["content"]]}]
            shown[-1]["content"][-1] = {**shown[-1]["content"][-1], **marker}
            system = [
                {"type": "text", "text": f"x-anthropic-billing-header: cc_version=2.1; cch={uuid.uuid4().hex[:5]};"},
                {"type": "text", "text": _SYSTEM, **marker},
            ]
            async with client.messages.stream(
                model="claude-sonnet",
                max_tokens=2000,
                system=system,  # type: ignore[arg-type]
                messages=shown,
                tools=[{"name": _TOOL, "description": _DESCRIPTION, "input_schema": _PARAMETERS}],
                metadata={"user_id": f"user_0_account__session_{session}"},
                extra_headers={"X-Claude-Code-Session-Id": session, "anthropic-beta": "context-management-2025-06-27"},
                extra_body={"thinking": {"type": "adaptive"}},
            ) as stream:
                answer = await stream.get_final_message()
            cached = answer.usage.cache_read_input_tokens or 0
            usages.append(TurnUsage(answer.usage.input_tokens + cached, cached, answer.usage.output_tokens))
            # The input of a call is an object by now: it is written anew. Thoughts come back with their signature.
            blocks = [block.model_dump(mode="json", exclude_none=True) for block in answer.content]
            messages.append({"role": "assistant", "content": blocks})
            calls = [block for block in blocks if block["type"] == "tool_use"]
            content: list[Any] = [
                {"type": "tool_result", "tool_use_id": call["id"], "content": _result(turn + 1)} for call in calls
            ]
            messages.append({"role": "user", "content": content or [{"type": "text", "text": _question(turn + 1)}]})
            if turn == 2:  # a late system message, which must not go to the front
                messages.append({"role": "system", "content": [{"type": "text", "text": "The user opened a file."}]})
    return usages


async def codex(url: str) -> list[TurnUsage]:
    """Responses, streamed: all items of the answer come back, thoughts as what the server sealed."""
    session = str(uuid.uuid4())
    usages: list[TurnUsage] = []
    items: list[Any] = [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Sandbox: read only."}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": _question(1)}]},
    ]
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        for turn in range(1, NUM_TURNS + 1):
            events = await client.responses.create(
                model=_MODEL,
                instructions=_SYSTEM,
                input=items,
                tools=[
                    {
                        "type": "function",
                        "name": _TOOL,
                        "description": _DESCRIPTION,
                        "parameters": _PARAMETERS,
                        "strict": False,
                    },
                    {"type": "web_search"},
                ],
                tool_choice="auto",
                parallel_tool_calls=False,
                store=False,
                stream=True,
                include=["reasoning.encrypted_content"],
                prompt_cache_key=session,
                extra_headers={"session-id": session, "x-client-request-id": str(uuid.uuid4())},
            )
            response = None
            async for event in events:
                if event.type == "response.completed":
                    response = event.response
            assert response is not None and response.usage is not None, "the stream has no end"
            cached = response.usage.input_tokens_details.cached_tokens
            usages.append(TurnUsage(response.usage.input_tokens, cached, response.usage.output_tokens))
            dumped = [item.model_dump(mode="json", exclude_none=True) for item in response.output]
            for item in dumped:
                if item["type"] == "reasoning":
                    item.pop("content", None)  # only the sealed form comes back
                item.pop("status", None)
            items += dumped
            calls = [item for item in dumped if item["type"] == "function_call"]
            items += [
                {"type": "function_call_output", "call_id": call["call_id"], "output": _result(turn + 1)}
                for call in calls
            ]
            if not calls:
                text = {"type": "input_text", "text": _question(turn + 1)}
                items.append({"type": "message", "role": "user", "content": [text]})
    return usages


async def opencode(url: str) -> list[TurnUsage]:
    """Chat completions, streamed: reasoning is dropped, arguments are parsed and written in JavaScript's way."""
    session = f"ses_{uuid.uuid4().hex}"
    headers = {"x-session-affinity": session, "X-Session-Id": session}

    async def ask(client: AsyncOpenAI, messages: list[Any]) -> tuple[dict[str, Any], Any]:
        chunks = await client.chat.completions.create(
            model=_MODEL,
            messages=messages,
            tools=_CHAT_TOOLS,
            stream=True,
            stream_options={"include_usage": True},
            extra_headers=headers,
        )
        text, usage = "", None
        calls: dict[int, dict[str, Any]] = {}
        async for chunk in chunks:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                text += choice.delta.content or ""
                for delta in choice.delta.tool_calls or ():
                    assert delta.function is not None
                    call = calls.setdefault(delta.index, {"id": delta.id, "name": "", "arguments": ""})
                    call["name"] += delta.function.name or ""
                    call["arguments"] += delta.function.arguments or ""
        return _assistant(text, list(calls.values()), _as_javascript), usage

    return await _chat_session(url, ask)


async def langchain(url: str) -> list[TurnUsage]:
    """Chat completions in one piece, without a name for the session: reasoning is dropped, arguments are rewritten."""

    async def ask(client: AsyncOpenAI, messages: list[Any]) -> tuple[dict[str, Any], Any]:
        answer = await client.chat.completions.create(model=_MODEL, messages=messages, tools=_CHAT_TOOLS)
        message = answer.choices[0].message
        calls = []
        for call in message.tool_calls or ():
            assert call.type == "function"
            calls.append({"id": call.id, "name": call.function.name, "arguments": call.function.arguments})
        return _assistant(message.content or "", calls, json.dumps), answer.usage

    return await _chat_session(url, ask)


_CHAT_TOOLS: list[Any] = [
    {"type": "function", "function": {"name": _TOOL, "description": _DESCRIPTION, "parameters": _PARAMETERS}}
]
_Ask = Callable[[AsyncOpenAI, list[Any]], Awaitable[tuple[dict[str, Any], Any]]]


async def _chat_session(url: str, ask: _Ask) -> list[TurnUsage]:
    usages: list[TurnUsage] = []
    messages: list[Any] = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": _question(1)}]
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        for turn in range(1, NUM_TURNS + 1):
            message, usage = await ask(client, messages)
            usages.append(
                TurnUsage(usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens, usage.completion_tokens)
            )
            messages.append(message)
            calls = message.get("tool_calls", ())
            messages += [{"role": "tool", "tool_call_id": call["id"], "content": _result(turn + 1)} for call in calls]
            if not calls:
                messages.append({"role": "user", "content": _question(turn + 1)})
    return usages


def _assistant(text: str, calls: list[dict[str, Any]], write: Callable[[Any], str]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text or None}
    if calls:
        message["tool_calls"] = [
            {
                "id": call["id"],
                "type": "function",
                "function": {"name": call["name"], "arguments": write(json.loads(call["arguments"]))},
            }
            for call in calls
        ]
    return message


def _as_javascript(value: Any) -> str:
    """As `JSON.stringify` writes it: no spaces, and 3.0 is 3."""
    text = {key: int(item) if isinstance(item, float) and item.is_integer() else item for key, item in value.items()}
    return json.dumps(text, separators=(",", ":"))


STYLES: Mapping[str, Callable[[str], Awaitable[list[TurnUsage]]]] = {
    "claude-code": claude_code,
    "codex": codex,
    "opencode": opencode,
    "langchain": langchain,
}
