"""Disconnects, silence, slow readers and shutdown."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from typing import Any

import aiohttp
import openai
import pytest

from agentserve.core.request import FinishReason
from tests.server.scripted import Run, ScriptedDaemon, replying, serve

HELLO: list[Any] = [{"role": "user", "content": "hi"}]


class Gate:
    """A script that says when it has started, and waits until the test lets it go on."""

    def __init__(self, before: str = "", after: str = "done") -> None:
        self.started = asyncio.Event()
        self.go_on = asyncio.Event()
        self._before, self._after = before, after

    async def __call__(self, run: Run) -> None:
        run.admit()
        for byte in self._before.encode():
            run.token(byte)
        self.started.set()
        await self.go_on.wait()
        await run.reply(self._after)


async def raw_post(daemon: ScriptedDaemon, **fields: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Sends a chat request over a bare socket."""
    body = json.dumps({"messages": HELLO} | fields).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    await writer.drain()
    return reader, writer


async def assert_cancelled(daemon: ScriptedDaemon, num_requests: int = 1) -> None:
    await daemon.driver.idle.wait()
    assert [reason for _, reason in daemon.driver.ended] == [FinishReason.CANCELLED] * num_requests
    await daemon.state.idle.wait()
    assert daemon.client.num_unfinished == 0


async def test_closing_the_stream_early_ends_the_request() -> None:
    async with serve(Gate(before="abc")) as daemon:
        stream = await daemon.openai().chat.completions.create(model="test-model", messages=HELLO, stream=True)
        async for chunk in stream:
            if chunk.choices[0].delta.content:
                break
        await stream.close()
        await assert_cancelled(daemon)


@pytest.mark.parametrize("fields", [{"stream": True}, {"stream": False}, {"stream": True, "n": 3}, {"n": 3}])
async def test_disconnect_before_the_first_token(fields: dict[str, Any]) -> None:
    gate = Gate()
    async with serve(gate) as daemon:
        reader, writer = await raw_post(daemon, **fields)
        await gate.started.wait()
        if fields.get("stream"):
            assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
        writer.close()
        await writer.wait_closed()
        await assert_cancelled(daemon, fields.get("n", 1))


async def test_disconnect_while_the_body_is_being_sent() -> None:
    async with serve() as daemon:
        _, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        answer = await daemon.openai().chat.completions.create(model="test-model", messages=HELLO)
        assert answer.choices[0].message.content == "Hello"
        await daemon.state.idle.wait()


async def test_cancelled_sdk_call_ends_the_request() -> None:
    gate = Gate()
    async with serve(gate) as daemon:
        call = asyncio.create_task(
            daemon.openai().chat.completions.create(model="test-model", messages=HELLO)  # not streamed
        )
        await gate.started.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await assert_cancelled(daemon)


async def test_other_requests_survive_a_disconnect() -> None:
    gate = Gate()
    async with serve(gate) as daemon:
        survivor = asyncio.create_task(daemon.openai().chat.completions.create(model="test-model", messages=HELLO))
        await gate.started.wait()
        gate.started.clear()
        _, writer = await raw_post(daemon, stream=True)
        await gate.started.wait()
        writer.close()
        await writer.wait_closed()
        while daemon.driver.num_running > 1:
            await asyncio.sleep(0)
        gate.go_on.set()
        assert (await survivor).choices[0].message.content == "done"


async def test_headers_come_at_once_and_silence_is_filled() -> None:
    gate = Gate()
    async with serve(gate, sse_ping_interval_s=0.005) as daemon, aiohttp.ClientSession() as session:
        body = {"messages": HELLO, "stream": True}
        async with session.post(f"{daemon.url}/v1/chat/completions", json=body) as response:
            assert response.status == 200
            assert response.headers["Content-Type"].startswith("text/event-stream")
            assert response.headers["x-agentserve-executor"] == "scripted"
            lines = [await response.content.readline() for _ in range(6)]
            assert json.loads(lines[0].removeprefix(b"data: "))["choices"][0]["delta"]["role"] == "assistant"
            assert lines[2:] == [b": keep-alive\n", b"\n", b": keep-alive\n", b"\n"]
            gate.go_on.set()
            rest = await response.content.read()
        assert rest.endswith(b"data: [DONE]\n\n")


async def test_sdk_does_not_see_keep_alives() -> None:
    gate = Gate()
    async with serve(gate, sse_ping_interval_s=0.001) as daemon:
        stream = await daemon.openai().chat.completions.create(model="test-model", messages=HELLO, stream=True)
        asyncio.get_running_loop().call_later(0.02, gate.go_on.set)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        assert text == "done"


