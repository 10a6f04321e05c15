"""What each family of clients expects of an answer; every rule is one that a real client breaks on.

The readers give the answer back as the client would understand it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Understood:
    """An answer as a client has read it."""

    text: str = ""
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """Names and arguments."""
    finish: str | None = None
    usage: dict[str, Any] | None = None


def parse_sse(data: bytes) -> list[tuple[str | None, str]]:
    """Names and data of the events of a stream; comments are skipped."""
    events = []
    for block in data.decode("utf-8").split("\n\n"):
        name, texts = None, []
        for line in block.splitlines():
            kind, _, value = line.partition(":")
            if kind == "event":
                name = value.strip()
            elif kind == "data":
                texts.append(value.removeprefix(" "))
        if texts:
            events.append((name, "\n".join(texts)))
    return events


def read(dialect: str, stream: bool, data: bytes) -> Understood:
    readers = {
        "chat": (_chat_whole, _chat_stream),
        "responses": (_responses_whole, _responses_stream),
        "anthropic": (_messages_whole, _messages_stream),
    }
    return readers[dialect][stream](data)


# ---- chat completions: AI SDK, the Node and Python SDKs, LiteLLM ----


def _chat_whole(data: bytes) -> Understood:
    body = json.loads(data)
    assert body["object"] == "chat.completion" and isinstance(body["created"], int)
    (choice,) = body["choices"]
    message = choice["message"]
    assert message["role"] == "assistant"
    understood = Understood(message["content"] or "", finish=choice["finish_reason"], usage=body["usage"])
    for call in message.get("tool_calls") or ():
        assert call["type"] == "function" and call["id"]
        understood.calls.append((call["function"]["name"], json.loads(call["function"]["arguments"])))
    return understood


def _chat_stream(data: bytes) -> Understood:
    events = [text for _, text in parse_sse(data)]
    assert events[-1] == "[DONE]"
    understood = Understood()
    calls: dict[int, dict[str, Any]] = {}
    roles: list[str] = []
    for chunk in map(json.loads, events[:-1]):
        assert chunk["object"] == "chat.completion.chunk"
        assert isinstance(chunk["id"], str) and isinstance(chunk["created"], int) and isinstance(chunk["model"], str)
        understood.usage = chunk.get("usage") or understood.usage
        for choice in chunk["choices"]:
            # Whatever comes behind the reason of the end is lost for some clients.
            assert understood.finish is None
            delta = choice["delta"]
            roles += [delta["role"]] if delta.get("role") else []
            understood.text += delta.get("content") or ""
            for part in delta.get("tool_calls") or ():
                if part["index"] not in calls:
                    assert part["id"] and part["type"] == "function" and part["function"]["name"]
                    calls[part["index"]] = {"name": part["function"]["name"], "arguments": ""}
                calls[part["index"]]["arguments"] += part["function"].get("arguments") or ""
            understood.finish = choice["finish_reason"]
    assert roles == ["assistant"]
    assert list(calls) == list(range(len(calls)))
    understood.calls = [(call["name"], json.loads(call["arguments"])) for call in calls.values()]
    assert understood.finish is not None, "the stream ended without finish_reason"
    return understood


# ---- responses: Codex, the Agents SDK ----


def _responses_whole(data: bytes) -> Understood:
    return _read_response(json.loads(data))


def _responses_stream(data: bytes) -> Understood:
    events = []
    for name, text in parse_sse(data):
        event = json.loads(text)
        assert event["type"] == name
        events.append(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[0]["type"] == "response.created" and events[0]["response"]["id"]
    # Without it Codex reports a closed stream and tries again.
    assert events[-1]["type"] == "response.completed"
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    added = [event["item"]["id"] for event in events if event["type"] == "response.output_item.added"]
    last = events[-1]["response"]
    # Codex takes items from `output_item.done`, others from the response at the end.
    assert done == last["output"] and added == [item["id"] for item in done]
    texts = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    understood = _read_response(last)
    assert texts == understood.text
    return understood


def _read_response(response: dict[str, Any]) -> Understood:
    assert response["object"] == "response" and response["status"] == "completed"
    usage = response["usage"]
    assert usage["input_tokens_details"].keys() >= {"cached_tokens"}
    assert usage["output_tokens_details"].keys() >= {"reasoning_tokens"}
    understood = Understood(finish=response["status"], usage=usage)
    for item in response["output"]:
        if item["type"] == "message":
            understood.text += "".join(part["text"] for part in item["content"])
        elif item["type"] == "function_call":
            assert item["call_id"]
            name = item.get("namespace", "") + item["name"]
            understood.calls.append((name, json.loads(item["arguments"])))
        elif item["type"] == "custom_tool_call":
            assert item["call_id"]
            understood.calls.append((item["name"], {"input": item["input"]}))
    return understood


# ---- messages: Claude Code, the Anthropic SDK ----


def _messages_whole(data: bytes) -> Understood:
    message = json.loads(data)
    assert (message["type"], message["role"]) == ("message", "assistant")
    understood = Understood(finish=message["stop_reason"], usage=message["usage"])
    for block in message["content"]:
        if block["type"] == "text":
            understood.text += block["text"]
        elif block["type"] == "tool_use":
            assert block["id"].startswith("toolu_")
            understood.calls.append((block["name"], block["input"]))
    return understood


def _messages_stream(data: bytes) -> Understood:
    understood = Understood()
    names: list[str] = []
    block: dict[str, Any] | None = None
    num_blocks, text = 0, ""
    for name, payload in parse_sse(data):
        event = json.loads(payload)
        # The SDK dispatches on the name, Claude Code on the type.
        assert name == event["type"]
        if name != "ping":
            names.append(name)
        if name == "message_start":
            assert event["message"]["content"] == [] and event["message"]["usage"]["input_tokens"] > 0
        elif name == "content_block_start":
            assert block is None and event["index"] == num_blocks
            block, text = event["content_block"], ""
        elif name == "content_block_delta":
            assert block is not None and event["index"] == num_blocks
            text += event["delta"].get("text") or event["delta"].get("partial_json") or ""
        elif name == "content_block_stop":
            assert block is not None and event["index"] == num_blocks
            if block["type"] == "text":
                understood.text += text
            elif block["type"] == "tool_use":
                assert block["input"] == {} and block["id"].startswith("toolu_")
                understood.calls.append((block["name"], json.loads(text) if text else {}))
            block, num_blocks = None, num_blocks + 1
        elif name == "message_delta":
            assert block is None
            understood.finish, understood.usage = event["delta"]["stop_reason"], event["usage"]
    assert names[0] == "message_start" and names[-2:] == ["message_delta", "message_stop"]
    return understood
