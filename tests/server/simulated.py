"""A daemon for tests on the real control plane and simulated timing, whose outputs follow grammars."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from agentserve.core.agents.policy import Policy
from agentserve.executors.simulated.constrained import ConstrainedTokens
from agentserve.executors.simulated.executor import SimulatedExecutor
from agentserve.runtime.client import EngineClient, EventBridge
from agentserve.runtime.live import LiveDriver, MonotonicClock
from agentserve.server.answer_format import AnswerSupport
from agentserve.server.app import ServerOptions, ServerState
from agentserve.text.grammar.compiler import GrammarCompiler
from agentserve.text.grammar.masks import GrammarMasks
from agentserve.text.output import OutputFormat
from agentserve.text.reasoning import ReasoningFormat
from agentserve.text.tools.formats import TOOL_FORMATS
from tests.core import builders
from tests.server.daemon import ByteTokenizer, Daemon, PlainTemplate, running

BLOCK_SIZE = 4
TEXT = b"the quick brown fox jumps over the lazy dog "


@asynccontextmanager
async def serve(
    max_queued_requests: int = 64,
    *,
    options: dict[str, Any] | None = None,
    reasoning: ReasoningFormat | None = None,
    speed: float = 1000.0,
    safety: Sequence[Policy] = (),
    **config: Any,
) -> AsyncIterator[Daemon]:
    """A daemon on a device that is `speed` times as fast as the one of the builders; `config` is the engine's.

    When it is left, nothing may be left of the requests: no task, no request, no block that cannot be had, no grammar,
    no thread.
    """
    tasks, threads = asyncio.all_tasks(), set(threading.enumerate())
    core = builders.core(block_size=BLOCK_SIZE, **({"max_model_len": 512, "num_blocks": 256} | config))
    cost_model = builders.cost_model(bandwidth_bytes_per_s=1e9 * speed, flops_per_s=2e9 * speed)
    tokenizer, masks = ByteTokenizer(), GrammarMasks()
    output = OutputFormat(TOOL_FORMATS["hermes"], reasoning, tokenizer)
    grammars = GrammarCompiler(tokenizer, output)
    executor = SimulatedExecutor(
        cost_model,
        tiering=config.get("tiering"),
        num_blocks=core.config.num_blocks,
        block_size=BLOCK_SIZE,
        lora=core.config.lora,
        vocabulary=list(TEXT),
        constrained=ConstrainedTokens(masks, list(b'"}])>\n,:')),
    )
    bridge = EventBridge()
    driver = LiveDriver(core, executor, MonotonicClock(), on_events=bridge.on_events, on_failure=bridge.on_failure)
    client = EngineClient(
        driver, max_model_len=core.config.max_model_len, max_queued_requests=max_queued_requests, masks=masks
    )
    bridge.bind(client, asyncio.get_running_loop())
    driver.start()
    try:
        merged: dict[str, Any] = {"model_name": "m", "executor": "simulated", "simulated": True, "port": 0}
        daemon = Daemon(
            ServerState.create(
                ServerOptions(**(merged | (options or {}))),
                client,
                tokenizer,
                PlainTemplate(),
                support=AnswerSupport(output, grammars),
                safety=safety,
                engine_failure=lambda: driver.failure,
            )
        )
        async with running(daemon):
            yield daemon
            # Cancels travel to the engine thread; when it has seen them, every block is free or holds a prefix.
            while (stats := client.stats()).num_running or stats.num_waiting:
                assert driver.failure is None, driver.failure
                await asyncio.sleep(0.001)
            assert stats.num_free_blocks + stats.num_cached_blocks == stats.num_blocks
    finally:
        driver.stop()
        masks.shutdown()
        grammars.close()
    core.check_invariants()
    assert not core.has_unfinished
    assert core.memory.num_available_blocks == core.config.num_blocks
    assert masks.num_open == 0
    assert not {task for task in asyncio.all_tasks() - tasks if not task.done()}
    started = [thread.name for thread in threading.enumerate() if thread not in threads]
    assert not [name for name in started if name.startswith("agentserve")]
