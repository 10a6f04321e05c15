"""The bodies of `/v1/chat/completions` and `/v1/completions` as far as they are understood.

Types are strict: `"0.7"` is no temperature. Fields that are not named here are ignored, because clients send many that
matter only elsewhere (`store`, `metadata`, `service_tier`). Fields that would change the *meaning* of the answer and
cannot be honoured are named, so that `refuse_unsupported` can say so instead of answering something else.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from agentserve.errors import InvalidRequestError
from agentserve.server.errors import UnsupportedParameterError

MAX_STOP_STRINGS = 16
MAX_CHOICES = 128
_INT64 = 2**63


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


StopString = Annotated[str, Field(min_length=1, max_length=1024)]
StopStrings = Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS), BeforeValidator(_as_list)]
Seed = Annotated[int, Field(ge=-_INT64, lt=_INT64)]
Priority = Annotated[int, Field(ge=-(2**31), lt=2**31)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class CommonBody(BaseModel):
    """What both routes share."""

    model_config = ConfigDict(strict=True, extra="ignore")

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: Seed | None = None
    stop: StopStrings | None = None
    stop_token_ids: list[int] | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[str, float] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Priority | None = None
    cache_salt: str | None = None

    # Hints about who asks; `identity.identify` reads them and tolerates any type.
    user: Any = None
    prompt_cache_key: Any = None
    session_id: Any = None
    agent_id: Any = None
    conversation: Any = None
    metadata: Any = None

    # Understood, in order to be refused.
    best_of: int | None = None
    response_format: dict[str, Any] | None = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    structured_outputs: Any = None
    grammar: Any = None
    json_schema: Any = None


class ChatMessage(BaseModel):
    """One message. Its content is read by `openai_chat`, which can name the part at fault."""

    model_config = ConfigDict(strict=True, extra="ignore")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Any = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class ChatBody(CommonBody):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    modalities: list[str] | None = None
    audio: Any = None


class CompletionBody(CommonBody):
    prompt: Any = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    suffix: str | None = None


_CONSTRAINTS = (
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "structured_outputs",
    "grammar",
    "json_schema",
)


def refuse_unsupported(body: ChatBody | CompletionBody) -> None:
    """Raises UnsupportedParameterError for what must not be ignored in silence."""
    if body.best_of is not None and body.best_of != (body.n or 1):
        _refuse("best_of", "only as many choices as are returned (n) are generated")
    if body.response_format is not None and body.response_format.get("type") != "text":
        _refuse("response_format", 'structured output is not supported; only {"type": "text"} is')
    for name in _CONSTRAINTS:
        if getattr(body, name) is not None:
            _refuse(name, "structured output is not supported")
    if isinstance(body, ChatBody):
        _refuse_unsupported_chat(body)
    elif body.suffix:
        _refuse("suffix", "filling in the middle is not supported")


def _refuse_unsupported_chat(body: ChatBody) -> None:
    if body.tools and body.tool_choice != "none":
        _refuse("tools", 'tool calls are not supported; send tool_choice "none" or leave the tools out')
    if body.functions:
        _refuse("functions", "tool calls are not supported")
    if not body.tools and body.tool_choice not in (None, "none", "auto"):
        raise InvalidRequestError("tool_choice: there are no tools to choose from", param="tool_choice")
    if body.audio is not None or any(kind != "text" for kind in body.modalities or ()):
        _refuse("modalities", "only text is supported")


def _refuse(param: str, reason: str) -> None:
    raise UnsupportedParameterError(f"{param}: {reason}", param=param)
