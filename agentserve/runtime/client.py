"""The asyncio side of the engine: submit token ids, iterate over what comes back.

`EngineClient` lives on one event loop. The engine thread hands it events with one `call_soon_threadsafe` a step. Every
stream ends with exactly one `StreamEnd`; leaving a stream early cancels its request.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, TypeVar

from agentserve.core.engine import EngineCore
from agentserve.core.events import (
    Command,
    EndRequest,
    EngineEvent,
    NoteTurn,
    PrefillProgress,
    RequestAdmitted,
    RequestFinished,
    RequestStats,
    SetDistances,
    Speculate,
    SubmitRequest,
    TokenGenerated,
)
from agentserve.core.memory.answers import ReadTokens, Whereabouts
from agentserve.core.request import FinishReason, SamplingParams
from agentserve.core.stats import EngineStats
from agentserve.errors import (
    ContextLengthExceededError,
    EngineError,
    InvalidRequestError,
    QueueFullError,
)
from agentserve.runtime.streams import MAX_UNREAD_TOKENS, Mailbox, StreamEnd, StreamProgress, TokenStream
from agentserve.text.grammar.compiler import CompiledGrammar
from agentserve.text.grammar.masks import GrammarMasks

_T = TypeVar("_T")


class Driver(Protocol):
    """What the client needs of whoever runs the core."""

    def post(self, command: Command) -> None:
        """Hands a command to the engine thread; returns at once. Raises EngineError if the engine is down."""
        ...

    def stats(self) -> EngineStats: ...

    def ask(self, question: Callable[[EngineCore, int], _T]) -> Future[_T]:
        """Has a question answered on the engine thread. Raises EngineError if the engine is down; so may the future."""
        ...


@dataclass(frozen=True, slots=True)
class Located:
    """Where KV is, and for how long."""

    blocks: Whereabouts
    pinned_for_s: float | None
    """Seconds until the last of its pins ends; None if there is none, or it lasts until the next call."""


class EventBridge:
    """Carries events from the engine thread to the event loop on which the client lives."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._client: EngineClient | None = None

    def bind(self, client: EngineClient, loop: asyncio.AbstractEventLoop) -> None:
        """Must be called before the engine starts."""
        self._client = client
        self._loop = loop

    def on_events(self, events: Sequence[EngineEvent]) -> None:
        assert self._client is not None
        self._call(partial(self._client.dispatch, events))

    def on_failure(self, message: str) -> None:
        assert self._client is not None
        self._call(partial(self._client.fail_all, message))

    def _call(self, deliver: Callable[[], None]) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(deliver)
        except RuntimeError:
            # At shutdown the loop may end before the engine, and nobody listens any more.
            if not self._loop.is_closed():
                raise


