"""Models, health, metrics, the log line, and who may come in."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from typing import Any

import aiohttp
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

import agentserve
from agentserve.core.controllers import Decision
from agentserve.core.slots import PartitionKind, SlotPartition
from agentserve.core.stats import EngineStats
from agentserve.errors import ConfigError
from agentserve.server.app import ServerOptions
from tests.server.scripted import MAX_MODEL_LEN, Run, replying, serve

HELLO: list[Any] = [{"role": "user", "content": "hi"}]


async def test_health_ready_root() -> None:
    async with (
        serve(simulated=True, device="a box", notes=("no GPU", "no weights"), api_key="k") as daemon,
        aiohttp.ClientSession() as session,
    ):
        async with session.get(f"{daemon.url}/health") as response:
            assert response.status == 200
            assert await response.json() == {
                "status": "ok",
                "model": "test-model",
                "executor": "scripted",
                "device": "a box",
                "dtype": None,
                "simulated": True,
                "note": "no GPU; no weights",
                "version": agentserve.__version__,
            }
        for method, path, status in (("GET", "/", 200), ("HEAD", "/", 200), ("GET", "/ready", 200)):
            async with session.request(method, daemon.url + path, headers={"x-api-key": "k"}) as response:
                assert response.status == status
                assert response.headers["x-agentserve-executor"] == "scripted"
                assert response.headers["Server"] == f"agentserve/{agentserve.__version__}"


async def test_health_answers_while_the_engine_is_busy() -> None:
    never = asyncio.Event()

    async def script(run: Run) -> None:
        await never.wait()

    async with serve(script) as daemon, aiohttp.ClientSession() as session:
        body = {"messages": HELLO, "stream": True}
        async with session.post(f"{daemon.url}/v1/chat/completions", json=body) as response:
            assert response.status == 200
            async with session.get(f"{daemon.url}/health") as health:
                assert health.status == 200


async def test_models_list_serves_all_dialects() -> None:
    async with (
        serve(aliases=("alias",), train_context=4096, num_parameters=7, model_bytes=14, created=5) as daemon,
        aiohttp.ClientSession() as session,
    ):
        async with session.get(f"{daemon.url}/v1/models?limit=1000") as response:
            listing = await response.json()
        assert [model["id"] for model in listing["data"]] == ["test-model", "alias"]
        assert (listing["has_more"], listing["first_id"], listing["last_id"]) == (False, "test-model", "alias")
        assert listing["models"][0]["slug"] == "test-model"
        assert listing["models"][0]["context_window"] == MAX_MODEL_LEN
        async with session.get(f"{daemon.url}/v1/models/test-model") as response:
            assert await response.json() == {
                "id": "test-model",
                "object": "model",
                "type": "model",
                "created": 5,
                "created_at": "1970-01-01T00:00:05+00:00",
                "owned_by": "agentserve",
                "display_name": "test-model",
                "max_model_len": MAX_MODEL_LEN,
                "context_length": MAX_MODEL_LEN,
                "context_window": MAX_MODEL_LEN,
                "meta": {"n_ctx": MAX_MODEL_LEN, "n_ctx_train": 4096, "n_params": 7, "size": 14},
            }


async def test_keys() -> None:
    async with serve(api_key="secret") as daemon, aiohttp.ClientSession() as session:
        for path in ("/", "/ready", "/metrics", "/v1/models", "/nothing"):
            for headers in ({}, {"x-api-key": "wrong"}, {"Authorization": "Basic secret"}):
                async with session.get(daemon.url + path, headers=headers) as response:
                    assert response.status == 401
                    assert (await response.json())["error"]["code"] == "invalid_api_key"
        for headers in ({"x-api-key": "secret"}, {"Authorization": "bearer secret"}):
            async with session.get(f"{daemon.url}/v1/models", headers=headers) as response:
                assert response.status == 200
        with pytest.raises(openai.AuthenticationError):
            await daemon.openai(api_key="wrong").chat.completions.create(model="test-model", messages=HELLO)
        answer = await daemon.openai(api_key="secret").chat.completions.create(model="test-model", messages=HELLO)
        assert answer.choices[0].message.content == "Hello"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("127.0.0.1:8177", 200),
        ("[::1]:8177", 200),
        ("LOCALHOST.:1", 200),
        ("agent.localhost", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example:80", 403),
        ("localhost@evil.example", 403),
        ("[", 403),
    ],
)
async def test_host_header(host: str, status: int) -> None:
    async with (
        serve() as daemon,
        aiohttp.ClientSession() as session,
        session.get(f"{daemon.url}/health", headers={"Host": host}) as response,
    ):
        assert response.status == status


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("http://localhost:3000", True),
        ("https://127.0.0.1", True),
        ("http://[::1]:5173", True),
        ("vscode-webview://0a1b2c", True),
        ("https://evil.example", False),
        ("http://localhost.evil.example", False),
        ("null", False),
    ],
)
async def test_cors(origin: str, allowed: bool) -> None:
    async with serve(api_key="k") as daemon, aiohttp.ClientSession() as session:
        url = f"{daemon.url}/v1/chat/completions"
        async with session.options(url, headers={"Origin": origin}) as response:
            assert response.status == (204 if allowed else 403)
            assert response.headers.get("Access-Control-Allow-Origin") == (origin if allowed else None)
            assert ("x-stainless-os" in response.headers.get("Access-Control-Allow-Headers", "")) is allowed
        body = {"messages": HELLO, "stream": True}
        headers = {"Origin": origin, "Authorization": "Bearer k"}
        async with session.post(url, json=body, headers=headers) as response:
            assert response.status == (200 if allowed else 403)
            assert response.headers.get("Access-Control-Allow-Origin") == (origin if allowed else None)
        assert len(daemon.driver.submitted) == int(allowed)


async def test_request_id_is_echoed_or_made() -> None:
    async with serve() as daemon, aiohttp.ClientSession() as session:
        for path in ("/health", "/nothing"):
            async with session.get(daemon.url + path, headers={"X-Request-Id": "abc-1"}) as response:
                assert response.headers["X-Request-Id"] == "abc-1"
            async with session.get(daemon.url + path, headers={"X-Request-Id": "a b"}) as response:
                assert response.headers["X-Request-Id"].startswith("req_")


async def test_metrics() -> None:
    async with serve(replying("Hello", num_cached_tokens=3)) as daemon, aiohttp.ClientSession() as session:
        daemon.driver.engine_stats = EngineStats(
            num_running=2,
            num_waiting=1,
            num_blocks=10,
            num_free_blocks=3,
            num_cached_blocks=2,
            num_prefix_query_tokens=50,
            num_prefix_hit_tokens=40,
            num_generated_tokens=99,
            num_preemptions=4,
            num_batches_decode=7,
            decision=Decision(SlotPartition(3, 5, PartitionKind.SPLIT), resume_budget=48, prefill_chunk=256),
        )
        client = daemon.openai()
        await client.chat.completions.create(model="test-model", messages=HELLO)
        await client.chat.completions.create(model="test-model", messages=HELLO, max_tokens=2)
        async with session.get(f"{daemon.url}/metrics") as response:
            assert response.headers["Content-Type"].startswith("text/plain")
            text = await response.text()
    values = {
        (sample.name.removeprefix("agentserve:"), sample.labels.get("finished_reason")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if "le" not in sample.labels
    }
    assert all(
        sample.labels["model_name"] == "test-model"
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    )
    expected = {
        "num_requests_running": 2,
        "num_requests_waiting": 1,
        "kv_cache_usage_perc": 0.5,  # (10 - 3 - 2) / 10
        "prefix_cache_queries_total": 50,
        "prefix_cache_hits_total": 40,
        "cached_tokens_total": 40,
        "generation_tokens_total": 99,
        "num_preemptions_total": 4,
        "num_batches_decode_total": 7,
        "resume_budget": 48,
        "prefill_chunk": 256,
        "prompt_tokens_total": 2 * 19,
        "num_aborted_requests_total": 0,
        "time_to_first_token_seconds_count": 2,
        "e2e_request_latency_seconds_count": 2,
        "request_queue_time_seconds_sum": 2 * 0.001,
        "request_prefill_time_seconds_sum": 2 * 0.002,
        "request_decode_time_seconds_sum": 2 * 0.001,
        "request_prompt_tokens_sum": 2 * 19,
        "request_generation_tokens_sum": 6 + 2,
    }
    assert {name: values[name, None] for name in expected} == pytest.approx(expected)
    units = {
        (sample.labels["lane"], sample.labels["kind"]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "agentserve:partition_units"
    }
    assert units == {("decode", "split"): 3, ("prefill", "split"): 5}
    assert values["request_success_total", "stop"] == 1
    assert values["request_success_total", "length"] == 1


async def test_log_line_holds_numbers_and_no_prompt(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="agentserve.request")
    async with serve(replying("Hello", num_cached_tokens=3)) as daemon:
        await daemon.openai().chat.completions.create(
            model="test-model",
            messages=[{"role": "user", "content": "secret"}],
            extra_headers={"X-Request-Id": "abc", "X-Session-Id": "s1"},
        )
        await daemon.state.idle.wait()
    (line,) = [record.getMessage() for record in caplog.records if record.name == "agentserve.request"]
    # "<user>secret<assistant>" has 23 tokens
    assert line.startswith(
        "id=abc session=s1 class=cold_prefill prompt=23 cached=3 new=20 hit=13% miss=new_session queue_ms=1.0 ttft_ms="
    )
    assert line.endswith("output=6 finish=stop")
    assert "secret" not in line


@pytest.mark.parametrize(
    "options",
    [
        {"host": "0.0.0.0"},
        {"host": "::"},
        {"host": "example.org"},
        {"host": ""},
        {"api_key": ""},
        {"max_body_bytes": 0},
        {"sse_ping_interval_s": 0.0},
        {"sse_ping_interval_s": float("nan")},
        {"drain_timeout_s": -1.0},
    ],
)
def test_options_that_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ServerOptions(model_name="m", executor="cpu", **options)


def test_other_addresses_need_a_key_or_a_word() -> None:
    base = ServerOptions(model_name="m", executor="cpu")
    assert dataclasses.replace(base, host="0.0.0.0", api_key="k").host == "0.0.0.0"
    assert dataclasses.replace(base, host="0.0.0.0", insecure=True).api_key is None


async def test_an_address_in_use_is_one_sentence() -> None:
    async with serve() as daemon:
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1 port {daemon.port}"):
            async with serve(port=daemon.port):
                pass
