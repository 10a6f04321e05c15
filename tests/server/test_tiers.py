"""What a daemon says about the KV tiers below its device."""

from __future__ import annotations

import aiohttp

from agentserve.config import TierConfig, TieringConfig
from tests.server.simulated import BLOCK_SIZE, serve

TIERING = TieringConfig(1000, (TierConfig("host", 100, 1e12, 1e12),))


async def test_metrics_and_health_show_each_tier() -> None:
    """40 blocks on the device: the second prompt drives the first one out, which then comes back from the host."""
    async with (
        serve(num_blocks=40, max_model_len=160, tiering=TIERING) as daemon,
        aiohttp.ClientSession() as session,
    ):
        for text in ("x" * 120, "y" * 140, "x" * 120):
            answer = await daemon.openai().completions.create(model="m", prompt=text, max_tokens=2)
            assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
            num_cached = answer.usage.prompt_tokens_details.cached_tokens or 0
        async with session.get(f"{daemon.url}/metrics") as response:
            lines = (await response.text()).splitlines()
        async with session.get(f"{daemon.url}/health") as response:
            (tier,) = (await response.json())["kv_tiers"]
    # Some of what was found may have stayed on the device.
    num_loaded = tier["num_hit_tokens"]
    assert 0 < num_loaded <= num_cached
    assert (tier["tier"], tier["num_blocks"], tier["num_failed_transfers"]) == ("host", 100, 0)
    labels = '{cache_source="%s",model_name="m"}'
    assert f"agentserve:cached_tokens_total{labels % 'host'} {num_loaded}.0" in lines
    assert f"agentserve:cached_tokens_total{labels % 'device'} {num_cached - num_loaded}.0" in lines
    host = '{model_name="m",tier="host"}'
    assert f"agentserve:kv_tier_blocks{host} 100.0" in lines
    assert f"agentserve:kv_tier_used_blocks{host} {tier['num_used_blocks']}.0" in lines
    assert f"agentserve:kv_tier_loaded_bytes_total{host} {num_loaded // BLOCK_SIZE * 1000}.0" in lines
    assert f"agentserve:kv_tier_failed_transfers_total{host} 0.0" in lines
    assert tier["num_loads"] >= 1 and tier["num_stores"] >= 2
    assert f"agentserve:kv_tier_loads_total{host} {tier['num_loads']}.0" in lines
    assert f"agentserve:kv_tier_stores_total{host} {tier['num_stores']}.0" in lines
    assert 'agentserve:kv_tier_blocks{model_name="m",tier="device"} 40.0' in lines


async def test_without_tiers_there_is_the_device_only() -> None:
    async with serve() as daemon, aiohttp.ClientSession() as session:
        async with session.get(f"{daemon.url}/metrics") as response:
            lines = [line for line in (await response.text()).splitlines() if line.startswith("agentserve:kv_tier")]
            device = '{model_name="m",tier="device"}'
            assert lines == [
                f"agentserve:kv_tier_blocks{device} 256.0",
                f"agentserve:kv_tier_used_blocks{device} 0.0",
            ]
        async with session.get(f"{daemon.url}/health") as response:
            assert "kv_tiers" not in await response.json()
