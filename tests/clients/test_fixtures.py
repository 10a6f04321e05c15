"""Requests of real clients, recorded by `python -m bench.clients run --record`, sent again to the daemon.

Each answer is read by the rules of its client, streamed and whole: both must say the same, and what the scripted model
wrote must arrive as text and tool calls without a trace of markup.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from agentserve.text.tools.hermes import CLOSE, OPEN
from bench.clients.catalog import CLIENTS
from bench.clients.fixtures import Fixture, FixtureRequest, Scrubber, cut, dump, load
from tests.clients.harness import serve
from tests.clients.rules import Understood, read

FOLDER = Path(__file__).parent.parent / "fixtures" / "clients"
FILES = sorted(FOLDER.glob("*.jsonl"))
_GENERATING = ("/v1/chat/completions", "/v1/responses", "/v1/messages")
_ENDS_WITH_CALL = {"chat": "tool_calls", "responses": "completed", "anthropic": "tool_use"}
_ENDS = {"chat": "stop", "responses": "completed", "anthropic": "end_turn"}


def test_every_client_has_a_fixture() -> None:
    assert {file.stem for file in FILES} >= set(CLIENTS)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
async def test_replay(file: Path, tmp_path: Path) -> None:
    fixture = load(file)
    expected_texts, expected_calls = _script_answers(fixture)
    num_calls = 0
    async with serve(tmp_path, fixture.script) as daemon, aiohttp.ClientSession() as session:
        for request in fixture.requests:
            body = request.body
            if body is None or request.path.partition("?")[0] not in _GENERATING:
                status, data = await _send(session, daemon.url, request, body)
                assert status == request.status, data
                continue
            answers: list[Understood] = []
            for stream in (True, False):
                sent = {**body, "stream": stream}
                if not stream:
                    sent.pop("stream_options", None)  # has no place there, and the API refuses it
                status, data = await _send(session, daemon.url, request, sent)
                assert status == 200, data
                answers.append(read(fixture.dialect, stream, data))
            streamed, whole = answers
            assert (streamed.text, streamed.calls, streamed.finish) == (whole.text, whole.calls, whole.finish)
            assert streamed.text in expected_texts
            assert all(call in expected_calls for call in streamed.calls)
            assert streamed.finish == (_ENDS_WITH_CALL if streamed.calls else _ENDS)[fixture.dialect]
            if fixture.dialect != "chat" or (body.get("stream_options") or {}).get("include_usage"):
                assert streamed.usage is not None
            num_calls += len(streamed.calls)
    assert num_calls == len(expected_calls), "the replay takes the same turns as the recording"


def _script_answers(fixture: Fixture) -> tuple[set[str], list[tuple[str, dict[str, Any]]]]:
    """Texts and tool calls that the script's lines are made of."""
    texts, calls = set(), []
    for line in fixture.script:
        text, _, call = line["reply"].partition(OPEN)
        texts.add(text.rstrip("\n") if call else text)
        if call:
            value = json.loads(call.removesuffix(CLOSE))
            calls.append((value["name"], value["arguments"]))
    return texts, calls


async def _send(
    session: aiohttp.ClientSession, url: str, request: FixtureRequest, body: dict[str, Any] | None
) -> tuple[int, bytes]:
    async with session.request(request.method, url + request.path, headers=request.headers, json=body) as reply:
        return reply.status, await reply.read()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_fixtures_are_small_and_belong_to_nobody(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(text) < 60_000
    assert not re.search(r"/tmp|/root|/work/|/home/(?!user)|\bsk-|authorization|x-api-key", text, re.IGNORECASE)


# ---- how recordings are made ----


def test_scrubbing_keeps_what_belongs_together() -> None:
    scrubber = Scrubber({"/tmp/x/work": "/workspace", "/tmp/x": "/scratch"})
    session = "1b9d6bcd-bbfd-4b2d-9b5d-ab8dfbbd4bed"
    value = {
        "id": f"msg_{session}",
        "cwd": "/tmp/x/work/a",
        "at": "2031-05-06T07:08:09.123Z",
        "call": "call_" + "a" * 24,
    }
    scrubbed = scrubber.value([value, {"session": session, "call": "call_" + "a" * 24, "n": 3}])
    assert scrubbed == [
        {
            "id": "msg_00000000-0000-4000-8000-000000000001",
            "cwd": "/workspace/a",
            "at": "2026-01-01",
            "call": "call_" + "2".rjust(24, "0"),
        },
        {"session": "00000000-0000-4000-8000-000000000001", "call": "call_" + "2".rjust(24, "0"), "n": 3},
    ]
    assert scrubber.ids("version 2031-05-06 (Minix 3.4; x86_64)") == "version 2031-05-06 (Linux; x86_64)"


def test_long_texts_keep_their_head_and_what_the_script_looks_for() -> None:
    text = "a" * 200 + " periwinkle " + "b" * 100
    assert cut(text) == "a" * 120 + " [... 192 characters cut] periwinkle"
    assert cut("a" * 240) == "a" * 240


def test_fixtures_survive_a_round_trip(tmp_path: Path) -> None:
    tools = [{"name": "a"}]
    requests = [
        FixtureRequest("GET", "/v1/models", {"accept": "*/*"}, None, 200),
        FixtureRequest("POST", "/v1/messages", {}, {"tools": tools, "max_tokens": 1}, 200),
        FixtureRequest("POST", "/v1/messages", {}, {"tools": tools, "max_tokens": 2}, 200),
    ]
    fixture = Fixture("c", "1", "anthropic", "recorded", [{"reply": "x"}], requests)
    text = dump(fixture)
    assert text.count('"name": "a"') == 1
    (tmp_path / "f.jsonl").write_text(text, encoding="utf-8")
    assert load(tmp_path / "f.jsonl") == fixture
