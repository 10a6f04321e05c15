"""Bodies that nobody should send, and clients that do not read: no answer above 499, no hang, no leak."""

from __future__ import annotations

import asyncio
import copy
import json
import random
from typing import Any

import aiohttp
import pytest

from tests.server.scripted import Run, ScriptedDaemon, replying, serve

VALID: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "test-model",
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
            },
            {"role": "tool", "tool_call_id": "c", "content": "t"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "stop": ["x"],
        "logit_bias": {"1": 2},
        "stream_options": {"include_usage": True},
        "stream": True,
        "max_tokens": 5,
    },
    "/v1/completions": {"prompt": ["a", "b"], "echo": True, "max_tokens": 5, "n": 2},
    "/v1/messages": {
        "model": "claude-x",
        "max_tokens": 5,
        "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {"a": [1]}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text"}]}]},
        ],
        "tools": [{"name": "f", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "auto"},
        "thinking": {"type": "enabled", "budget_tokens": 5},
        "metadata": {"user_id": "u"},
        "stream": True,
    },
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "hi"}], "system": "s"},
    "/v1/responses": {
        "input": [
            {"role": "developer", "content": [{"type": "input_text", "text": "d"}]},
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "r"}]},
            {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}", "namespace": "n"},
            {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "o"}]},
        ],
        "instructions": "i",
        "tools": [{"type": "custom", "name": "c"}, {"type": "namespace", "name": "n", "tools": []}],
        "tool_choice": {"type": "allowed_tools", "mode": "auto"},
        "text": {"format": {"type": "json_object"}},
        "reasoning": {"effort": "low"},
        "include": ["reasoning.encrypted_content"],
        "max_output_tokens": 5,
        "stream": True,
    },
    "/v1/responses/input_tokens": {"input": "hi", "tools": []},
    "/tokenize": {"content": "hi", "with_pieces": True},
    "/detokenize": {"tokens": [65, 66]},
}
ODD: list[Any] = [
    None, True, 0, -1, 2**63, 1e308, 0.5, "", "x", "\x00", "\ud800", "x" * 5000, "<|im_end|>", "</tool_call>",
    [], {}, [[]], [None], [{}], {"": None}, {"type": {}}, {"type": []}, {"type": "text"}, {"type": "text", "text": 1},
    [1, "a", None], ["x"] * 300, {"a": {"b": {"c": []}}},
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    if isinstance(value, dict | list):
        keys = value.keys() if isinstance(value, dict) else range(len(value))
        for key in keys:
            found += places(value[key], (*path, key))
    return found


def mutate(body: dict[str, Any], random_numbers: random.Random) -> Any:
    """A copy in which one or two values are odd or missing."""
    mutated: Any = json.loads(json.dumps(body))
    for _ in range(random_numbers.choice([1, 1, 2])):
        *parents, last = random_numbers.choice(places(mutated)[1:]) if isinstance(mutated, dict) and mutated else ("x",)
        target = mutated
        for key in parents:
            target = target[key]
        if random_numbers.random() < 0.2 and isinstance(target, dict):
            target.pop(last, None)
        elif isinstance(target, dict | list):
            target[last] = copy.deepcopy(random_numbers.choice(ODD))
    return mutated


async def check_alive(daemon: ScriptedDaemon) -> None:
    await daemon.state.idle.wait()
    await daemon.driver.idle.wait()
    assert daemon.client.num_unfinished == 0
    assert daemon.client.num_waiting == 0


@pytest.mark.parametrize("path", VALID)
async def test_odd_values_are_refused_or_understood(path: str) -> None:
    """Each place of a valid body with each odd value once, and some with two of them."""
    random_numbers = random.Random(path)
    bodies = [mutate(VALID[path], random_numbers) for _ in range(150)]
    statuses: set[int] = set()
    async with serve(replying("x" * 400), max_model_len=300) as daemon, aiohttp.ClientSession() as session:

        async def send(body: Any) -> None:
            async with session.post(daemon.url + path, data=json.dumps(body).encode()) as response:
                text = await response.text()
                assert response.status < 500, (response.status, text, body)
                assert "internal_error" not in text, (text, body)
                statuses.add(response.status)

        await send(VALID[path])
        assert statuses == {200} or path == "/v1/messages"
        for body in bodies:
            await send(body)
        await check_alive(daemon)
    assert statuses >= {200, 400}


@pytest.mark.parametrize("path", VALID)
async def test_bodies_that_are_damaged(path: str) -> None:
    random_numbers = random.Random(path)
    whole = json.dumps(VALID[path]).encode()
    async with serve(max_body_bytes=1 << 16) as daemon, aiohttp.ClientSession() as session:
        bodies = [
            b"",
            b"null",
            b"\x00",
            b"\xff\xfe" + whole,
            b"[" * 60_000,
            b'{"messages":' * 5_000,
            b'{"input": ' + b"[" * 900 + b"]" * 900 + b"}",
            b'{"x": "' + b"y" * (1 << 16) + b'"}',
            *(whole[: random_numbers.randrange(len(whole))] for _ in range(20)),
        ]
        for _ in range(40):
            damaged = bytearray(whole)
            for _ in range(random_numbers.randrange(1, 6)):
                damaged[random_numbers.randrange(len(damaged))] = random_numbers.randrange(256)
            bodies.append(bytes(damaged))
        for body in bodies:
            async with session.post(daemon.url + path, data=body) as response:
                text = await response.text()
                assert response.status < 500, (response.status, text, body[:200])
                if response.status != 200:
                    assert "error" in json.loads(text)
        await check_alive(daemon)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
async def test_clients_that_leave_or_do_not_read(path: str) -> None:
    """Streams that are cut after some bytes, or never read, give everything back to the engine."""

    async def script(run: Run) -> None:
        run.admit()
        await run.reply("text " * 60)

    body = json.dumps(VALID[path] | {"max_tokens": 250, "max_output_tokens": 250, "text": None}).encode()
    if path == "/v1/messages":
        body = json.dumps({"max_tokens": 250, "stream": True, "messages": [{"role": "user", "content": "hi"}]}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    async with serve(script, max_model_len=600) as daemon:

        async def visit(num_bytes: int) -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
            writer.write(head + body)
            if num_bytes:
                assert await reader.read(num_bytes)
            writer.close()
            await asyncio.wait([asyncio.create_task(writer.wait_closed())])

        await asyncio.gather(*(visit(index % 4 * 100) for index in range(24)))
        await check_alive(daemon)
        answer = await daemon.openai().completions.create(model="test-model", prompt="x", max_tokens=4)
        assert answer.choices[0].text == "text"
