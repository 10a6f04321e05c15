"""Where the memory of each session is, and which agents it has."""

from __future__ import annotations

import threading
from typing import Any

import aiohttp
import pytest

from agentserve.config import AdapterConfig, LoraConfig, TierConfig, TieringConfig
from agentserve.errors import EngineError
from agentserve.runtime.live import LiveDriver, MonotonicClock
from tests.core.builders import core, simulated
from tests.server import scripted
from tests.server.daemon import Daemon
from tests.server.simulated import BLOCK_SIZE, serve

TIERING = TieringConfig(1000, (TierConfig("host", 100, 1e12, 1e12),))
LORA = LoraConfig((AdapterConfig("alice", 1000),))


async def ask(daemon: Daemon, prompt: str, session: str, *, model: str = "m", **headers: str) -> None:
    headers = {"X-Session-Id": session, **headers}
    await daemon.openai().completions.create(model=model, prompt=prompt, max_tokens=2, extra_headers=headers)


async def get(daemon: Daemon, path: str) -> Any:
    async with aiohttp.ClientSession() as http, http.get(f"{daemon.url}{path}") as response:
        assert response.status == 200
        return await response.json()


async def test_where_the_kv_of_a_session_is() -> None:
    """40 blocks on the device. Prompts of 120 tokens with BOS and the first of two answers: 30 blocks and a piece."""
    async with serve(num_blocks=40, max_model_len=160, tiering=TIERING) as daemon:
        for name in ("first", "second"):
            await ask(daemon, name[0] * 120, name)
        found = {s["session"]: s["kv"] for s in (await get(daemon, "/agentserve/sessions"))["sessions"]}
        (only,) = (await get(daemon, "/agentserve/sessions?session=first"))["sessions"]
        assert only["kv"] == found["first"]
        assert (await get(daemon, "/agentserve/sessions?session=third"))["sessions"] == []
    for kv in found.values():
        assert (kv["num_blocks"], kv["num_tokens"]) == (30, 30 * BLOCK_SIZE)
        assert (kv["num_held_blocks"], kv["num_pinned_blocks"], kv["pinned_for_s"]) == (0, 0, None)
        assert kv["tiers"]["device"]["num_tokens"] == kv["tiers"]["device"]["num_blocks"] * BLOCK_SIZE
    # What the second one needed of the device has left it, and is on the host like all that was written back.
    assert found["second"]["tiers"]["device"]["num_blocks"] == 30
    assert found["first"]["tiers"]["device"]["num_blocks"] < 30
    assert found["first"]["tiers"]["host"]["num_blocks"] == 30


async def test_the_kv_of_an_adapter_is_its_own() -> None:
    """What two conversations of a session begin with counts once; the same tokens with an adapter are others."""
    async with serve(options={"adapters": ("alice",)}, lora=LORA) as daemon:
        for prompt, model in (("a" * 63 + "b" * 16, "m"), ("a" * 63 + "c" * 16, "m"), ("a" * 63, "alice")):
            await ask(daemon, prompt, "s", model=model)
        (session,) = (await get(daemon, "/agentserve/sessions"))["sessions"]
    # BOS and 63 tokens are 16 blocks, 4 each are behind them, and the 16 of alice.
    assert (session["kv"]["num_blocks"], session["kv"]["tiers"]) == (
        40,
        {"device": {"num_blocks": 40, "num_tokens": 160}},
    )


async def test_what_is_pinned_is_shown() -> None:
    async with serve(policy="ttl") as daemon:
        for turn in range(2):
            await ask(daemon, "a" * (63 + 40 * turn), "s")
        (session,) = (await get(daemon, "/agentserve/sessions"))["sessions"]
    kv, pins = session["kv"], daemon.client.stats().policies
    assert pins is not None
    assert kv["num_pinned_blocks"] == (kv["num_blocks"] if pins.counts["pins_set"] else 0)
    lines = daemon.state.metrics.render().decode().splitlines()
    for action, count in pins.counts.items():
        assert f'agentserve:policy_actions_total{{action="{action}",model_name="m"}} {count}.0' in lines


async def test_while_the_engine_is_down_nobody_knows_where_the_kv_is() -> None:
    async with scripted.serve() as daemon:
        await ask(daemon, "hello", "s", model="test-model")
        (session,) = (await get(daemon, "/agentserve/sessions"))["sessions"]
    assert session["kv"] is None and session["num_requests"] == 1


def test_questions_to_the_engine_thread() -> None:
    driver = LiveDriver(
        core(), simulated(), MonotonicClock(), on_events=lambda _: None, on_failure=pytest.fail, flush_timeout_s=9.0
    )
    early = driver.ask(lambda core, now_ns: (core.stats().num_blocks, now_ns > 0))
    driver.start()
    assert early.result(30) == (64, True)
    with pytest.raises(ZeroDivisionError):  # the engine goes on
        driver.ask(lambda core, now_ns: now_ns // core.stats().num_running).result(30)
    assert driver.ask(lambda core, now_ns: threading.current_thread().name).result(30) == "agentserve-engine"
    driver.stop()
    with pytest.raises(EngineError, match="shutting down"):
        driver.ask(lambda core, now_ns: None)
    never = LiveDriver(core(), simulated(), MonotonicClock(), on_events=lambda _: None, on_failure=pytest.fail)
    question = never.ask(lambda core, now_ns: None)
    never.stop()
    with pytest.raises(EngineError, match="shutting down"):
        question.result(30)


async def test_a_session_may_have_several_agents_whatever_the_policy() -> None:
    """Agents without a name are told apart by how their prompts begin, which takes 128 tokens."""
    async with serve() as daemon:
        for prompt, headers in (
            ("main " * 40, {}),
            ("sub " * 40, {}),
            ("main " * 40 + "more", {}),
            ("short", {}),
            ("review " * 30, {"X-Agent-Id": "reviewer"}),
        ):
            await ask(daemon, prompt, "s", **headers)
        (session,) = (await get(daemon, "/agentserve/sessions"))["sessions"]
        agents = (await get(daemon, "/agentserve/agents"))["agents"]
    main, sub, reviewer = session["agents"]
    assert (main, reviewer) == ("s", "reviewer") and sub.startswith("s#")
    assert [(a["agent"], a["num_requests"], a["num_sessions"]) for a in agents] == [
        (reviewer, 1, 1),
        (main, 3, 1),
        (sub, 1, 1),
    ]
