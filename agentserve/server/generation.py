"""From a `GenerateRequest` to `GenerationEvent`s: render, tokenize, check, submit, and merge the choices."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

from agentserve.core.agents.policy import Policy
from agentserve.core.request import SamplingParams
from agentserve.errors import InvalidGrammarError, InvalidRequestError
from agentserve.runtime.client import EngineClient
from agentserve.server.answer_format import AnswerParser, AnswerSupport
from agentserve.server.caching import CacheOptions, Caching
from agentserve.server.choice import Choice, ChoiceOptions
from agentserve.server.errors import UnsupportedParameterError
from agentserve.server.metrics import ServerMetrics
from agentserve.server.next_prompt import NextPromptTeller
from agentserve.server.observe import RequestObserver
from agentserve.server.prompt import ChatRenderer, PromptBuilder, TokenizedPrompt
from agentserve.server.recorder import AnswerRecorder
from agentserve.server.sampling import derive_seed, sampling_params
from agentserve.server.tool_guard import ToolGuard
from agentserve.server.turn_end import tool_behind
from agentserve.server.types import (
    ChatPrompt,
    ChoiceFinished,
    Delta,
    Finished,
    GenerateRequest,
    GenerationEvent,
    Prompt,
    TokenPrompt,
    Usage,
)
from agentserve.text.detokenizer import IncrementalDetokenizer
from agentserve.text.grammar.source import Constraint
from agentserve.text.tokenizer import Tokenizer
from agentserve.text.tools.parser import PlainParser
from agentserve.text.tools.spec import TextPiece

if TYPE_CHECKING:
    from agentserve.text.grammar.compiler import CompiledGrammar

_NUM_TEXT_WORKERS = 2


class Generation:
    """The events of one `GenerateRequest`, as an async iterator. The choices of several streams are interleaved."""

    def __init__(
        self,
        choices: list[Choice],
        prompts: Sequence[TokenizedPrompt],
        num_choices_each: int,
        *,
        echo: bool,
        on_end: Callable[[], None],
    ) -> None:
        """`on_end` is called once all choices have ended, before anybody sees the end of the last one."""
        self._choices = choices
        self._num_choices_each = num_choices_each
        self._num_open = len(choices)
        self._pending: list[GenerationEvent] = [
            Delta(choice.index, (TextPiece(prompts[choice.index // num_choices_each].text),), (), 0)
            for choice in choices
            if echo and prompts[choice.index // num_choices_each].text
        ]
        self._next = 0
        self._finished = False
        self._on_end = on_end
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
            if self._num_open == 0:
                self._on_end()
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
            num_reasoning_tokens=sum(choice.num_reasoning_tokens for choice in self._choices),
            work_class=self._choices[0].work_class,
            queue_ns=self._choices[0].queue_ns,
            num_preemptions=sum(choice.num_preemptions for choice in self._choices),
        )


_DEFAULTS = CacheOptions()


class GenerationService:
    """Runs generations for all dialects. Text work happens in threads, never on the event loop or the engine's."""

    def __init__(
        self,
        client: EngineClient,
        tokenizer: Tokenizer,
        chat_template: ChatRenderer | None,
        metrics: ServerMetrics,
        *,
        support: AnswerSupport | None = None,
        options: CacheOptions = _DEFAULTS,
        safety: Sequence[Policy] = (),
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._client = client
        self._tokenizer = tokenizer
        self._support = support or AnswerSupport()
        self._guard = ToolGuard(safety, metrics)
        form = self._support.format
        self.caching = Caching(options, metrics, partial(tokenizer.decode, skip_special_tokens=False))
        self._prompts = PromptBuilder(
            tokenizer,
            chat_template,
            history=self.caching.history,
            stabilizer=self.caching.stabilizer,
            max_model_len=client.max_model_len,
            tool_format=None if form is None else form.tool_format_name,
        )
        self._metrics = metrics
        self._clock_ns = clock_ns
        self._workers = ThreadPoolExecutor(_NUM_TEXT_WORKERS, thread_name_prefix="agentserve-text")
        self._running: set[Generation] = set()
        self._teller = NextPromptTeller(client, self._prompts, self._workers) if options.speculates else None

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

        Raises InvalidRequestError, ForbiddenToolError, ContextLengthExceededError, QueueFullError or EngineError before
        anything is yielded; then nothing is left running.
        """
        request = self._guard.screen(request)
        observer = RequestObserver(
            self._metrics,
            log_id or request_id,
            request.identity.session_id,
            arrival_ns=self._clock_ns(),
            clock_ns=self._clock_ns,
        )
        self._check_tokens(request)
        prompts = await self._tokenize(request)
        grammars = [await self._compile(request, *pair) for pair in zip(request.prompts, prompts, strict=True)]
        observer.num_prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        async with AsyncExitStack() as stack:
            trace = self.caching.begin(prompts[0], request, observer.request_id)
            stack.callback(trace.close)
            choices = await self._submit(request, request_id, prompts, grammars, observer=observer, stack=stack)
            generation = Generation(
                choices,
                prompts,
                request.num_choices,
                echo=request.echo,
                on_end=partial(self._turn_ended, request, choices),
            )
            self._running.add(generation)
            try:
                yield generation
            finally:
                self._running.discard(generation)
                await generation.close()
                self.caching.end(trace, choices[0].recorder, observer)
                observer.close(len(choices))

    async def tokenize(self, request: GenerateRequest) -> list[TokenizedPrompt]:
        """The prompts as the engine would get them. Raises InvalidRequestError or ForbiddenToolError."""
        return await self._tokenize(self._guard.screen(request))

    async def _tokenize(self, request: GenerateRequest) -> list[TokenizedPrompt]:
        loop = asyncio.get_running_loop()
        build = partial(self._prompts.build, identity=request.identity, cache_salt=request.cache_salt)
        work = [
            loop.run_in_executor(self._workers, partial(build, prompt, echo=request.echo)) for prompt in request.prompts
        ]
        return await asyncio.gather(*work)

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text. Raises InvalidRequestError for one that is no Unicode."""
        work = partial(self._tokenizer.encode, text, add_special_tokens=add_special_tokens)
        return await asyncio.get_running_loop().run_in_executor(self._workers, work)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of tokens, special ones included. Raises InvalidRequestError for ids that no token has."""
        self._check_ids("tokens", token_ids)
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)

    async def _compile(
        self, request: GenerateRequest, prompt: Prompt, tokenized: TokenizedPrompt
    ) -> CompiledGrammar | None:
        """Raises InvalidRequestError for a form that cannot be enforced: unconstrained text is never the answer."""
        tools = prompt.tools if isinstance(prompt, ChatPrompt) else ()
        is_chat = isinstance(prompt, ChatPrompt) and self._support.format is not None
        constraint = Constraint(tools, request.tool_choice, request.response_format, may_reason=is_chat)
        if not constraint.is_constrained:
            return None
        if self._support.grammars is None:
            raise UnsupportedParameterError(
                "The form of an answer cannot be enforced here.", param=request.format_param
            )
        try:
            return await self._support.grammars.compile(constraint, tokenized.text if is_chat else "")
        except InvalidGrammarError as error:
            # A new one each time: whoever asks for the same grammar again is told the same.
            raise _in_words_of(request, error) from None

    async def _submit(
        self,
        request: GenerateRequest,
        request_id: str,
        prompts: Sequence[TokenizedPrompt],
        grammars: Sequence[CompiledGrammar | None],
        *,
        observer: RequestObserver,
        stack: AsyncExitStack,
    ) -> list[Choice]:
        seed = secrets.randbits(63) if request.sampling.seed is None else request.sampling.seed
        jobs: list[tuple[Prompt, TokenizedPrompt, CompiledGrammar | None, SamplingParams]] = []
        for prompt, tokenized, grammar in zip(request.prompts, prompts, grammars, strict=True):
            params = [
                sampling_params(
                    request.sampling,
                    num_prompt_tokens=len(tokenized.token_ids),
                    max_model_len=self._client.max_model_len,
                    eos_token_ids=self._tokenizer.eos_token_ids,
                    seed=derive_seed(seed, index),
                )
                for index in range(request.num_choices)
            ]
            # All of them are checked before the first one is submitted.
            self._client.check(len(tokenized.token_ids), params[0], param=request.prompt_param)
            jobs.extend((prompt, tokenized, grammar, sampling) for sampling in params)
        choices = []
        for index, (prompt, tokenized, grammar, sampling) in enumerate(jobs):
            stream = self._client.generate(
                tokenized.token_ids,
                sampling,
                request_id=f"{request_id}-{index}",
                agent_id=request.identity.agent_id,
                session_id=request.identity.session_id,
                program_id=request.identity.program_id,
                is_last_turn=request.identity.is_last_turn,
                distance=request.identity.distance,
                priority=request.priority,
                cache_salt=request.cache_salt,
                adapter=request.adapter,
                grammar=grammar,
                param=request.prompt_param,
            )
            await stack.enter_async_context(stream)
            parser, tokenizer = self._reading(request, prompt, tokenized)
            choices.append(
                Choice(
                    index,
                    stream,
                    tokenizer=self._tokenizer,
                    detokenizer=IncrementalDetokenizer(tokenizer, prompt_token_ids=tokenized.token_ids),
                    parser=parser,
                    options=self._choice_options(request, sampling),
                    observer=observer,
                    recorder=AnswerRecorder(tokenized, self.caching.history if self._prompts.keeps_answers else None),
                )
            )
        return choices

    def _reading(
        self, request: GenerateRequest, prompt: Prompt, tokenized: TokenizedPrompt
    ) -> tuple[AnswerParser, Tokenizer]:
        """The parser of one answer, and the tokenizer whose special tokens it does not see."""
        if self._support.format is None or not isinstance(prompt, ChatPrompt):
            return PlainParser(), self._tokenizer
        parser = self._support.format.parser(prompt.tools, request.tool_choice, tokenized.text)
        return parser, self._support.format.shown(self._tokenizer)

    def _turn_ended(self, request: GenerateRequest, choices: Sequence[Choice]) -> None:
        tool_name = tool_behind(request, choices)
        if tool_name is not None:
            self._client.note_turn(choices[-1].request_id, tool_name)
        if self._teller is not None:
            self._teller.answered(request, choices)

    def _choice_options(self, request: GenerateRequest, sampling: SamplingParams) -> ChoiceOptions:
        wanted = request.sampling
        limit = wanted.default_max_tokens if wanted.max_tokens is None else wanted.max_tokens
        return ChoiceOptions(
            sampling=sampling,
            stop=wanted.stop,
            one_call=not request.tool_choice.parallel,
            limit_is_window=limit is None or sampling.max_tokens < limit,
            refuse_call=None if self._guard.is_idle else partial(self._guard.refuse_call, request.identity),
        )

    def _check_tokens(self, request: GenerateRequest) -> None:
        """Token ids that a client sends must be in the vocabulary."""
        groups: list[tuple[str, Sequence[int]]] = [
            ("stop_token_ids", request.sampling.stop_token_ids),
            ("logit_bias", [token for token, _ in request.sampling.logit_bias]),
        ]
        for prompt in request.prompts:
            # One that is too long is refused for that, without a look at each of its tokens.
            if isinstance(prompt, TokenPrompt) and len(prompt.token_ids) < self._client.max_model_len:
                groups.append((request.prompt_param, prompt.token_ids))
        for param, token_ids in groups:
            self._check_ids(param, token_ids)

    def _check_ids(self, param: str, token_ids: Sequence[int]) -> None:
        limit = self._tokenizer.vocab_size
        for token in token_ids:
            if not 0 <= token < limit:
                raise InvalidRequestError(
                    f"{param}: token id {token} is not in the vocabulary (0 to {limit - 1})", param=param
                )


def _in_words_of(request: GenerateRequest, error: InvalidGrammarError) -> InvalidGrammarError:
    """The error with the field that the client has sent."""
    param = request.format_param if error.param == "response_format" else error.param
    return InvalidGrammarError(str(error).replace(error.param or "", param or "", 1), param=param)
