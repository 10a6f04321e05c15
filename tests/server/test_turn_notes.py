"""What the engine is told of a turn: the tool behind an answer, the task, whether it was the last one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import aiohttp
import pytest

from agentserve.core.events import HUMAN, NoteTurn
from agentserve.core.request import FinishReason
from tests.server.daemon import Daemon
from tests.server.scripted import Run, replying, serve
from tests.server.test_chat_tools import HELLO, ONE, TOOLS, TWO

ANTHROPIC_TOOLS: list[Any] = [
    {"name": tool["function"]["name"], "input_schema": tool["function"]["parameters"]} for tool in TOOLS
]
RESPONSES_TOOLS: list[Any] = [{"type": "function", **tool["function"]} for tool in TOOLS]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": HELLO, "tools": TOOLS},
    "/v1/messages": {"messages": HELLO, "tools": ANTHROPIC_TOOLS, "max_tokens": 500},
    "/v1/responses": {"input": "hi", "tools": RESPONSES_TOOLS},
}


async def post(daemon: Daemon, path: str, headers: Mapping[str, str] | None = None, **fields: Any) -> tuple[int, str]:
    """Status and text of the answer to the body of that path."""
    async with (
        aiohttp.ClientSession() as session,
        session.post(daemon.url + path, json={**BODIES[path], **fields}, headers=headers) as response,
    ):
        return response.status, await response.text()


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("text", "tool"), [(ONE, "weather"), (TWO, "time+weather"), (ONE + ONE, "weather"), ("Hello.", HUMAN)]
)
async def test_every_dialect_says_which_tool_runs(path: str, stream: bool, text: str, tool: str) -> None:
    async with serve(max_model_len=1000, script=replying(text)) as daemon:
        assert (await post(daemon, path, stream=stream))[0] == 200
        assert daemon.driver.notes == [NoteTurn(daemon.driver.submitted[0].request_id, tool)]


async def test_the_note_is_there_before_the_end_of_the_answer() -> None:
    """So that it is, before the next turn of a client that is quick."""
    async with serve(max_model_len=1000, script=replying(ONE)) as daemon:
        stream = await daemon.openai().chat.completions.create(
            model="test-model", messages=HELLO, tools=TOOLS, stream=True
        )
        async for chunk in stream:
            if chunk.choices[0].finish_reason is not None:
                assert [note.tool_name for note in daemon.driver.notes] == ["weather"]


async def test_several_choices_are_one_turn() -> None:
    async with serve(max_model_len=1000, script=replying(ONE)) as daemon:
        await daemon.openai().chat.completions.create(model="test-model", messages=HELLO, tools=TOOLS, n=2)
        assert daemon.driver.notes == [NoteTurn(daemon.driver.submitted[1].request_id, "weather")]


async def cut_off(run: Run) -> None:
    run.admit()
    for byte in ONE.encode():
        run.token(byte)
    run.finish(FinishReason.LENGTH)


async def test_nothing_is_said_of_what_nobody_knows() -> None:
    """An answer that was cut off, by a limit or a stop string, may go on or be read by a program; text is no turn."""
    async with serve(max_model_len=1000, script=cut_off) as daemon:
        await daemon.openai().chat.completions.create(model="test-model", messages=HELLO, tools=TOOLS)
        daemon.driver.script = replying("Action: look\nObservation: none")
        await daemon.openai().chat.completions.create(model="test-model", messages=HELLO, stop="Observation:")
        await daemon.openai().completions.create(model="test-model", prompt="a", max_tokens=100)
        assert len(daemon.driver.submitted) == 3
        assert daemon.driver.notes == []


@pytest.mark.parametrize(
    ("headers", "metadata", "expected"),
    [
        ({}, {}, (None, None)),
        ({"X-Agent-Program": "p", "X-Agent-Last-Turn": "true"}, {}, ("p", True)),
        ({"X-Agent-Last-Turn": "0"}, {"last_turn": "true"}, (None, False)),
        ({}, {"program_id": "q", "last_turn": True}, ("q", True)),
        ({}, {"program_id": 7, "last_turn": "FALSE"}, (None, False)),
    ],
)
async def test_the_client_says_which_task_and_whether_it_ends(
    headers: dict[str, str], metadata: dict[str, Any], expected: tuple[str | None, bool | None]
) -> None:
    async with serve() as daemon:
        assert (await post(daemon, "/v1/chat/completions", headers, metadata=metadata))[0] == 200
        submitted = daemon.driver.submitted[0]
        assert (submitted.program_id, submitted.is_last_turn) == expected


@pytest.mark.parametrize(
    ("headers", "metadata", "param"),
    [
        ({"X-Agent-Last-Turn": "maybe"}, {}, "x-agent-last-turn"),
        ({}, {"last_turn": 1}, "metadata.last_turn"),
    ],
)
async def test_a_last_turn_is_true_or_false(headers: dict[str, str], metadata: dict[str, Any], param: str) -> None:
    async with serve() as daemon:
        status, text = await post(daemon, "/v1/chat/completions", headers, metadata=metadata)
        assert (status, json.loads(text)["error"]["param"]) == (400, param)
