"""What the handlers share, and the options it is made from."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from aiohttp import web

from agentserve.core.agents.policy import Policy
from agentserve.errors import ConfigError, EngineError, ModelNotFoundError
from agentserve.runtime.client import EngineClient
from agentserve.server.answer_format import AnswerSupport
from agentserve.server.caching import CacheOptions
from agentserve.server.errors import ShuttingDownError
from agentserve.server.generation import GenerationService
from agentserve.server.metrics import ServerMetrics
from agentserve.server.prompt import ChatRenderer
from agentserve.server.security import is_loopback
from agentserve.server.tool_memo import ToolMemo
from agentserve.text.tokenizer import Tokenizer

CLAUDE_PREFIXES = ("claude", "anthropic")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """How the server behaves. Raises ConfigError for what cannot work or is not safe."""

    model_name: str
    executor: str
    """`cpu`, `cuda` or `simulated`, for `/health` and the header `x-agentserve-executor`."""
    dtype: str | None = None
    """Data type of weights and KV."""
    simulated: bool = False
    """Whether tokens and timing are made up."""
    device: str = ""
    """The device in words."""
    notes: tuple[str, ...] = ()
    """What the user must know, for `/health`: why timing is simulated and the like."""
    host: str = "127.0.0.1"
    port: int = 8177
    """0 takes a free one."""
    api_key: str | None = None
    insecure: bool = False
    """Allows an address beyond loopback without a key."""
    aliases: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    """LoRA adapters: model names of their own."""
    accept_any_model: bool = False
    claude_alias: bool = True
    """Whether every name that starts with `claude` means the served model."""
    uses_distances: bool = False
    """Whether the policy has a use for invocation distances."""
    max_num_seqs: int = 1
    """Requests that run at once."""
    max_body_bytes: int = 32 << 20
    sse_ping_interval_s: float = 5.0
    write_timeout_s: float = 300.0
    """How long a client may read nothing of its answer before it is cut off."""
    drain_timeout_s: float = 30.0
    """How long running requests may go on after the first signal."""
    train_context: int | None = None
    """The window that the model was trained for, in tokens."""
    num_parameters: int | None = None
    model_bytes: int | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    """When the model was loaded, Unix time in seconds."""

    def __post_init__(self) -> None:
        if self.max_body_bytes < 1 or not min(self.sse_ping_interval_s, self.write_timeout_s) > 0:
            raise ConfigError("the body limit, the ping interval and the write timeout must be positive")
        if not self.drain_timeout_s >= 0:
            raise ConfigError("the drain timeout must not be negative")
        taken = {self.model_name, *self.aliases} & set(self.adapters)
        if taken:
            raise ConfigError(f"{', '.join(sorted(taken))} names both an adapter and the model itself")
        if self.api_key is not None and not (self.api_key and self.api_key.isascii()):
            raise ConfigError("the API key must be ASCII and not empty")
        if self.api_key is None and not self.insecure and not is_loopback(self.host):
            raise ConfigError(
                f"{self.host} can be reached from other machines: set --api-key, or --insecure to serve anybody"
            )


@dataclass(slots=True, eq=False)
class ServerState:
    """The parts of one server. Lives on one event loop."""

    options: ServerOptions
    client: EngineClient
    metrics: ServerMetrics
    generation: GenerationService
    engine_failure: Callable[[], str | None]
    tool_memo: ToolMemo = field(default_factory=ToolMemo)
    is_draining: bool = False
    num_active: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while no request is being generated."""

    @classmethod
    def create(
        cls,
        options: ServerOptions,
        client: EngineClient,
        tokenizer: Tokenizer,
        chat_template: ChatRenderer | None,
        *,
        support: AnswerSupport | None = None,
        cache: CacheOptions | None = None,
        safety: Sequence[Policy] = (),
        engine_failure: Callable[[], str | None] = lambda: None,
    ) -> ServerState:
        """`chat_template` is None for a model without one; `support` says what is known of the form of its answers;
        `safety` are the policies that may refuse tool calls; `engine_failure` says why the engine died, if it did."""
        metrics = ServerMetrics(options.model_name, client.stats)
        generation = GenerationService(
            client,
            tokenizer,
            chat_template,
            metrics,
            support=support,
            options=cache or CacheOptions(),
            safety=safety,
        )
        state = cls(options, client, metrics, generation, engine_failure)
        metrics.watch_adapters(client.adapter_requests)
        metrics.watch_memo(state.tool_memo)
        state.idle.set()
        return state

    @property
    def model_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.options.model_name, *self.options.aliases, *self.options.adapters)))

    def adapter_of(self, name: str) -> str | None:
        """The LoRA adapter that a model name means, None for the model itself.

        A client that lists only names that start with `claude` sends them back like this.
        """
        plain = name.removeprefix("claude-") if self.options.claude_alias else name
        return next((adapter for adapter in (name, plain) if adapter in self.options.adapters), None)

    def resolve_model(self, name: str | None) -> str:
        """The name to answer with. Raises ModelNotFoundError that lists the known ones."""
        if name is None:
            return self.options.model_name
        if name in self.model_names or self.options.accept_any_model:
            return name
        # One widely used agent asks for models of its maker in the background, whatever it was told to use.
        if self.options.claude_alias and name.startswith(CLAUDE_PREFIXES):
            return name
        known = ", ".join(self.model_names)
        raise ModelNotFoundError(f"The model {name[:200]!r} does not exist here; known: {known}.", param="model")

    @contextmanager
    def track(self) -> Iterator[None]:
        """Counts a generation, so that a shutdown can wait for it. Raises what makes a new one impossible."""
        failure = self.engine_failure()
        if failure is not None:
            raise EngineError(failure)
        if self.is_draining:
            raise ShuttingDownError("The server is shutting down.")
        self.num_active += 1
        self.idle.clear()
        try:
            yield
        finally:
            self.num_active -= 1
            if self.num_active == 0:
                self.idle.set()


STATE = web.AppKey("state", ServerState)
REQUEST_ID = web.RequestKey("request_id", str)
