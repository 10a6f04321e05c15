"""`POST /agentserve/distances` and the header `X-Agent-Distance`."""

from __future__ import annotations

from typing import Any

import aiohttp
import pytest

from tests.server.simulated import serve

CONFIG = {"policy": "invocation_distance"}
OPTIONS = {"uses_distances": True}


async def post(url: str, body: Any, path: str = "/agentserve/distances", **headers: str) -> tuple[int, dict[str, Any]]:
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{url}{path}", json=body, headers=headers) as response,
    ):
        return response.status, await response.json()


async def test_distances_reach_the_policy() -> None:
    async with serve(options=OPTIONS, **CONFIG) as daemon:
        chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
        headers = {"X-Agent-Id": "anna", "X-Agent-Distance": "3"}
        assert (await post(daemon.url, chat, "/v1/chat/completions", **headers))[0] == 200
        assert await post(daemon.url, {"agents": {"bert": 2, "carl": 4.5}}) == (200, {"num_agents": 2})
        assert await post(daemon.url, {"agents": {"anna": -1, "dora": -1}, "relative": True}) == (
            200,
            {"num_agents": 2},
        )
        # The engine takes commands in their order: with this answer it has seen all of them.
        assert (await post(daemon.url, chat, "/v1/chat/completions"))[0] == 200
        assert daemon.client.stats().policies is not None


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "agents"),
        ({"agents": {"a": -1}}, "from 0 on"),
        ({"agents": {"a": "near"}}, "agents.a"),
        ({"agents": {"a": True}}, "agents.a"),
        ({"agents": {" ": 1}}, "a name has"),
        ({"agents": {"a" * 257: 1}}, "a name has"),
        ({"agents": {"a": 1e999}}, "not a JSON number"),
        ({"agents": {"a": 1}, "relative": "yes"}, "relative"),
        ({"agents": {"a": 1}, "absolute": True}, "absolute"),
        ({"agents": {f"a{i}": 1 for i in range(16_385)}}, "at most 16384"),
    ],
)
async def test_what_makes_no_sense_is_refused_with_the_reason(body: dict[str, Any], words: str) -> None:
    async with serve(options=OPTIONS, **CONFIG) as daemon:
        status, answer = await post(daemon.url, body)
        assert status == 400 and words in answer["error"]["message"]


async def test_a_policy_without_distances_says_so() -> None:
    async with serve() as daemon:
        status, answer = await post(daemon.url, {"agents": {"a": 1}})
        assert (status, answer["error"]["code"]) == (400, "no_distances")


@pytest.mark.parametrize("value", ["near", "-1", "nan", "inf"])
async def test_a_header_that_is_no_distance_is_refused(value: str) -> None:
    async with serve(options=OPTIONS, **CONFIG) as daemon:
        body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
        status, answer = await post(daemon.url, body, "/v1/chat/completions", **{"X-Agent-Distance": value})
        assert status == 400 and answer["error"]["param"] == "x-agent-distance"
