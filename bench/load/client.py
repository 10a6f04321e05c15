"""Streaming chat completions over plain HTTP: each token is stamped when its bytes are read.

The parser is ours and small because the bench shares its cores with the server that it measures.

How many tokens a chunk holds is asked for in the two ways that servers know: `stream_options.continuous_usage_stats`
(agentserve, vLLM, SGLang) and `timings_per_token` (llama.cpp). Tokens of one chunk have one time. A server that knows
neither (Ollama) is taken to send a token a chunk; if `usage` counts more tokens than chunks came, the surplus is spread
evenly over the chunks after the first, which moves no time between two chunks but does add gaps of zero.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import aiohttp

from bench.load.errors import EndpointError, EndpointGoneError

Message = Mapping[str, str]


@dataclass(slots=True)
class Call:
    """One call and what has come of it so far. Times are nanoseconds of the client's clock."""

    session_id: str
    sent_ns: int = 0
    finished_ns: int = 0
    text: str = ""
    chunks: list[tuple[int, int]] = field(default_factory=list)
    """Time and number of tokens of each chunk that brought any."""
    num_prompt_tokens: int = 0
    num_cached_tokens: int | None = None
    num_output_tokens: int = 0
    work_class: str | None = None
    """How the server classed the call; only agentserve says."""
    finish_reason: str | None = None
    error: str | None = None
    counts_are_exact: bool = False
    """Whether the server said how many tokens each chunk holds."""

    @property
    def token_ns(self) -> tuple[int, ...]:
        """A time for each token; see the module on what that means where the server does not count for each chunk."""
        counts = [count for _, count in self.chunks]
        surplus = self.num_output_tokens - sum(counts)
        if surplus > 0 and counts:
            later = range(1, len(counts)) if len(counts) > 1 else range(1)
            share, rest = divmod(surplus, len(later))
            for position, index in enumerate(later):
                counts[index] += share + (position < rest)
        return tuple(at_ns for (at_ns, _), count in zip(self.chunks, counts, strict=True) for _ in range(count))

    def take(self, payload: Mapping[str, Any], now_ns: int) -> None:
        """Reads one event of the stream."""
        if payload.get("error") is not None:
            self.error = _error_text(payload)
            return
        choices = payload.get("choices") or []
        choice = choices[0] if choices else {}
        delta = choice.get("delta") or {}
        text = delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning") or ""
        self.text += delta.get("content") or ""
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        num_tokens = self._read_counts(payload)
        if num_tokens is not None and choices:
            self.counts_are_exact = True
            num_new = num_tokens - self.num_output_tokens
        else:
            num_new = 1 if text and not self.counts_are_exact else 0
        if num_new > 0:
            self.chunks.append((now_ns, num_new))
            self.num_output_tokens += num_new
        elif num_tokens is not None:
            self.num_output_tokens = num_tokens

    def _read_counts(self, payload: Mapping[str, Any]) -> int | None:
        """Prompt and cached tokens, and the output tokens so far if this event counts them."""
        num_tokens: int | None = None
        timings = payload.get("timings")
        if isinstance(timings, Mapping) and "predicted_n" in timings:
            num_tokens = int(timings["predicted_n"])
            self.num_cached_tokens = int(timings.get("cache_n", 0))
            self.num_prompt_tokens = int(timings["prompt_n"]) + self.num_cached_tokens
        usage = payload.get("usage")
        if isinstance(usage, Mapping) and usage.get("completion_tokens") is not None:
            num_tokens = int(usage["completion_tokens"])
            self.num_prompt_tokens = int(usage["prompt_tokens"])
            details = usage.get("prompt_tokens_details")
            if isinstance(details, Mapping) and details.get("cached_tokens") is not None:
                self.num_cached_tokens = int(details["cached_tokens"])
            extension = usage.get("agentserve")
            if isinstance(extension, Mapping):
                self.work_class = str(extension.get("work_class"))
        return num_tokens


