"""Clients that are there and do not read: they cost little, hold up nobody, and in the end they are cut off."""

from __future__ import annotations

import asyncio
import json
import socket
import tracemalloc
from contextlib import suppress
from typing import Any

import pytest

from agentserve.core.request import FinishReason
from agentserve.runtime.streams import MAX_UNREAD_TOKENS
from tests.server import simulated
from tests.server.scripted import Run, ScriptedDaemon, replying, serve

HELLO: list[Any] = [{"role": "user", "content": "hi"}]


LONG = {"prompt": "p" * 1_000_000, "echo": True}
"""A few choices with this prompt before their text are more than sockets take."""


def connect(port: int, path: str, **fields: Any) -> socket.socket:
    """Sends a request through a socket that takes hardly anything, and reads nothing."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    client.connect(("127.0.0.1", port))
    body = json.dumps(fields).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    client.sendall(head.encode() + body)
    return client


async def read(client: socket.socket, until: bytes | None = None) -> bytes:
    """All that comes, up to some text or to the end of the connection."""
    client.setblocking(False)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
    received = bytearray()
    with suppress(ConnectionError):
        while data := await asyncio.get_running_loop().sock_recv(client, 1 << 20):
            received += data
            if until is not None and until in received[-len(data) - len(until) :]:
                break
    return bytes(received)


async def endless(run: Run) -> None:
    """Generates until it is told to stop, a hundred tokens a turn of the loop."""
    run.admit()
    while run.num_output_tokens < run.submitted.sampling.max_tokens:
        for _ in range(100):
            run.token(ord("x"))
        await asyncio.sleep(0)
    run.finish(FinishReason.LENGTH)


async def until_ended(daemon: ScriptedDaemon, num_requests: int) -> None:
    while len(daemon.driver.ended) < num_requests:
        await asyncio.sleep(0.001)


async def test_what_is_kept_for_a_client_that_does_not_read_is_bounded() -> None:
    """The request is ended by the engine's client, the others get their answers meanwhile."""
    async with serve(endless, max_model_len=10_000_000) as daemon:
        with connect(daemon.port, "/v1/completions", stream=True, n=8, max_tokens=1_000_000, **LONG) as silent:
            await until_ended(daemon, 8)
            assert {reason for _, reason in daemon.driver.ended} == {FinishReason.CANCELLED}
            await daemon.driver.idle.wait()
            answer = await daemon.openai().chat.completions.create(model="test-model", messages=HELLO, max_tokens=200)
            assert answer.choices[0].message.content == "x" * 200
            # If it reads after all, it gets what was kept, and is told why there is no more.
            received = await read(silent, until=b"client_too_slow")
            assert received.count(b"x") > MAX_UNREAD_TOKENS / 2
            assert received.count(b"p") >= 8_000_000
        await daemon.state.idle.wait()


async def test_the_memory_for_clients_that_do_not_read_is_bounded() -> None:
    """Eight streams of a million tokens each, at 100 bytes and more: what is kept of them has a bound for each."""
    async with serve(endless, max_model_len=10_000_000) as daemon:
        tracemalloc.start()
        try:
            with connect(daemon.port, "/v1/completions", stream=True, n=8, max_tokens=1_000_000, **LONG):
                await until_ended(daemon, 8)
                await daemon.driver.idle.wait()
                _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        await daemon.state.idle.wait()
    # 16,384 tokens of at most 500 bytes for each stream, and the prompt a few times.
    assert 8_000_000 < peak_bytes < 8 * MAX_UNREAD_TOKENS * 500 + 64_000_000


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_never_reads_is_cut_off(stream: bool) -> None:
    """Also behind the last token, and with an answer in one piece: nothing else would end its handler."""

    async with serve(replying("x" * 99), max_model_len=2_000_000, write_timeout_s=0.2) as daemon:
        with connect(daemon.port, "/v1/completions", stream=stream, n=8, max_tokens=20, **LONG) as silent:
            while daemon.state.num_active == 0:
                await asyncio.sleep(0)
            await daemon.state.idle.wait()
            received = await read(silent)
            # What the sockets held, and then no end of the answer.
            assert 0 < len(received) < 8_000_000
            assert b"[DONE]" not in received and b'"usage"' not in received


async def test_silent_clients_leave_no_block() -> None:
    """On the real control plane; they outnumber the sequences that may run at once."""
    async with simulated.serve(64, max_num_seqs=4, speed=10_000.0) as daemon:
        fields = {"messages": HELLO, "stream": True, "max_tokens": 200, "ignore_eos": True, "logprobs": True}
        silent = [connect(daemon.port, "/v1/chat/completions", **fields) for _ in range(8)]
        try:
            answers = await asyncio.gather(
                *(daemon.openai().chat.completions.create(model="m", messages=HELLO, max_tokens=20) for _ in range(4))
            )
            assert [answer.choices[0].finish_reason for answer in answers] == ["length"] * 4
        finally:
            await daemon.state.idle.wait()
            for client in silent:
                client.close()
