"""A daemon whose model is scripted and whose device takes no time: only what is found in the cache is of interest."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from agentserve.build.simulation import load_hardware
from agentserve.config import EngineConfig
from agentserve.executors.simulated.scripted import ScriptedExecutor
from agentserve.runtime.client import EngineClient, EventBridge
from agentserve.runtime.live import LiveDriver, MonotonicClock
from agentserve.runtime.replay import build_core
from agentserve.runtime.script import Script, ScriptDriver, ScriptLine
from agentserve.server.answer_format import AnswerSupport
from agentserve.server.app import ServerOptions, ServerState, run_server
from agentserve.server.caching import CacheOptions
from agentserve.text.output import OutputFormat
from agentserve.text.reasoning import THINK
from agentserve.text.tools.formats import TOOL_FORMATS
from bench.client_styles.templates import Family

_WINDOW = 1 << 16
_SPEED = 1e6


@dataclasses.dataclass(frozen=True, slots=True)
class Served:
    """A running daemon."""

    url: str
    state: ServerState


@asynccontextmanager
async def serve(family: Family, lines: tuple[ScriptLine, ...], cache: CacheOptions) -> AsyncIterator[Served]:
    """Starts a daemon on a free port of loopback that answers with `lines`."""
    hardware = load_hardware()
    profile = dataclasses.replace(
        hardware.profile,
        bandwidth_bytes_per_s=hardware.profile.bandwidth_bytes_per_s * _SPEED,
        kv_bandwidth_bytes_per_s=hardware.profile.kv_bandwidth_bytes_per_s * _SPEED,
        flops_per_s=hardware.profile.flops_per_s * _SPEED,
        attention_flops_per_s=hardware.profile.attention_flops_per_s * _SPEED,
        overhead_ns=0,
        layer_overhead_ns=0.0,
        sequence_overhead_ns=0.0,
    )
    hardware = dataclasses.replace(hardware, profile=profile)
    config = EngineConfig(
        num_blocks=4 * _WINDOW // cache.block_size, max_model_len=_WINDOW, block_size=cache.block_size
    )
    tokenizer = family.tokenizer()
    script = Script(lines, tokenizer)
    executor = ScriptedExecutor(
        hardware.cost_model,
        next_token=script.next_token,
        num_blocks=config.num_blocks,
        block_size=config.block_size,
        vocabulary=list(b"never seen"),
    )
    bridge = EventBridge()
    driver = LiveDriver(
        build_core(hardware.header(config)),
        executor,
        MonotonicClock(),
        on_events=bridge.on_events,
        on_failure=bridge.on_failure,
    )
    client = EngineClient(ScriptDriver(driver, script), max_model_len=_WINDOW, max_queued_requests=64)
    bridge.bind(client, asyncio.get_running_loop())
    driver.start()
    try:
        state = ServerState.create(
            ServerOptions(model_name="scripted", executor="simulated", simulated=True, port=0),
            client,
            tokenizer,
            family.chat_template(tokenizer),
            support=AnswerSupport(OutputFormat(TOOL_FORMATS[family.tool_format], THINK, tokenizer)),
            cache=cache,
            engine_failure=lambda: driver.failure,
        )
        async with _listening(state) as port:
            yield Served(f"http://127.0.0.1:{port}", state)
    finally:
        driver.stop()


@asynccontextmanager
async def _listening(state: ServerState) -> AsyncIterator[int]:
    ports: asyncio.Queue[int] = asyncio.Queue()
    stop = asyncio.Event()
    server = asyncio.create_task(
        run_server(state, on_ready=lambda _, port: ports.put_nowait(port), stop=stop, abort=asyncio.Event())
    )
    server.add_done_callback(lambda _: ports.put_nowait(0))  # so that nobody waits for a port that never comes
    try:
        port = await ports.get()
        if port == 0:
            await server
        yield port
    finally:
        stop.set()
        await asyncio.wait([server])
