"""Every token's time, against a server that plays scripts with exact times."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest
from aiohttp import web

from bench.load.client import Call, ChatClient
from bench.load.errors import EndpointError, EndpointGoneError
from bench.load.servers import free_port
from tests.bench.fake_endpoint import END, FakeServer, ScriptClock, Scripted, chunk, serving, sse, usage

ROLE = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": None}, "finish_reason": None}]}
Events = list[tuple[int, Mapping[str, Any] | str | bytes]]


async def play(events: Events, **options: Any) -> Call:
    """One call to a server that sends these events at these times; the call itself is sent at time 1,000."""
    clock, server = ScriptClock(), FakeServer()
    clock.now_ns = 1000
    server.script = Scripted(clock, events)
    call = Call("s")
    async with serving(server), ChatClient(server.base_url, model="m", clock_ns=clock, **options) as client:
        await client.chat(call, [{"role": "user", "content": "hi"}], max_tokens=4)
    assert call.sent_ns == 1000
    return call


async def test_a_server_that_counts_each_chunk() -> None:
    call = await play(
        [
            (1500, chunk("", 0, num_prompt=9)),  # the role comes at once: it is no token
            (3000, b": keep-alive\n\n"),
            (5000, chunk("a", 1, num_prompt=9)),
            (6000, chunk("b", 2, num_prompt=9)),
            (9000, chunk("cd", 4, num_prompt=9, finish="length")),  # two tokens in one chunk have one time
            (9500, usage(9, 4, 8)),
            (9600, END),
        ]
    )
    assert call.error is None
    assert call.token_ns == (5000, 6000, 9000, 9000)
    assert call.text == "abcd"
    assert (call.num_prompt_tokens, call.num_cached_tokens, call.num_output_tokens) == (9, 8, 4)
    assert (call.finish_reason, call.finished_ns, call.counts_are_exact) == ("length", 9600, True)


async def test_tokens_without_text_are_counted_where_the_server_counts() -> None:
    # A special token has no text; the last token has none either and comes with the reason.
    call = await play([(2000, chunk("a", 1)), (3000, chunk("", 2)), (4000, chunk("", 3, finish="length")), (4100, END)])
    assert call.token_ns == (2000, 3000, 4000)


async def test_llama_cpp_counts_with_timings() -> None:
    def timed(text: str, n: int) -> dict[str, Any]:
        return chunk(text) | {"timings": {"cache_n": 16, "prompt_n": 5, "predicted_n": n}}

    last = {"choices": [], "timings": {"cache_n": 16, "prompt_n": 5, "predicted_n": 3}} | {
        "usage": {"prompt_tokens": 21, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 16}}
    }
    call = await play(
        [(2000, ROLE), (3000, timed("a", 1)), (4000, timed("bc", 3)), (5000, chunk("", finish="length")), (6000, last),
         (6000, END)]
    )  # fmt: skip
    assert call.token_ns == (3000, 4000, 4000)
    assert (call.num_prompt_tokens, call.num_cached_tokens, call.counts_are_exact) == (21, 16, True)


async def test_a_server_that_counts_only_at_the_end() -> None:
    # 3 chunks, 6 tokens by usage: 1 in the first chunk, the surplus of 3 on the two others, the earlier one first.
    call = await play(
        [(2000, ROLE), (3000, chunk("a")), (4000, chunk("b")), (5000, chunk("c")), (5500, usage(9, 6)), (5600, END)]
    )
    assert call.token_ns == (3000, 4000, 4000, 4000, 5000, 5000)
    assert (call.num_output_tokens, call.num_cached_tokens, call.counts_are_exact) == (6, None, False)


async def test_an_event_may_arrive_in_pieces() -> None:
    whole = sse(chunk("a", 1))
    call = await play([(2000, whole[:20]), (3000, whole[20:]), (4000, END)])
    assert call.token_ns == (3000,)  # when it could be read


@pytest.mark.parametrize(
    ("events", "error"),
    [
        ([(2000, chunk("a", 1)), (3000, {"error": {"message": "out of memory"}})], "server: out of memory"),
        ([(2000, chunk("a", 1)), (3000, b"data: {oops\n\n")], "an event is no JSON"),
        ([(2000, chunk("a", 1))], "the stream ended without [DONE]"),
        ([(2000, END)], "the answer has no tokens"),
    ],
)
async def test_what_is_no_answer_is_an_error_of_the_call(events: Events, error: str) -> None:
    call = await play(events)
    assert call.error is not None and call.error.startswith(error)
    assert call.token_ns == ((2000,) if len(events) == 2 or error.startswith("the stream") else ())


async def test_a_refused_call_has_the_status_and_the_reason() -> None:
    server, call = FakeServer(), Call("s")

    async def refuse(request: web.Request) -> web.StreamResponse:
        return web.Response(status=400, text="too long")

    server.script = refuse
    async with serving(server), ChatClient(server.base_url, model="m") as client:
        await client.chat(call, [{"role": "user", "content": "hi"}], max_tokens=4)
    assert call.error == "HTTP 400: too long"


async def test_a_connection_that_breaks_and_one_that_hangs() -> None:
    server, broken, hanging = FakeServer(), Call("s"), Call("s")
    forever = asyncio.Event()

    async def drop(body: dict[str, Any], response: web.StreamResponse) -> None:
        await response.write(sse(chunk("a", 1)))
        assert response._req is not None and response._req.transport is not None
        response._req.transport.abort()

    async def hang(body: dict[str, Any], response: web.StreamResponse) -> None:
        await forever.wait()

    async with serving(server), ChatClient(server.base_url, model="m", timeout_s=0.05) as client:
        server.answer = drop
        await client.chat(broken, [{"role": "user", "content": "hi"}], max_tokens=4)
        server.answer = hang
        await client.chat(hanging, [{"role": "user", "content": "hi"}], max_tokens=4)
        forever.set()
    assert broken.error is not None and broken.error.startswith("connection: ")
    assert hanging.error == "timeout: no complete answer in 0.05 s"


async def test_nobody_listens() -> None:
    async with ChatClient(f"http://127.0.0.1:{free_port()}/v1", model="m") as client:
        with pytest.raises(EndpointGoneError, match="nobody listens"):
            await client.chat(Call("s"), [{"role": "user", "content": "hi"}], max_tokens=4)
        with pytest.raises(EndpointError, match="failed"):
            await client.get_json(f"{client.base_url}/models")


async def test_what_is_sent() -> None:
    server, call = FakeServer(), Call("session-7")
    async with serving(server), ChatClient(server.base_url, api_key="secret") as client:
        assert await client.find_model() == "a/fake-model"
        await client.chat(call, [{"role": "user", "content": "hi"}], max_tokens=3, seed=5)
    assert server.bodies == [
        {
            "model": "a/fake-model",
            "messages": [{"role": "user", "content": "hi"}],
            "max_tokens": 3,
            "temperature": 0,
            "seed": 5,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            "timings_per_token": True,
        }
    ]
    assert server.sessions == ["session-7"]
    assert call.num_output_tokens == 3
