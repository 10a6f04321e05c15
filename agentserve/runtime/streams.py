"""What comes of one request, as its consumer reads it: tokens, progress of the prompt, one end.

A stream that is not read merges its tokens, up to a limit; then it is ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import TypeAlias

from agentserve.core.batch import TokenSample
from agentserve.core.events import RequestStats
from agentserve.core.request import FinishReason


@dataclass(frozen=True, slots=True)
class StreamTokens:
    """Tokens that arrived since the last event: one, or several if the consumer is slower than the engine."""

    samples: tuple[TokenSample, ...]
    times_ns: tuple[int, ...]
    """When the engine had each of them, on the driver's clock."""


@dataclass(frozen=True, slots=True)
class StreamProgress:
    """How much of the prompt is in the cache or computed by now."""

    num_computed_tokens: int
    num_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class StreamEnd:
    """The last event of every stream."""

    reason: FinishReason
    stats: RequestStats
    error: str | None
    overflowed: bool = False
    """The consumer left so much unread that the request was ended and further tokens were dropped."""


StreamEvent: TypeAlias = StreamTokens | StreamProgress | StreamEnd


MAX_UNREAD_TOKENS = 16_384
"""Tokens that a stream keeps for a consumer that does not read; a few megabytes."""


@dataclass(slots=True, eq=False)
class Mailbox:
    """What one stream has not read yet. Tokens merge, so a slow consumer costs one event, not thousands."""

    max_unread_tokens: int
    samples: list[TokenSample] = field(default_factory=list)
    times_ns: list[int] = field(default_factory=list)
    progress: StreamProgress | None = None
    end: StreamEnd | None = None
    size: int = 0
    """Tokens in `samples`; alternatives with log-probabilities count as well."""
    overflowed: bool = False
    filled: asyncio.Event = field(default_factory=asyncio.Event)

    def put_token(self, sample: TokenSample, at_ns: int) -> bool:
        """False: this is the one that was too much. It and all that follow are dropped."""
        if self.overflowed:
            return True
        self.size += 1 + len(sample.top_logprobs)
        if self.size > self.max_unread_tokens and self.samples:
            self.overflowed = True
            self.filled.set()
            return False
        self.samples.append(sample)
        self.times_ns.append(at_ns)
        self.filled.set()
        return True

    def put_progress(self, progress: StreamProgress) -> None:
        self.progress = progress
        self.filled.set()

    def put_end(self, end: StreamEnd) -> None:
        self.end = replace(end, overflowed=True) if self.overflowed else end
        self.filled.set()

    def take(self) -> StreamEvent:
        """What is to be read next; there must be something."""
        if self.samples:
            event: StreamEvent = StreamTokens(tuple(self.samples), tuple(self.times_ns))
            self.samples.clear()
            self.times_ns.clear()
            self.size = 0
            self.progress = None
        elif self.progress is not None:
            event = self.progress
            self.progress = None
        else:
            assert self.end is not None
            event = self.end
        if not self.samples and self.progress is None and self.end is None:
            self.filled.clear()
        return event


class TokenStream:
    """The events of one request, as an async iterator and context manager.

    `async with client.generate(...) as stream: async for event in stream: ...`. Leaving the context before the end
    cancels the request.
    """

    def __init__(
        self,
        request_id: str,
        adapter: str | None,
        mailbox: Mailbox,
        *,
        end: Callable[[str, FinishReason], None],
        forget: Callable[[str], None],
    ) -> None:
        """`end` asks the engine to end a request early; `forget`: nobody listens to it any more."""
        self.request_id = request_id
        self.adapter = adapter
        self.mailbox = mailbox
        self._end = end
        self._forget = forget
        self._ended = False

    async def __aenter__(self) -> TokenStream:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._ended:
            self.finish(FinishReason.CANCELLED)
            self._forget(self.request_id)

    def __aiter__(self) -> AsyncIterator[StreamEvent]:
        return self

    async def __anext__(self) -> StreamEvent:
        if self._ended:
            raise StopAsyncIteration
        await self.mailbox.filled.wait()
        event = self.mailbox.take()
        self._ended = isinstance(event, StreamEnd)
        return event

    def finish(self, reason: FinishReason) -> None:
        """Asks the engine to end the request early; the `StreamEnd` still comes through the stream.

        `FinishReason.STOP` is for a stop string found in the text.
        """
        self._end(self.request_id, reason)
