"""The bodies of `/v1/chat/completions` and `/v1/completions` as far as they are understood.

Types are strict: `"0.7"` is no temperature. Fields that are not named here are ignored, because clients send many that
matter only elsewhere (`store`, `service_tier`). Fields that would change the *meaning* of the answer and cannot be
honoured are named, so that `refuse_unsupported` can say so instead of answering something else.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from agentserve.server import openapi_shapes as shapes
from agentserve.server.errors import UnsupportedParameterError
from agentserve.server.openapi_shapes import described, limits, refused

MAX_STOP_STRINGS = 16
MAX_CHOICES = 128
_INT64 = 2**63


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def as_int(value: Any) -> Any:
    """JSON knows no integers but numbers without a fraction: some languages write them all as 5.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Int = Annotated[int, BeforeValidator(as_int)]
StopString = Annotated[str, Field(min_length=1, max_length=1024)]
StopStrings = Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS), BeforeValidator(_as_list)]
Seed = Annotated[int, Field(ge=-_INT64, lt=_INT64), BeforeValidator(as_int)]
Priority = Annotated[int, Field(ge=-(2**31), lt=2**31), BeforeValidator(as_int)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class CommonBody(BaseModel):
    """What both routes share."""

    model_config = ConfigDict(strict=True, extra="ignore")

    model: str | None = None
    max_tokens: Annotated[Int | None, limits(least=1)] = None
    temperature: Annotated[float | None, limits(least=0, most=100)] = None
    top_p: Annotated[float | None, limits(above=0, most=1)] = None
    top_k: Annotated[Int | None, limits(least=-1)] = None
    min_p: Annotated[float | None, limits(least=0, most=1)] = None
    presence_penalty: Annotated[float | None, limits(least=-2, most=2)] = None
    frequency_penalty: Annotated[float | None, limits(least=-2, most=2)] = None
    repetition_penalty: Annotated[float | None, limits(above=0, most=100)] = None
    seed: Seed | None = None
    stop: StopStrings | None = None
    stop_token_ids: Annotated[list[Int] | None, described(shapes.TOKEN_IDS)] = None
    min_tokens: Annotated[Int | None, limits(least=0)] = None
    ignore_eos: bool | None = None
    logit_bias: Annotated[dict[str, float] | None, described(shapes.LOGIT_BIAS)] = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), BeforeValidator(as_int)] | None = None
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

    # The form of the answer, as different servers' clients ask for it; `tool_fields.parse_constraints` reads them.
    response_format: Annotated[Any, described(shapes.RESPONSE_FORMAT)] = None
    guided_json: Annotated[Any, described(shapes.JSON_SCHEMA)] = None
    guided_regex: Annotated[Any, described(shapes.REGEX)] = None
    guided_choice: Annotated[Any, described(shapes.CHOICES)] = None
    guided_grammar: Annotated[Any, described(shapes.GRAMMAR)] = None
    structured_outputs: Annotated[Any, described(shapes.STRUCTURED_OUTPUTS)] = None
    json_schema: Annotated[Any, described(shapes.JSON_SCHEMA)] = None

    return_progress: bool | None = None
    """Whether a stream tells how much of the prompt has been read."""

    # Understood, in order to be refused.
    best_of: Annotated[Int | None, refused()] = None
    grammar: Annotated[Any, refused()] = None


class ChatMessage(BaseModel):
    """One message. Its content is read by `openai_chat`, which can name the part at fault."""

    model_config = ConfigDict(strict=True, extra="ignore")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Any = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: Any = None
    """The same under the name that other servers use."""


class ChatBody(CommonBody):
    messages: Annotated[list[ChatMessage], Field(min_length=1), WithJsonSchema(shapes.CHAT_MESSAGES)]
    max_completion_tokens: Annotated[Int | None, limits(least=1)] = None
    chat_template_kwargs: dict[str, Any] | None = None
    enable_thinking: bool | None = None
    reasoning_effort: str | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), BeforeValidator(as_int)] | None = None

    tools: Annotated[list[Any] | None, described(shapes.CHAT_TOOLS)] = None
    tool_choice: Annotated[Any, described(shapes.CHAT_TOOL_CHOICE)] = None
    parallel_tool_calls: bool | None = None

    functions: Annotated[list[Any] | None, described(shapes.NO_FUNCTIONS)] = None
    modalities: Annotated[list[str] | None, described(shapes.ONLY_TEXT)] = None
    audio: Annotated[Any, refused()] = None


class CompletionBody(CommonBody):
    prompt: Annotated[Any, WithJsonSchema(shapes.PROMPT)]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20), BeforeValidator(as_int)] | None = None

    suffix: Annotated[str | None, described(shapes.NO_SUFFIX)] = None


def refuse_unsupported(body: ChatBody | CompletionBody) -> None:
    """Raises UnsupportedParameterError for what must not be ignored in silence."""
    if body.best_of is not None and body.best_of != (body.n or 1):
        _refuse("best_of", "only as many choices as are returned (n) are generated")
    if body.grammar is not None:
        _refuse("grammar", "GBNF is not supported; use response_format, guided_regex or guided_grammar (Lark)")
    if isinstance(body, ChatBody):
        if body.functions:
            _refuse("functions", "this older form of tools is not supported; use tools")
        if body.audio is not None or any(kind != "text" for kind in body.modalities or ()):
            _refuse("modalities", "only text is supported")
    elif body.suffix:
        _refuse("suffix", "filling in the middle is not supported")


def _refuse(param: str, reason: str) -> None:
    raise UnsupportedParameterError(f"{param}: {reason}", param=param)
