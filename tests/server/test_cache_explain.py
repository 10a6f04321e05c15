"""Why a prefix missed: causes, cache breakers, `--stabilize`, and the endpoints that show them."""

from __future__ import annotations

import logging
from typing import Any

import aiohttp
import pytest

from agentserve.config import resolve
from agentserve.errors import ConfigError
from agentserve.runtime.script import ScriptLine
from agentserve.server.breakers import find_difference
from agentserve.server.caching import CacheOptions
from agentserve.server.prefix import common_length
from agentserve.server.stabilize import Stabilizer
from bench.client_styles.daemon import Served, serve
from bench.client_styles.templates import FAMILIES

SYSTEM = "You are an agent. It is {time}.\n" + "Be careful with every file. " * 8
LINES = (ScriptLine("<think>\nhm\n</think>\n\nYes."),)


class Client:
    """Talks to a daemon as one session, and asks why its requests missed."""

    def __init__(self, served: Served, http: aiohttp.ClientSession) -> None:
        self._url = served.url
        self._http = http
        self._num_requests = 0

    async def ask(
        self, messages: list[Any], *, session: str = "s", **fields: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The answer and its explanation."""
        self._num_requests += 1
        request_id = f"r{self._num_requests}"
        headers = {"X-Session-Id": session, "X-Request-Id": request_id, "X-Agent-Id": "coder"}
        body = {"model": "scripted", "messages": messages} | fields
        async with self._http.post(f"{self._url}/v1/chat/completions", json=body, headers=headers) as reply:
            assert reply.status == 200
            answer = await reply.json()
        return answer, await self.get(f"/agentserve/cache/explain?request={request_id}")

    async def get(self, path: str, status: int = 200) -> dict[str, Any]:
        async with self._http.get(self._url + path) as reply:
            assert reply.status == status
            found: dict[str, Any] = await reply.json()
            return found


def conversation(*texts: str, time: str = "12:00") -> list[dict[str, str]]:
    """A system prompt, then user and assistant in turn."""
    roles = ["user", "assistant"] * len(texts)
    return [
        {"role": "system", "content": SYSTEM.format(time=time)},
        *({"role": role, "content": text} for role, text in zip(roles, texts, strict=False)),
    ]


async def test_each_cause_has_its_name() -> None:
    async with serve(FAMILIES["chatml"], LINES, CacheOptions()) as served, aiohttp.ClientSession() as http:
        client = Client(served, http)
        _, first = await client.ask(conversation("Hello"))
        assert (first["reason"], first["num_cached_tokens"], first["divergence"]) == ("new_session", 0, None)
        _, second = await client.ask(conversation("Hello", "Yes.", "More"))
        assert (second["reason"], second["num_reused_turns"], second["compared_with"]) == ("none", 1, "r1")
        assert second["num_cached_tokens"] == second["num_reusable_tokens"] > 200

        _, edited = await client.ask(conversation("Hello", "No.", "More"))
        assert edited["reason"] == "history"
        place = edited["divergence"]
        assert (place["message"], place["role"]) == (2, "assistant")
        assert place["before"].endswith("<|im_start|>assistant\n")
        assert place["here"].startswith("No.") and place["there"].startswith("<think>")

        _, salted = await client.ask(conversation("Hello", "No.", "More"), cache_salt="x")
        assert (salted["reason"], salted["num_cached_tokens"]) == ("salt", 0)
        _, other = await client.ask(conversation("Something else"))
        assert other["reason"] == "new_conversation"
        tool = {"type": "function", "function": {"name": "f"}}
        _, tools = await client.ask(conversation("Something else"), tools=[tool])
        assert tools["reason"] == "tools"
        _, back = await client.ask(conversation("Something else"), tools=[tool])
        assert back["reason"] == "none"


async def test_without_the_history_the_answer_is_to_blame() -> None:
    cache = CacheOptions(token_history_bytes=0, block_size=4)
    async with serve(FAMILIES["chatml"], LINES, cache) as served, aiohttp.ClientSession() as http:
        client = Client(served, http)
        await client.ask(conversation("Hello"))
        _, second = await client.ask(conversation("Hello", "Yes.", "More"))
        assert (second["reason"], second["num_reused_turns"]) == ("answer", 0)
        assert second["divergence"]["there"].startswith("<think>")
        (session,) = (await client.get("/agentserve/sessions"))["sessions"]
        assert session["token_history"]["enabled"] is False


async def test_a_clock_in_the_system_prompt_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "agentserve.cache")
    async with serve(FAMILIES["chatml"], LINES, CacheOptions()) as served, aiohttp.ClientSession() as http:
        client = Client(served, http)
        for minute in range(5):
            _, found = await client.ask(conversation("Hello", time=f"12:0{minute}"))
        assert found["reason"] == "system"
        (breaker,) = found["breakers"]
        assert (breaker["part"], breaker["kind"], breaker["num_changes"]) == ("system", "timestamp", 4)
        assert (breaker["old"], breaker["new"], breaker["before"][-6:]) == ("12:03", "12:04", "It is ")
        (change,) = found["divergence"]["changes"]
        assert change["at_character"] == SYSTEM.index("{time}") + len("12:0")
        metrics = served.state.metrics.render().decode()
        assert 'agentserve:cache_breakers_total{kind="timestamp",model_name="scripted"} 1.0' in metrics
        assert 'agentserve:prefix_miss_total{model_name="scripted",reason="system"} 4.0' in metrics
    (record,) = caplog.records
    assert "changes from request to request" in record.getMessage()
    assert "--stabilize" in record.getMessage()


async def test_stabilize_keeps_the_first_value_of_a_session() -> None:
    cache = CacheOptions(stabilize=(r"\d\d:\d\d",))
    async with serve(FAMILIES["chatml"], LINES, cache) as served, aiohttp.ClientSession() as http:
        client = Client(served, http)
        await client.ask(conversation("Hello"))
        _, found = await client.ask(conversation("Hello", time="12:34"))
        assert found["reason"] == "none"
        assert found["num_cached_tokens"] == found["num_reusable_tokens"]
        _, other = await client.ask(conversation("Hello", time="12:34"), session="other")
        # Another session has its own time: what they share ends there.
        assert other["num_cached_tokens"] < found["num_cached_tokens"]


async def test_sessions_and_agents() -> None:
    async with serve(FAMILIES["chatml"], LINES, CacheOptions()) as served, aiohttp.ClientSession() as http:
        client = Client(served, http)
        await client.ask(conversation("Hello"))
        await client.ask(conversation("Hello", "Yes.", "More"))
        await client.ask(conversation("Hello"), session="t")
        last, first = (await client.get("/agentserve/sessions"))["sessions"]
        assert (last["session"], last["last_reason"], first["session"]) == ("t", "new_session", "s")
        assert (first["num_requests"], first["num_active"], first["last_request"]) == (2, 0, "r2")
        assert first["token_history"]["num_turns"] == 2 and first["token_history"]["num_reused_turns"] == 1
        assert 0.3 < first["hit_ratio"] < 0.6
        (agent,) = (await client.get("/agentserve/agents"))["agents"]
        assert (agent["agent"], agent["num_sessions"], agent["num_requests"]) == ("coder", 2, 3)
        await client.get("/agentserve/cache/explain?request=nobody", 404)
        await client.get("/agentserve/cache/explain", 400)
        metrics = served.state.metrics.render().decode()
        assert 'agentserve:token_history_reused_turns_total{model_name="scripted"} 1.0' in metrics


# ---- differences ----


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [
        ("at 2026-11-21T10:00:00Z ok", "at 2026-11-21T10:00:07Z ok", "timestamp"),
        ("at 9:59 AM ok", "at 10:00 AM ok", "timestamp"),
        ("now 1763719200", "now 1763719260", "timestamp"),
        ("on 2026-11-21.", "on 2026-11-22.", "date"),
        ("on 21 Nov 2026.", "on 22 Nov 2026.", "date"),
        ("id 123e4567-e89b-12d3-a456-426614174000", "id 123e4567-e89b-12d3-a456-426614174999", "uuid"),
        ("x; cch=a1b2c;", "x; cch=a1b9c;", "billing"),
        ("cwd /home/a/one now", "cwd /home/a/two now", "path"),
        ("commit 3fa9c1d2 now", "commit 3fb8c1d2 now", "hash"),
        ("memory 43% used", "memory 57% used", "counter"),
        ("run 9 of", "run 10 of", "counter"),
        ("you may read", "you must read", "text"),
    ],
)
def test_kinds_of_differences(old: str, new: str, kind: str) -> None:
    found = find_difference(old, new)
    assert found is not None
    assert found.kind == kind
    assert found.at == common_length(old, new)
    assert find_difference(old, old) is None


# ---- --stabilize ----


@pytest.mark.parametrize("pattern", ["(", "a*", "", "(?P<x"])
def test_bad_patterns_are_refused_at_the_start(pattern: str) -> None:
    with pytest.raises(ConfigError, match="--stabilize"):
        Stabilizer([pattern])


def test_patterns_may_have_commas_and_be_repeated() -> None:
    given = {"stabilize": r"\d{1,2}:\d\d" + "\n" + "cch=[a-f]+"}
    assert resolve(given, {}, {}).config.stabilize == (r"\d{1,2}:\d\d", "cch=[a-f]+")
    assert resolve({}, {}, {"cache": {"stabilize": ["a,b", "c"]}}).config.stabilize == ("a,b", "c")


def test_values_belong_to_one_text_of_one_session() -> None:
    stabilizer = Stabilizer([r"\d+", "[A-Z]+"])
    assert stabilizer.apply("s", "run 1 of A, 2") == "run 1 of A, 2"
    assert stabilizer.apply("s", "run 7 of B, 8") == "run 1 of A, 2"
    assert stabilizer.apply("t", "run 7 of B, 8") == "run 7 of B, 8"
    assert stabilizer.apply("s", "walk 7 of B, 8") == "walk 7 of B, 8"  # an edit, or the prompt of another agent
    assert stabilizer.apply("s", "nothing here") == "nothing here"
    assert stabilizer.num_replaced == 3


def test_a_pattern_that_takes_too_long_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    stabilizer = Stabilizer([r"(a|a|aa)+$", r"\d"])
    text = "a" * 200 + "! 1"
    assert stabilizer.apply("s", text) == text
    assert "given up" in caplog.text
    assert stabilizer.apply("s", "a" * 200 + "! 2") == text  # the other one still works
