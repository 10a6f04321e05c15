"""A daemon for tests with a real `EngineClient` and a driver that plays a script instead of running a model."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from agentserve.core.agents.policy import Policy
from agentserve.core.batch import TokenSample
from agentserve.core.events import (
    Command,
    EndRequest,
    EngineEvent,
    NoteTurn,
    PrefillProgress,
    RequestAdmitted,
    RequestFinished,
    RequestStats,
    Speculate,
    SubmitRequest,
    TokenGenerated,
)
from agentserve.core.request import FinishReason
from agentserve.core.stats import EngineStats
from agentserve.errors import EngineError
from agentserve.runtime.client import EngineClient
from agentserve.server.answer_format import AnswerSupport
from agentserve.server.app import ServerOptions, ServerState
from agentserve.server.caching import CacheOptions
from agentserve.text.grammar.compiler import GrammarCompiler
from agentserve.text.grammar.masks import GrammarMasks
from agentserve.text.output import OutputFormat
from agentserve.text.reasoning import THINK
from agentserve.text.tools.formats import TOOL_FORMATS
from tests.server.daemon import EOS, ByteTokenizer, Daemon, PlainTemplate, running

MAX_MODEL_LEN = 200
LOGPROB = math.log(0.5)


@dataclass
class Run:
    """One request in the hands of a script."""

    submitted: SubmitRequest
    emit: Callable[[EngineEvent], None]
    num_cached_tokens: int = 0
    num_output_tokens: int = 0

    @property
    def id(self) -> str:
        return self.submitted.request_id

    def admit(self) -> None:
        num_prompt_tokens = len(self.submitted.prompt_token_ids)
        self.emit(RequestAdmitted(self.id, 2_000_000, num_prompt_tokens, self.num_cached_tokens))

    def progress(self, num_computed_tokens: int) -> None:
        self.emit(PrefillProgress(self.id, 3_000_000, num_computed_tokens, len(self.submitted.prompt_token_ids)))

    def token(self, token_id: int) -> None:
        top_count = self.submitted.sampling.logprobs
        top = tuple((token_id + i, LOGPROB - i) for i in range(top_count or 0))
        sample = TokenSample(self.id, token_id, None if top_count is None else LOGPROB, top)
        self.emit(TokenGenerated(self.id, 4_000_000, sample, self.num_output_tokens))
        self.num_output_tokens += 1

    def finish(self, reason: FinishReason, error: str | None = None) -> None:
        stats = RequestStats(
            num_prompt_tokens=len(self.submitted.prompt_token_ids),
            num_cached_tokens=self.num_cached_tokens,
            num_output_tokens=self.num_output_tokens,
            num_preemptions=0,
            first_work_class="cold_prefill",
            arrival_ns=1_000_000,
            first_scheduled_ns=2_000_000,
            first_token_ns=4_000_000 if self.num_output_tokens else None,
            last_token_ns=5_000_000 if self.num_output_tokens else None,
        )
        self.emit(RequestFinished(self.id, 5_000_000, reason, stats, error))

    async def reply(self, text: str | bytes, *, then: Sequence[int] = (EOS,)) -> None:
        """Generates `text` byte by byte, one a turn of the loop, then the tokens `then`; ends as an engine would."""
        data = text.encode() if isinstance(text, str) else text
        sampling = self.submitted.sampling
        for token in [*data, *then]:
            await asyncio.sleep(0)
            self.token(token)
            if token in sampling.stop_token_ids and self.num_output_tokens > sampling.min_tokens:
                return self.finish(FinishReason.STOP)
            if self.num_output_tokens == sampling.max_tokens:
                return self.finish(FinishReason.LENGTH)
        raise AssertionError("the script ends before the request does")


Script = Callable[[Run], Awaitable[None]]


def replying(text: str | bytes, *, num_cached_tokens: int = 0) -> Script:
    async def script(run: Run) -> None:
        run.num_cached_tokens = num_cached_tokens
        run.admit()
        await run.reply(text)

    return script


class ScriptedDriver:
    """Plays a script for each request, on the event loop. An `EndRequest` interrupts it at once."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.client: EngineClient | None = None
        self.submitted: list[SubmitRequest] = []
        self.ended: list[tuple[str, FinishReason]] = []
        self.notes: list[NoteTurn] = []
        self.speculated: asyncio.Queue[Speculate] = asyncio.Queue()
        self.idle = asyncio.Event()
        self.idle.set()
        self.failure: str | None = None
        self.engine_stats = EngineStats(num_blocks=10, num_free_blocks=10)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._runs: dict[str, Run] = {}

    @property
    def num_running(self) -> int:
        return len(self._tasks)

    def post(self, command: Command) -> None:
        if self.failure is not None:
            raise EngineError(self.failure)
        if isinstance(command, SubmitRequest):
            self.submitted.append(command)
            run = Run(command, self._emit)
            self._runs[command.request_id] = run
            task: asyncio.Task[None] = asyncio.ensure_future(self._play(run))
            self._tasks[run.id] = task
            self.idle.clear()
            # Not in the coroutine: one that is cancelled before its first step never runs.
            task.add_done_callback(lambda _: self._forget(run.id))
        elif isinstance(command, NoteTurn):
            self.notes.append(command)
        elif isinstance(command, Speculate):
            self.speculated.put_nowait(command)
        elif isinstance(command, EndRequest) and command.request_id in self._tasks:
            self.ended.append((command.request_id, command.reason))
            self._tasks[command.request_id].cancel()
            # Later, as it would come from the engine thread.
            asyncio.get_running_loop().call_soon(self._runs[command.request_id].finish, command.reason)

    def stats(self) -> EngineStats:
        return self.engine_stats

    def ask(self, question: Any) -> Any:
        raise EngineError("there is no engine to ask")

    def die(self, message: str) -> None:
        assert self.client is not None
        self.failure = message
        self.client.fail_all(message)

    async def close(self) -> None:
        for task in list(self._tasks.values()):
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _play(self, run: Run) -> None:
        await self.script(run)

    def _forget(self, request_id: str) -> None:
        del self._tasks[request_id]
        if not self._tasks:
            self.idle.set()

    def _emit(self, event: EngineEvent) -> None:
        assert self.client is not None
        self.client.dispatch([event])