async def test_progress_events_are_no_chunks() -> None:
    async def script(run: Run) -> None:
        run.admit()
        for num_computed in (5, 10):
            run.progress(num_computed)
            await asyncio.sleep(0)
        await run.reply("x")

    async with serve(script) as daemon:
        stream = await daemon.openai().chat.completions.create(model="test-model", messages=HELLO, stream=True)
        contents = [chunk.choices[0].delta.content async for chunk in stream]
        assert contents == ["", "x", None]


async def test_slow_reader_gets_everything_and_does_not_block_others() -> None:
    text = "ab" * 50

    async def script(run: Run) -> None:
        for byte in text.encode():
            run.token(byte)  # all at once: faster than any client reads
        await run.reply("")

    async with serve(script) as daemon:
        reader, writer = await raw_post(daemon, stream=True)
        # Nothing of the first answer is read before the second one is complete.
        other = await daemon.openai().chat.completions.create(model="test-model", messages=HELLO)
        assert other.choices[0].message.content == text
        received = b""
        while b"[DONE]" not in received:
            received += await reader.read(100)
        events = [line[6:] for line in received.split(b"\n") if line.startswith(b"data: {")]
        pieces = [json.loads(event)["choices"][0]["delta"].get("content", "") for event in events]
        assert "".join(pieces) == text
        # Tokens that wait together travel together.
        assert len(pieces) < len(text)
        writer.close()
        await writer.wait_closed()


async def test_shutdown_finishes_what_runs_and_refuses_what_is_new() -> None:
    gate = Gate(before="abc")
    async with serve(gate) as daemon, aiohttp.ClientSession() as session:
        running = asyncio.create_task(daemon.openai().chat.completions.create(model="test-model", messages=HELLO))
        async with session.get(f"{daemon.url}/ready") as response:  # leaves an open connection behind
            assert response.status == 200
        await gate.started.wait()
        daemon.stop.set()
        while not daemon.state.is_draining:
            await asyncio.sleep(0)
        async with session.get(f"{daemon.url}/ready") as response:
            assert response.status == 503
        async with session.post(f"{daemon.url}/v1/chat/completions", json={"messages": HELLO}) as response:
            assert response.status == 503
            assert response.headers["x-should-retry"] == "true"
        with pytest.raises(openai.APIConnectionError):
            await daemon.openai().models.list()
        gate.go_on.set()
        assert (await running).choices[0].message.content == "abcdone"


@pytest.mark.parametrize("limit", ["second signal", "time"])
async def test_shutdown_aborts_in_the_end(limit: str) -> None:
    gate = Gate(before="abc")
    async with serve(gate, drain_timeout_s=60 if limit == "second signal" else 0) as daemon:
        client = daemon.openai()
        whole = asyncio.create_task(client.chat.completions.create(model="test-model", messages=HELLO, n=2))
        stream = await client.chat.completions.create(model="test-model", messages=HELLO, stream=True)
        while daemon.driver.num_running < 3:
            await asyncio.sleep(0)
        daemon.stop.set()
        if limit == "second signal":
            daemon.abort.set()
        with pytest.raises(openai.APIError, match="shutting down"):
            async for _ in stream:
                pass
        with pytest.raises(openai.InternalServerError, match="shutting down"):
            await whole
        await assert_cancelled(daemon, 3)


async def test_signals_drain() -> None:
    gate = Gate()
    async with serve(gate) as daemon:
        running = asyncio.create_task(daemon.openai().chat.completions.create(model="test-model", messages=HELLO))
        await gate.started.wait()
        os.kill(os.getpid(), signal.SIGTERM)
        await daemon.stop.wait()
        os.kill(os.getpid(), signal.SIGINT)
        await daemon.abort.wait()
        with pytest.raises(openai.InternalServerError, match="shutting down"):
            await running


async def test_many_streams_at_once() -> None:
    async with serve(replying("some text"), max_queued_requests=100) as daemon:
        client = daemon.openai()

        async def talk(leave_after: int | None) -> str:
            stream = await client.chat.completions.create(model="test-model", messages=HELLO, stream=True)
            text = ""
            async with stream:
                async for chunk in stream:
                    text += chunk.choices[0].delta.content or ""
                    if leave_after is not None and len(text) >= leave_after:
                        break
            return text

        texts = await asyncio.gather(*(talk(3 if index % 3 == 0 else None) for index in range(30)))
        assert [text for index, text in enumerate(texts) if index % 3] == ["some text"] * 20
        await daemon.driver.idle.wait()
        await daemon.state.idle.wait()
        assert daemon.client.num_unfinished == 0