class EngineClient:
    """The asyncio facade of an engine. All methods are for the event loop's thread."""

    def __init__(
        self,
        driver: Driver,
        *,
        max_model_len: int,
        max_queued_requests: int,
        masks: GrammarMasks | None = None,
        max_unread_tokens: int = MAX_UNREAD_TOKENS,
    ) -> None:
        """`masks` is shared with the executor; without it no request can have a grammar. A stream whose consumer leaves
        more than `max_unread_tokens` unread is ended."""
        self._driver = driver
        self._masks = masks
        self._max_unread_tokens = max_unread_tokens
        self.max_model_len = max_model_len
        self._max_queued_requests = max_queued_requests
        self._streams: dict[str, TokenStream] = {}
        self._waiting: set[str] = set()
        self._num_pending = 0
        self._ids = itertools.count()

    @property
    def num_unfinished(self) -> int:
        """Requests that were accepted and whose stream is still listened to."""
        return len(self._streams)

    @property
    def num_waiting(self) -> int:
        """Requests that were accepted and have not been admitted yet."""
        return len(self._waiting)

    def stats(self) -> EngineStats:
        return self._driver.stats()

    def adapter_requests(self) -> tuple[Counter[str], Counter[str]]:
        """How many requests with each adapter have been admitted, and how many have not yet. O(requests)."""
        running, waiting = Counter[str](), Counter[str]()
        for request_id, stream in self._streams.items():
            if stream.adapter is not None:
                (waiting if request_id in self._waiting else running)[stream.adapter] += 1
        return running, waiting

    def check(self, num_prompt_tokens: int, sampling: SamplingParams, *, param: str = "messages") -> None:
        """Raises what `generate` would raise, without submitting anything."""
        if num_prompt_tokens < 1:
            raise InvalidRequestError("the prompt is empty", param=param)
        if num_prompt_tokens >= self.max_model_len:
            raise ContextLengthExceededError(num_prompt_tokens, self.max_model_len, param=param)
        if num_prompt_tokens + sampling.max_tokens > self.max_model_len:
            raise InvalidRequestError(
                f"max_tokens is {sampling.max_tokens}, but the prompt has {num_prompt_tokens} tokens and the "
                f"model's maximum context length is {self.max_model_len} tokens",
                param="max_tokens",
                code="context_length_exceeded",
            )
        if self.num_waiting >= self._max_queued_requests:
            raise QueueFullError(
                f"{self.num_waiting} requests are waiting already, which is the limit",
                retry_after_s=5,
            )

    def generate(
        self,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        request_id: str | None = None,
        agent_id: str | None = None,
        session_id: str | None = None,
        program_id: str | None = None,
        is_last_turn: bool | None = None,
        distance: float | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        adapter: str | None = None,
        grammar: CompiledGrammar | None = None,
        param: str = "messages",
    ) -> TokenStream:
        """Submits a request and returns its stream.

        With a `grammar` the output is held to it: its end-of-sequence tokens come where it may end, and nowhere else.

        Raises InvalidRequestError, ContextLengthExceededError or QueueFullError when it is refused, and EngineError
        when the engine is down; then nothing was submitted. `param` is the field to blame for the prompt's length.
        """
        if grammar is not None:
            sampling = self._constrain(sampling, grammar)
        self.check(len(prompt_token_ids), sampling, param=param)
        request_id = request_id or f"req-{next(self._ids)}"
        if request_id in self._streams:
            raise InvalidRequestError(f"request id {request_id!r} is in use", param="request_id")
        mailbox = Mailbox(self._max_unread_tokens)
        stream = TokenStream(request_id, adapter, mailbox, end=self._end, forget=self._forget)
        command = SubmitRequest(
            request_id=request_id,
            prompt_token_ids=tuple(prompt_token_ids),
            sampling=sampling,
            agent_id=agent_id,
            session_id=session_id,
            program_id=program_id,
            is_last_turn=is_last_turn,
            distance=distance,
            priority=priority,
            cache_salt=cache_salt,
            adapter=adapter,
        )
        if self._masks is not None and grammar is not None:
            self._masks.open(request_id, grammar)
        try:
            self._driver.post(command)
        except EngineError:
            self._close_grammar(request_id)
            raise
        self._streams[request_id] = stream
        self._waiting.add(request_id)
        return stream

    async def locate(self, sequences: Sequence[ReadTokens]) -> Located:
        """Where the KV of sequences of tokens is. Raises EngineError."""

        def question(core: EngineCore, now_ns: int) -> Located:
            found = core.locate(sequences)
            end_ns = core.pins_end_ns(found.pinned_by)
            return Located(found, None if end_ns is None else max(0, end_ns - now_ns) / 1e9)

        return await asyncio.wrap_future(self._driver.ask(question))

    def note_turn(self, request_id: str, tool_name: str) -> None:
        """Says which tool runs behind the answer of a request that has ended; see `NoteTurn`."""
        self._post_late(NoteTurn(request_id, tool_name))

    def speculate(self, request_id: str, token_ids: Sequence[int]) -> None:
        """Says what the next prompt begins with that goes on behind the answer of a request; see `Speculate`."""
        self._post_late(Speculate(request_id, tuple(token_ids)))

    def set_distances(self, agents: Mapping[str, float], *, relative: bool = False) -> None:
        """Says how far agents are from their next calls; see `SetDistances`.

        Raises EngineError if the engine is down.
        """
        self._driver.post(SetDistances(tuple(agents.items()), relative))

    def dispatch(self, events: Sequence[EngineEvent]) -> None:
        """Delivers the events of one or more steps to their streams. Called on the event loop."""
        for event in events:
            if isinstance(event, TokenGenerated | PrefillProgress):
                stream = self._streams.get(event.request_id)
                if stream is None:
                    continue  # nobody listens any more; the cancel is on its way
                if isinstance(event, PrefillProgress):
                    stream.mailbox.put_progress(StreamProgress(event.num_computed_tokens, event.num_total_tokens))
                elif not stream.mailbox.put_token(event.sample, event.at_ns):
                    self._end(event.request_id, FinishReason.CANCELLED)
            elif isinstance(event, RequestAdmitted):
                self._waiting.discard(event.request_id)
            elif isinstance(event, RequestFinished):
                reason, error = event.reason, event.error
                problem = self._close_grammar(event.request_id)
                if problem is not None and reason is FinishReason.STOP:
                    reason, error = FinishReason.ERROR, problem
                self._finish(event.request_id, StreamEnd(reason, event.stats, error))

    def fail_all(self, message: str) -> None:
        """Ends every stream with an error: the engine thread has died. Called on the event loop."""
        stats = RequestStats(0, 0, 0, 0, "", 0, None, None, None)
        for request_id in list(self._streams):
            self._close_grammar(request_id)
            self._finish(request_id, StreamEnd(FinishReason.ERROR, stats, message))

    def _constrain(self, sampling: SamplingParams, grammar: CompiledGrammar) -> SamplingParams:
        if self._masks is None:
            raise InvalidRequestError("this engine cannot hold its output to a grammar", param="response_format")
        if not set(grammar.eos_token_ids) <= set(sampling.stop_token_ids):
            raise InvalidRequestError("ignore_eos cannot be combined with a grammar, which ends", param="ignore_eos")
        return replace(sampling, constrained=True)

    def _close_grammar(self, request_id: str) -> str | None:
        """What went wrong in the grammar of a request that has ended; None for most."""
        return None if self._masks is None else self._masks.close(request_id)

    def _finish(self, request_id: str, end: StreamEnd) -> None:
        """The last that a stream gets, if somebody listens to it."""
        stream = self._streams.get(request_id)
        if stream is not None:
            stream.mailbox.put_end(end)
        self._forget(request_id)

    def _end(self, request_id: str, reason: FinishReason) -> None:
        if request_id in self._streams:
            self._post_late(EndRequest(request_id, reason))

    def _post_late(self, command: EndRequest | NoteTurn | Speculate) -> None:
        """Posts what only matters to a running engine."""
        try:
            self._driver.post(command)
        except EngineError:
            # The engine is down, so all requests are over; `fail_all` tells their streams.
            return

    def _forget(self, request_id: str) -> None:
        self._streams.pop(request_id, None)
        self._waiting.discard(request_id)