class ScriptedDaemon(Daemon):
    """A server whose engine plays a script."""

    def __init__(self, state: ServerState, driver: ScriptedDriver) -> None:
        super().__init__(state)
        self.driver = driver


@asynccontextmanager
async def serve(
    script: Script | None = None,
    *,
    max_queued_requests: int = 64,
    max_model_len: int = MAX_MODEL_LEN,
    safety: Sequence[Policy] = (),
    cache: CacheOptions | None = None,
    **options: Any,
) -> AsyncIterator[ScriptedDaemon]:
    """Starts a server on a free port whose engine plays `script` for each request."""
    driver = ScriptedDriver(script or replying("Hello"))
    masks = GrammarMasks()
    client = EngineClient(driver, max_model_len=max_model_len, max_queued_requests=max_queued_requests, masks=masks)
    driver.client = client
    merged: dict[str, Any] = {"model_name": "test-model", "executor": "scripted", "port": 0} | options
    tokenizer = ByteTokenizer()
    output = OutputFormat(TOOL_FORMATS["hermes"], THINK, tokenizer)
    grammars = GrammarCompiler(tokenizer, output)
    state = ServerState.create(
        ServerOptions(**merged),
        client,
        tokenizer,
        PlainTemplate(),
        support=AnswerSupport(output, grammars),
        safety=safety,
        cache=cache,
        engine_failure=lambda: driver.failure,
    )
    daemon = ScriptedDaemon(state, driver)
    try:
        async with running(daemon):
            yield daemon
    finally:
        await driver.close()
        masks.shutdown()
        grammars.close()