class ChatClient:
    """One endpoint. Use as an asynchronous context manager."""

    def __init__(
        self,
        base_url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """
        Args:
            base_url: with the version, such as `http://127.0.0.1:8177/v1`.
            model: name in the requests; None takes the first one of the server's list.
            api_key: sent as a bearer token.
            timeout_s: a call that takes longer fails.
            clock_ns: monotonic.
        """
        self.base_url = base_url.rstrip("/")
        self.clock_ns = clock_ns
        self._model = model
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout_s = timeout_s
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> ChatClient:
        # No limit on connections: agents must not wait for each other in the client.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=None, connect=30),
            headers=self._headers,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.close()

    @property
    def model(self) -> str:
        """The name in the requests; known after `find_model`."""
        assert self._model is not None, "find_model has not been called"
        return self._model

    @property
    def _http(self) -> aiohttp.ClientSession:
        assert self._session is not None, "the client has not been entered"
        return self._session

    async def find_model(self) -> str:
        """The model that was asked for, or the first one that the server lists. Raises EndpointError."""
        if self._model is None:
            try:
                listed = await self.get_json(f"{self.base_url}/models")
                self._model = str(listed["data"][0]["id"])
            except (KeyError, IndexError, TypeError) as error:
                raise EndpointError(f"{self.base_url}/models lists no model: {error!r}; give --model") from None
        return self._model

    async def get_json(self, url: str) -> Any:
        """Raises EndpointError."""
        try:
            async with self._http.get(url, timeout=aiohttp.ClientTimeout(total=30)) as answer:
                if answer.status != 200:
                    raise EndpointError(f"GET {url} was answered with {answer.status}")
                return await answer.json(content_type=None)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise EndpointError(f"GET {url} failed: {_describe(error)}") from None

    async def chat(self, call: Call, messages: Sequence[Message], *, max_tokens: int, seed: int = 0) -> None:
        """Sends a conversation and fills `call`; a failure becomes `call.error`.

        When it is cancelled, `call` has what came so far. Raises EndpointGoneError if nobody listens.
        """
        body = {
            "model": self.model,
            "messages": list(messages),
            "max_tokens": max_tokens,
            "temperature": 0,
            "seed": seed,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            "timings_per_token": True,
        }
        data = json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "X-Session-ID": call.session_id}
        call.sent_ns = self.clock_ns()
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._stream(call, data, headers)
        except TimeoutError:
            call.error = f"timeout: no complete answer in {self._timeout_s:g} s"
        except aiohttp.ClientConnectorError as error:
            raise EndpointGoneError(f"nobody listens at {self.base_url}: {error}") from None
        except aiohttp.ClientError as error:
            call.error = f"connection: {_describe(error)}"
        finally:
            call.finished_ns = self.clock_ns()
        if call.error is None and call.num_output_tokens == 0:
            call.error = "the answer has no tokens"

    async def _stream(self, call: Call, data: bytes, headers: Mapping[str, str]) -> None:
        url = f"{self.base_url}/chat/completions"
        async with self._http.post(url, data=data, headers=headers) as answer:
            if answer.status != 200:
                call.error = f"HTTP {answer.status}: {(await answer.text())[:500]}"
                return
            pending = b""
            async for received in answer.content.iter_any():
                now_ns = self.clock_ns()
                *lines, pending = (pending + received).split(b"\n")
                for line in lines:
                    if not line.startswith(b"data:"):
                        continue  # an empty line, a comment that keeps the connection alive, or another field
                    value = line[5:].strip()
                    if value == b"[DONE]":
                        return
                    try:
                        payload = json.loads(value)
                    except ValueError:
                        call.error = f"an event is no JSON: {value[:200]!r}"
                        return
                    call.take(payload, now_ns)
                    if call.error is not None:
                        return
            call.error = "the stream ended without [DONE]"


def _error_text(payload: Mapping[str, Any]) -> str:
    error = payload["error"]
    return f"server: {error.get('message', error) if isinstance(error, Mapping) else error}"[:500]


def _describe(error: BaseException) -> str:
    return str(error) or type(error).__name__
