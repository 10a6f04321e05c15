"""`--script FILE`: answers from a file, through the real engine, for clients that use tools."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from agentserve.core.events import SubmitRequest
from agentserve.core.request import SamplingParams
from agentserve.errors import ConfigError
from agentserve.executors.simulated.scripted import ScriptedExecutor
from agentserve.runtime.client import EngineClient, EventBridge
from agentserve.runtime.live import LiveDriver, MonotonicClock
from agentserve.runtime.script import NO_LINE, Script, ScriptDriver, read_script
from agentserve.server.answer_format import AnswerSupport
from agentserve.server.app import ServerOptions, ServerState
from agentserve.text.output import OutputFormat
from agentserve.text.tools.formats import TOOL_FORMATS
from tests.core import builders
from tests.server.daemon import ByteTokenizer, Daemon, PlainTemplate, running

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
LINES: list[dict[str, Any]] = [
    {"match": "title", "reply": "A title"},
    {"match": ["21 degrees", "Paris"], "reply": "It is warm."},
    {"match": "Paris", "turn": 1, "reply": "One moment.\n" + CALL},
    {"reply": "na ", "finish": "length"},
]


def write(path: Path, lines: list[Any]) -> Path:
    file = path / "script.jsonl"
    file.write_text("\n".join([*(json.dumps(line) for line in lines), ""]), encoding="utf-8")
    return file


@asynccontextmanager
async def serve(path: Path) -> AsyncIterator[Daemon]:
    tokenizer = ByteTokenizer()
    script = Script(read_script(path), tokenizer)
    core = builders.core(block_size=4, max_model_len=512, num_blocks=256)
    executor = ScriptedExecutor(
        builders.cost_model(bandwidth_bytes_per_s=1e12, flops_per_s=2e12),
        next_token=script.next_token,
        num_blocks=256,
        block_size=4,
        vocabulary=list(b"never seen"),
    )
    bridge = EventBridge()
    driver = LiveDriver(core, executor, MonotonicClock(), on_events=bridge.on_events, on_failure=bridge.on_failure)
    client = EngineClient(ScriptDriver(driver, script), max_model_len=512, max_queued_requests=64)
    bridge.bind(client, asyncio.get_running_loop())
    driver.start()
    try:
        support = AnswerSupport(OutputFormat(TOOL_FORMATS["hermes"], None, tokenizer))
        options = ServerOptions(model_name="m", executor="simulated", simulated=True, port=0)
        daemon = Daemon(ServerState.create(options, client, tokenizer, PlainTemplate(), support=support))
        async with running(daemon):
            yield daemon
    finally:
        driver.stop()


async def test_a_task_with_tools_from_begin_to_end(tmp_path: Path) -> None:
    """The same script for both SDKs; background calls do not disturb it."""
    async with serve(write(tmp_path, LINES)) as daemon:
        messages: list[Any] = [{"role": "user", "content": "How is Paris?"}]
        tools: list[Any] = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
        client = daemon.openai()
        answer = await client.chat.completions.create(model="m", messages=messages, tools=tools, user="s")
        title = await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "title?"}])
        assert title.choices[0].message.content == "A title"
        assert answer.choices[0].finish_reason == "tool_calls"
        assert answer.choices[0].message.content == "One moment."
        messages += [
            answer.choices[0].message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": answer.choices[0].message.tool_calls[0].id, "content": "21 degrees"},  # type: ignore[index]
        ]
        answer = await client.chat.completions.create(model="m", messages=messages, tools=tools, user="s")
        assert answer.choices[0].message.content == "It is warm."

        begun = await daemon.anthropic().messages.create(
            model="claude-x",
            max_tokens=100,
            messages=[{"role": "user", "content": "How is Paris?"}],
            tools=[{"name": "weather", "input_schema": {"type": "object"}}],
            metadata={"user_id": "other"},
        )
        assert begun.stop_reason == "tool_use"
        long = await client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "sing"}], max_tokens=7
        )
        assert (long.choices[0].message.content, long.choices[0].finish_reason) == ("na na n", "length")


def submit(script: Script, prompt: str, session: str | None = None) -> str:
    request_id = f"r{id(prompt)}{session}"
    script.begin(SubmitRequest(request_id, tuple(prompt.encode()), SamplingParams(max_tokens=9), session_id=session))
    tokens: list[int] = []
    while (token := script.next_token(request_id, len(tokens))) is not None:
        tokens.append(token)
    return bytes(tokens).decode()


def test_lines_are_chosen_in_order(tmp_path: Path) -> None:
    lines = [
        {"match": "a", "unless": "b", "reply": "1", "times": 1},
        {"turn": 2, "reply": "2"},
        {"match": "a", "reply": "3"},
    ]
    script = Script(read_script(write(tmp_path, lines)), ByteTokenizer())
    assert submit(script, "a", "s") == "1"
    assert submit(script, "a", "s") == "2"
    assert submit(script, "ab", "t") == "3"
    assert submit(script, "x", "u") == NO_LINE


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("{", "not valid JSON"),
        ("[]", "with a reply"),
        ('{"reply": 3}', "with a reply"),
        ('{"reply": "x", "mach": "y"}', "unknown field 'mach'"),
        ('{"reply": "x", "match": 3}', "match must be"),
        ('{"reply": "x", "unless": [""]}', "unless must be"),
        ('{"reply": "x", "turn": 0}', "turn must be"),
        ('{"reply": "x", "finish": "error"}', "finish must be"),
        ("", "has no line"),
    ],
)
def test_wrong_scripts(tmp_path: Path, line: str, part: str) -> None:
    file = tmp_path / "s.jsonl"
    file.write_text(line, encoding="utf-8")
    with pytest.raises(ConfigError, match=part):
        read_script(file)
    with pytest.raises(ConfigError, match="cannot read"):
        read_script(tmp_path / "missing")
