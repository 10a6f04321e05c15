"""LoRA adapters through the official SDK: each is a model."""

from __future__ import annotations

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


async def test_an_unknown_name_is_no_model() -> None:
    async with serve(options=OPTIONS, lora=LORA) as daemon:
        with pytest.raises(openai.NotFoundError) as caught:
            await daemon.openai().chat.completions.create(model="carol", messages=MESSAGES)
        assert caught.value.code == "model_not_found"
        assert "alice" in caught.value.message


async def test_what_an_adapter_is_called_is_nothing_else() -> None:
    with pytest.raises(ConfigError, match="alice"):
        ServerOptions(model_name="m", executor="cpu", aliases=("alice",), adapters=("alice",))
