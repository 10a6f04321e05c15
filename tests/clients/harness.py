"""The real engine with scripted answers behind the real server, for SDKs, frameworks and recorded requests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from agentserve.executors.simulated.scripted import ScriptedExecutor
from agentserve.runtime.client import EngineClient, EventBridge
from agentserve.runtime.live import LiveDriver, MonotonicClock
from agentserve.runtime.script import Script, ScriptDriver, read_script
from agentserve.server.answer_format import AnswerSupport
from agentserve.server.app import ServerOptions, ServerState
from agentserve.text.grammar.compiler import GrammarCompiler
from agentserve.text.grammar.masks import GrammarMasks
from agentserve.text.output import OutputFormat
from agentserve.text.tools.formats import TOOL_FORMATS
from tests.core import builders
from tests.server.daemon import ByteTokenizer, Daemon, PlainTemplate, running

WINDOW = 131072
BLOCK_SIZE = 64
MODEL = "test-model"

QUESTION = "How warm is it in Paris?"
RESULT = "21 degrees"
ANSWER = "It is mild in Paris."


def call(name: str, **arguments: Any) -> str:
    """A tool call as the model writes it."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


WEATHER: list[dict[str, Any]] = [
    {"match": RESULT, "reply": ANSWER},
    {"match": ["<tools>", "Paris"], "reply": "I look it up.\n" + call("weather", city="Paris")},
]
"""Two turns: a call of `weather`, and an answer when its result is there."""


@asynccontextmanager
async def serve(
    tmp_path: Path, lines: Sequence[dict[str, Any]], *, max_model_len: int = WINDOW
) -> AsyncIterator[Daemon]:
    """A daemon that answers with `lines`, in the format of `serve --script`. Its tokens are bytes."""
    file = tmp_path / "script.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    tokenizer = ByteTokenizer()
    script = Script(read_script(file), tokenizer)
    num_blocks = 4 * WINDOW // BLOCK_SIZE
    core = builders.core(
        block_size=BLOCK_SIZE, max_model_len=max_model_len, num_blocks=num_blocks, prefill_chunk=WINDOW
    )
    executor = ScriptedExecutor(
        builders.cost_model(
            bandwidth_bytes_per_s=1e15, flops_per_s=1e18, kv_bandwidth_bytes_per_s=1e15, attention_flops_per_s=1e21
        ),
        next_token=script.next_token,
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        vocabulary=list(b"never seen"),
    )
    bridge = EventBridge()
    driver = LiveDriver(core, executor, MonotonicClock(), on_events=bridge.on_events, on_failure=bridge.on_failure)
    client = EngineClient(
        ScriptDriver(driver, script), max_model_len=max_model_len, max_queued_requests=64, masks=GrammarMasks()
    )
    bridge.bind(client, asyncio.get_running_loop())
    driver.start()
    try:
        output = OutputFormat(TOOL_FORMATS["hermes"], None, tokenizer)
        support = AnswerSupport(output, GrammarCompiler(tokenizer, output))
        # As `serve` does on loopback.
        options = ServerOptions(model_name=MODEL, executor="simulated", simulated=True, port=0, accept_any_model=True)
        daemon = Daemon(ServerState.create(options, client, tokenizer, PlainTemplate(), support=support))
        async with running(daemon):
            yield daemon
    finally:
        driver.stop()
