"""An engine that is stopped leaves no thread behind."""

from __future__ import annotations

import asyncio
import threading

import pytest

from agentserve.build import Engine, build_engine, build_executor
from agentserve.config import ServeConfig
from agentserve.core.request import SamplingParams
from agentserve.errors import ConfigError
from agentserve.runtime.streams import StreamEnd
from agentserve.text.grammar.source import Constraint
from agentserve.text.tools.spec import ChoiceFormat

CONFIG = ServeConfig(model="qwen3-0.6b", executor="simulated", kv_cache_memory=1 << 28)


def ignore(line: str) -> None:
    del line


async def answer(engine: Engine, *, leave: bool) -> str:
    """One constrained answer; or a request that still runs when the engine is stopped."""
    engine.bridge.bind(engine.client, asyncio.get_running_loop())
    engine.driver.start()
    grammar = await engine.grammars.compile(Constraint(format=ChoiceFormat(("yes", "no"))), "")
    sampling = SamplingParams(max_tokens=20, stop_token_ids=engine.tokenizer.eos_token_ids)
    stream = engine.client.generate(engine.tokenizer.encode("hi"), sampling, grammar=grammar)
    if leave:
        return ""
    tokens: list[int] = []
    async for event in stream:
        if isinstance(event, StreamEnd):
            assert event.error is None
            break
        tokens += [sample.token_id for sample in getattr(event, "samples", ())]
    return engine.tokenizer.decode(tokens)


@pytest.mark.parametrize("leave", [False, True])
def test_no_thread_outlives_the_engine(leave: bool) -> None:
    before = set(threading.enumerate())
    engine = build_engine(CONFIG, ignore)
    try:
        text = asyncio.run(answer(engine, leave=leave))
        started = {thread.name.rstrip("_0123456789") for thread in set(threading.enumerate()) - before}
        assert {"agentserve-engine", "agentserve-grammar", "agentserve-mask"} <= started
    finally:
        engine.stop()
    assert leave or text in ("yes", "no")
    assert set(threading.enumerate()) <= before


def test_an_engine_that_was_never_started_stops() -> None:
    before = set(threading.enumerate())
    build_engine(CONFIG, ignore).stop()
    build_executor(CONFIG, ignore).executor.close()
    with pytest.raises(ConfigError):
        build_engine(ServeConfig(model="qwen3-0.6b", executor="simulated", max_model_len=10**9), ignore)
    assert set(threading.enumerate()) <= before
