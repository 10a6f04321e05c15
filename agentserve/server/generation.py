"""From a `GenerateRequest` to `GenerationEvent`s: render, tokenize, check, submit, and merge the choices."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from agentserve.core.request import SamplingParams
from agentserve.errors import InvalidRequestError
from agentserve.runtime.client import EngineClient
from agentserve.server.choice import Choice
from agentserve.server.metrics import ServerMetrics
from agentserve.server.observe import RequestObserver
from agentserve.server.types import (
    ChatPrompt,
    ChoiceFinished,
    Finished,
    GenerateRequest,
    GenerationEvent,
    Prompt,
    TextDelta,
    TextPrompt,
    TokenPrompt,
    Usage,
)
from agentserve.text.tokenizer import Tokenizer

_NUM_TEXT_WORKERS = 2


class ChatRenderer(Protocol):
    """Renders a conversation. Called in worker threads. Raises InvalidRequestError for one it cannot render."""

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str: ...


@dataclass(frozen=True, slots=True)
class _TokenizedPrompt:
    token_ids: tuple[int, ...]
    text: str
    """What `echo` shows; empty unless it was asked for."""


class Generation:
    """The events of one `GenerateRequest`, as an async iterator. The choices of several streams are interleaved."""

    def __init__(self, choices: list[Choice], prompts: Sequence[_TokenizedPrompt], num_choices_each: int) -> None:
        self._choices = choices
        self._num_choices_each = num_choices_each
        self._num_open = len(choices)
        self._pending: list[GenerationEvent] = [
            TextDelta(choice.index, prompts[choice.index // num_choices_each].text, (), 0)
            for choice in choices
            if prompts[choice.index // num_choices_each].text
        ]
        self._next = 0
        self._finished = False
        self._merged: asyncio.Queue[list[GenerationEvent] | Exception] = asyncio.Queue(maxsize=1)
        self._pumps: list[asyncio.Task[None]] = []
        self.num_prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)

    def __aiter__(self) -> AsyncIterator[GenerationEvent]:
        return self

    async def __anext__(self) -> GenerationEvent:
        """Raises EngineError when the engine fails, ShuttingDownError when `abort` was called."""
        while self._next == len(self._pending):
            if self._finished:
                raise StopAsyncIteration
            if self._num_open == 0:
                self._finished = True
                self._pending, self._next = [Finished(self._usage())], 0
            else:
                self._pending, self._next = await self._receive(), 0
        event = self._pending[self._next]
        self._next += 1
        if isinstance(event, ChoiceFinished):
            self._num_open -= 1
        return event

    def abort(self) -> None:
        """Ends all choices from outside: whoever iterates gets a ShuttingDownError."""
        for choice in self._choices:
            choice.abort()

    async def close(self) -> None:
        """Stops listening. The streams themselves are left by whoever opened them."""
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    async def _receive(self) -> list[GenerationEvent]:
        if len(self._choices) == 1:
            return await self._choices[0].receive()
        if not self._pumps:
            self._pumps = [asyncio.create_task(self._pump(choice)) for choice in self._choices]
        received = await self._merged.get()
        if isinstance(received, Exception):
            raise received
        return received

    async def _pump(self, choice: Choice) -> None:
        """Moves events of one choice to the common queue, whose one place makes a slow client slow down all."""
        try:
            while not choice.finished:
                await self._merged.put(await choice.receive())
        except Exception as error:  # noqa: BLE001 - it is raised again by whoever iterates
            await self._merged.put(error)

    def _usage(self) -> Usage:
        # Later choices of a prompt find what the first one has computed; that is no saving for the client to see.
        firsts = self._choices[:: self._num_choices_each]
        return Usage(
            num_prompt_tokens=self.num_prompt_tokens,
            num_output_tokens=sum(choice.num_output_tokens for choice in self._choices),
            num_cached_tokens=sum(choice.num_cached_tokens for choice in firsts),
            work_class=self._choices[0].work_class,
            queue_ns=self._choices[0].queue_ns,
            num_preemptions=sum(choice.num_preemptions for choice in self._choices),
        )


class GenerationService:
    """Runs generations for all dialects. Text work happens in threads, never on the event loop or the engine's."""

    def __init__(
        self,
        client: EngineClient,
        tokenizer: Tokenizer,
        chat_template: ChatRenderer | None,
        metrics: ServerMetrics,
        *,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._client = client
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._metrics = metrics
        self._clock_ns = clock_ns
        self._workers = ThreadPoolExecutor(_NUM_TEXT_WORKERS, thread_name_prefix="agentserve-text")
        self._running: set[Generation] = set()

    def close(self) -> None:
        """Waits for text work that is under way."""
        self._workers.shutdown(wait=True, cancel_futures=True)

    def abort_all(self) -> None:
        """Ends every generation; each client is told that the server is shutting down."""
        for generation in self._running:
            generation.abort()

    @asynccontextmanager
    async def generate(
        self, request: GenerateRequest, *, request_id: str, log_id: str | None = None
    ) -> AsyncIterator[Generation]:
        """Starts a generation; leaving the context before its end cancels all of its choices.

        Args:
            request: what to generate.
            request_id: unique; the engine's requests are named after it.
            log_id: the id that the client knows, for the log.

        Raises InvalidRequestError, ContextLengthExceededError, QueueFullError or EngineError before anything is
        yielded; then nothing is left running.
        """
        observer = RequestObserver(
            self._metrics,
            log_id or request_id,
            request.identity.session_id,
            arrival_ns=self._clock_ns(),
            clock_ns=self._clock_ns,
        )
        self._check_tokens(request)
        work = [self._run(self._tokenize, prompt, request.echo) for prompt in request.prompts]
        prompts = await asyncio.gather(*work)
        observer.num_prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        async with AsyncExitStack() as stack:
            choices = await self._submit(request, request_id, prompts, observer, stack)
            generation = Generation(choices, prompts, request.num_choices)
            self._running.add(generation)
            try:
                yield generation
            finally:
                self._running.discard(generation)
                await generation.close()
                observer.close(len(choices))

    async def _submit(
        self,
        request: GenerateRequest,
        request_id: str,
        prompts: Sequence[_TokenizedPrompt],
        observer: RequestObserver,
        stack: AsyncExitStack,
    ) -> list[Choice]:
        seed = secrets.randbits(63) if request.sampling.seed is None else request.sampling.seed
        jobs: list[tuple[_TokenizedPrompt, SamplingParams]] = []
        for prompt in prompts:
            params = [
                self._sampling(request, len(prompt.token_ids), derive_seed(seed, index))
                for index in range(request.num_choices)
            ]
            # All of them are checked before the first one is submitted.
            self._client.check(len(prompt.token_ids), params[0], param=request.prompt_param)
            jobs.extend((prompt, sampling) for sampling in params)
        choices = []
        for index, (prompt, sampling) in enumerate(jobs):
            stream = self._client.generate(
                prompt.token_ids,
                sampling,
                request_id=f"{request_id}-{index}",
                agent_id=request.identity.agent_id,
                session_id=request.identity.session_id,
                priority=request.priority,
                cache_salt=request.cache_salt,
                param=request.prompt_param,
            )
            await stack.enter_async_context(stream)
            choices.append(
                Choice(
                    index,
                    stream,
                    tokenizer=self._tokenizer,
                    prompt_token_ids=prompt.token_ids,
                    sampling=sampling,
                    stop=request.sampling.stop,
                    observer=observer,
                )
            )
        return choices

    async def _run(self, function: Callable[..., _TokenizedPrompt], *args: Any) -> _TokenizedPrompt:
        return await asyncio.get_running_loop().run_in_executor(self._workers, function, *args)

    def _tokenize(self, prompt: Prompt, echo: bool) -> _TokenizedPrompt:
        """Runs in a worker thread."""
        if isinstance(prompt, ChatPrompt):
            if self._chat_template is None:
                raise InvalidRequestError("This model has no chat template; use /v1/completions.", param="messages")
            text = self._chat_template.render(prompt.messages, template_kwargs=prompt.template_kwargs)
            # The template writes the special tokens itself.
            return _TokenizedPrompt(tuple(self._tokenizer.encode(text, add_special_tokens=False)), "")
        if isinstance(prompt, TextPrompt):
            token_ids = tuple(self._tokenizer.encode(prompt.text, add_special_tokens=True))
            return _TokenizedPrompt(token_ids, prompt.text if echo else "")
        return _TokenizedPrompt(prompt.token_ids, self._tokenizer.decode(prompt.token_ids) if echo else "")

    def _check_tokens(self, request: GenerateRequest) -> None:
        """Token ids that a client sends must be in the vocabulary."""
        limit = self._tokenizer.vocab_size
        groups: list[tuple[str, Sequence[int]]] = [
            ("stop_token_ids", request.sampling.stop_token_ids),
            ("logit_bias", [token for token, _ in request.sampling.logit_bias]),
        ]
        for prompt in request.prompts:
            # One that is too long is refused for that, without a look at each of its tokens.
            if isinstance(prompt, TokenPrompt) and len(prompt.token_ids) < self._client.max_model_len:
                groups.append((request.prompt_param, prompt.token_ids))
        for param, token_ids in groups:
            for token in token_ids:
                if not 0 <= token < limit:
                    raise InvalidRequestError(
                        f"{param}: token id {token} is not in the vocabulary (0 to {limit - 1})", param=param
                    )

    def _sampling(self, request: GenerateRequest, num_prompt_tokens: int, seed: int) -> SamplingParams:
        wanted = request.sampling
        max_tokens = wanted.max_tokens
        if max_tokens is None:
            # A prompt that fills the window has no room at all; `EngineClient.check` says so.
            room = max(1, self._client.max_model_len - num_prompt_tokens)
            max_tokens = room if wanted.default_max_tokens is None else min(room, wanted.default_max_tokens)
        eos = () if wanted.ignore_eos else tuple(self._tokenizer.eos_token_ids)
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=wanted.temperature,
            top_p=wanted.top_p,
            top_k=wanted.top_k,
            min_p=wanted.min_p,
            presence_penalty=wanted.presence_penalty,
            frequency_penalty=wanted.frequency_penalty,
            repetition_penalty=wanted.repetition_penalty,
            seed=seed,
            stop_token_ids=tuple(dict.fromkeys((*eos, *wanted.stop_token_ids))),
            min_tokens=wanted.min_tokens,
            logprobs=wanted.logprobs,
            logit_bias=wanted.logit_bias,
        )


def derive_seed(seed: int, index: int) -> int:
    """The seed of choice `index`, from 0 to 2**63 - 1. Choice 0 has the request's own seed, as if it were alone."""
    if index == 0:
        return seed % 2**63
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % 2**63
