"""`/agentserve/tools/memo`: what is found, by whom, for how long, and that it stays bounded."""

from __future__ import annotations

import json
from typing import Any

import aiohttp
import pytest

from agentserve.errors import InvalidRequestError
from agentserve.server import tool_memo
from agentserve.server.tool_memo import MemoBody, ToolMemo, canonical
from tests.server.simulated import serve

PATH = "/agentserve/tools/memo"
BODY = {"tool": "ls", "arguments": {"path": "a", "all": True}, "result": ["x", {"y": 1}], "ttl_s": 60.0}


class Clock:
    now_s = 5.0

    def __call__(self) -> float:
        return self.now_s


def body(**values: Any) -> MemoBody:
    return MemoBody.model_validate({**BODY, **values})


def test_arguments_are_canonical() -> None:
    assert canonical({"b": {"d": 1, "c": [2]}, "a": "ä"}) == '{"a":"ä","b":{"c":[2],"d":1}}'
    assert canonical({"a": 1}) != canonical({"a": 1.0}) != canonical({"a": "1"})


def test_a_result_is_its_agents_own_unless_it_is_shared() -> None:
    memo = ToolMemo(clock=Clock())
    memo.put("anna", body())
    assert memo.get("bert", "ls", BODY["arguments"]) is None  # type: ignore[arg-type]
    memo.put("anna", body(result="for all", shared=True))
    found = [memo.get(agent, "ls", {"all": True, "path": "a"}) for agent in ("anna", "bert")]
    assert [entry and entry.result for entry in found] == [BODY["result"], "for all"]
    assert memo.get("anna", "cat", {"all": True, "path": "a"}) is None
    assert (memo.num_hits, memo.num_misses, len(memo)) == (2, 2, 2)


def test_it_is_true_until_its_time_is_over() -> None:
    clock = Clock()
    memo = ToolMemo(clock=clock)
    memo.put("anna", body())
    clock.now_s = 64.9
    assert memo.get("anna", "ls", body().arguments) is not None
    clock.now_s = 65.0
    assert memo.get("anna", "ls", body().arguments) is None
    assert (len(memo), memo.num_bytes, memo.num_expirations) == (0, 0, 1)


def test_it_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    # A key and result of 2 + 2 + (2 + length) bytes: "ls", "{}" and a text.
    memo = ToolMemo(max_bytes=30, clock=Clock())
    for tool in ("l1", "l2", "l3"):
        memo.put("anna", body(tool=tool, arguments={}, result="abcd"))
    assert (memo.num_bytes, len(memo)) == (30, 3)
    assert memo.get("anna", "l1", {}) is not None
    memo.put("anna", body(tool="l4", arguments={}, result="abcd"))
    assert [memo.get("anna", tool, {}) is not None for tool in ("l1", "l2", "l3", "l4")] == [True, False, True, True]
    with pytest.raises(InvalidRequestError, match="37 bytes do not fit; 30 do"):
        memo.put("anna", body(arguments={}, result="x" * 31))
    monkeypatch.setattr(tool_memo, "MAX_ENTRIES", 2)
    memo.put("anna", body(tool="l5", arguments={}, result=""))
    assert len(memo) == 2
    # l2 for l4 to have room, l3 for l5, and one more because there may be two only.
    assert (memo.num_stores, memo.num_evictions) == (5, 3)


async def test_over_http() -> None:
    async with serve() as daemon, aiohttp.ClientSession(daemon.url) as client:

        async def send(method: str, **values: Any) -> tuple[int, Any]:
            async with client.request(method, PATH, **values) as response:
                return response.status, await response.json()

        mine = {"X-Agent-Id": "anna"}
        query = {"tool": "ls", "arguments": json.dumps({"all": True, "path": "a"})}
        assert (await send("GET", params=query, headers=mine))[0] == 404
        status, answer = await send("PUT", json=BODY, headers=mine)
        assert status == 200 and answer["num_entries"] == 1
        status, answer = await send("GET", params=query, headers=mine)
        assert status == 200 and answer["result"] == BODY["result"] and 0 < answer["expires_in_s"] <= 60
        assert (await send("GET", params=query, headers={"X-Agent-Id": "bert"}))[0] == 404
        for values in (
            {"json": BODY},
            {"json": {**BODY, "ttl_s": 0.0}, "headers": mine},
            {"json": {**BODY, "extra": 1}, "headers": mine},
        ):
            assert (await send("PUT", **values))[0] == 400
        assert (await send("GET", params={"tool": "ls", "arguments": "[1]"}, headers=mine))[0] == 400
        async with client.get("/metrics") as response:
            lines = (await response.text()).splitlines()
        num_bytes = daemon.state.tool_memo.num_bytes
        counts = {"entries": 1, "bytes": num_bytes, "stores_total": 1, "hits_total": 1, "misses_total": 2}
        for name, count in {**counts, "expirations_total": 0, "evictions_total": 0}.items():
            assert f'agentserve:tool_memo_{name}{{model_name="m"}} {count}.0' in lines
