"""A daemon for tests on a free port, with the official SDK as its client and texts made of bytes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import Any

from anthropic import AsyncAnthropic
from openai import AsyncOpenAI

from agentserve.server.app import ServerState, run_server

EOS, BOS = 256, 257


class ByteTokenizer:
    """A token for each byte, and two special ones."""

    vocab_size = 258
    eos_token_ids = (EOS,)
    bos_token_id = BOS
    special_tokens: Mapping[str, str] = MappingProxyType({})
    strips_leading_space = False

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        return [BOS] * add_special_tokens + list(text.encode())

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return b"".join(self.token_bytes(token_id) for token_id in token_ids).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b""

    def is_special(self, token_id: int) -> bool:
        return token_id >= 256


class PlainTemplate:
    """`<tools>` if there are any, `<role>content` for each message, `<assistant>`, and a variable named `tail`.

    Reasoning stands in `(...)` before the content, calls as `[name arguments]` behind it.
    """

    supports_tools = True

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        text = f"<tools>{','.join(tool['function']['name'] for tool in tools)}" if tools else ""
        text += "".join(self._show(message) for message in messages)
        return text + "<assistant>" * add_generation_prompt + str((template_kwargs or {}).get("tail", ""))

    def _show(self, message: Mapping[str, Any]) -> str:
        text = f"<{message['role']}>"
        if message.get("reasoning_content"):
            text += f"({message['reasoning_content']})"
        text += str(message["content"])
        for call in message.get("tool_calls", ()):
            text += f"[{call['function']['name']} {call['function']['arguments']}]"
        return text


class Daemon:
    """A running server."""

    def __init__(self, state: ServerState) -> None:
        self.state = state
        self.client = state.client
        self.port = 0
        self.stop = asyncio.Event()
        self.abort = asyncio.Event()
        self._clients: list[AsyncOpenAI | AsyncAnthropic] = []
        self._task: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def openai(self, **options: Any) -> AsyncOpenAI:
        """The official SDK, without retries so that each error is seen."""
        merged: dict[str, Any] = {"api_key": "none", "max_retries": 0, "base_url": f"{self.url}/v1"} | options
        client = AsyncOpenAI(**merged)
        self._clients.append(client)
        return client

    def anthropic(self, **options: Any) -> AsyncAnthropic:
        """The same of the other dialect; its base URL has no `/v1`."""
        merged: dict[str, Any] = {"api_key": "none", "max_retries": 0, "base_url": self.url} | options
        client = AsyncAnthropic(**merged)
        self._clients.append(client)
        return client

    async def start(self) -> None:
        ports: asyncio.Queue[int] = asyncio.Queue()
        self._task = asyncio.create_task(
            run_server(self.state, on_ready=lambda host, port: ports.put_nowait(port), stop=self.stop, abort=self.abort)
        )
        # So that whoever waits for the port does not wait for ever when there is none.
        self._task.add_done_callback(lambda _: ports.put_nowait(0))
        self.port = await ports.get()
        if self.port == 0:
            await self._task

    async def close(self) -> None:
        for client in self._clients:
            await client.close()
        self.stop.set()
        self.abort.set()
        if self._task is not None:
            await asyncio.wait([self._task])


@asynccontextmanager
async def running(daemon: Daemon) -> AsyncIterator[None]:
    """Starts a server on a free port; when it is left, every request must have been given back to the engine."""
    try:
        await daemon.start()
        yield
    finally:
        await daemon.close()
    assert daemon.client.num_unfinished == 0, "the server has left a request running"
    assert daemon.state.num_active == 0
