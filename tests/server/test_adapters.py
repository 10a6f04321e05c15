"""LoRA adapters through the official SDK: each is a model."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from agentserve.config import AdapterConfig, LoraConfig
from agentserve.errors import ConfigError
from agentserve.server.state import ServerOptions
from tests.server.simulated import serve

LORA = LoraConfig((AdapterConfig("alice", 1000, 2), AdapterConfig("bob", 1000, 2)), 1, latency_ns=1000)
OPTIONS = {"adapters": ("alice", "bob")}
MESSAGES: list[Any] = [{"role": "user", "content": "hello, this is a prompt of some length"}]


async def test_an_adapter_is_a_model_with_a_cache_of_its_own() -> None:
    async with serve(options=OPTIONS, lora=LORA) as daemon:
        client = daemon.openai()
        assert [model.id async for model in client.models.list()] == ["m", "alice", "bob"]
        cached = []
        for name in ("m", "alice", "bob", "alice", "claude-bob", "m"):
            answer = await client.chat.completions.create(model=name, messages=MESSAGES, max_tokens=5)
            assert answer.model == name
            assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
            cached.append((answer.usage.prompt_tokens_details.cached_tokens or 0) > 0)
        assert cached == [False, False, False, True, True, True]
        stats = daemon.client.stats().adapters
        assert stats is not None
        # One slot: alice, bob, alice again, bob again; three of them take the place of another one.
        assert (stats.num_loads, stats.num_evictions, stats.num_resident) == (4, 3, 1)
        lines = daemon.state.metrics.render().decode().splitlines()
        for name, value in {
            "adapters": "2.0",
            "slots": "1.0",
            "resident_adapters": "1.0",
            "loads_total": "4.0",
            "evictions_total": "3.0",
            "loaded_bytes_total": "4000.0",
            "load_seconds_total": str(stats.load_ns / 1e9),
            "failed_loads_total": "0.0",
        }.items():
            assert f'agentserve:lora_{name}{{model_name="m"}} {value}' in lines
        assert stats.load_ns >= 4 * LORA.latency_ns


async def test_who_waits_for_which_adapter_is_shown() -> None:
    """One slot, and bob's adapter cannot come while alice's is in use."""
    async with serve(options=OPTIONS, lora=LORA, speed=1.0) as daemon, asyncio.TaskGroup() as tasks:
        client = daemon.openai()
        stream = await client.completions.create(model="alice", prompt="p", max_tokens=400, stream=True)
        await anext(aiter(stream))
        waiting = tasks.create_task(client.completions.create(model="bob", prompt="p", max_tokens=1))
        while daemon.client.num_waiting == 0:
            await asyncio.sleep(0)
        lines = daemon.state.metrics.render().decode().splitlines()
        await stream.close()
        await waiting
    assert 'agentserve:lora_requests_running{adapter="alice",model_name="m"} 1.0' in lines
    assert 'agentserve:lora_requests_waiting{adapter="bob",model_name="m"} 1.0' in lines
    (info,) = [line for line in lines if line.startswith("agentserve:lora_requests_info{")]
    labels = 'max_lora="1",model_name="m",running_lora_adapters="alice",waiting_lora_adapters="bob"'
    assert labels in info and float(info.rpartition(" ")[2]) > 1e9


async def test_without_adapters_nothing_is_said_of_them() -> None:
    async with serve() as daemon:
        assert "lora" not in daemon.state.metrics.render().decode()


async def test_an_unknown_name_is_no_model() -> None:
    async with serve(options=OPTIONS, lora=LORA) as daemon:
        with pytest.raises(openai.NotFoundError) as caught:
            await daemon.openai().chat.completions.create(model="carol", messages=MESSAGES)
        assert caught.value.code == "model_not_found"
        assert "alice" in caught.value.message


async def test_what_an_adapter_is_called_is_nothing_else() -> None:
    with pytest.raises(ConfigError, match="alice"):
        ServerOptions(model_name="m", executor="cpu", aliases=("alice",), adapters=("alice",))
