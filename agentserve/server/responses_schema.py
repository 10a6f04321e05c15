"""The body of `/v1/responses` as far as it is understood."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from agentserve.server import openapi_shapes as shapes
from agentserve.server.errors import UnsupportedParameterError
from agentserve.server.openai_schema import Int, as_int
from agentserve.server.openapi_shapes import described, limits, refused


class Reasoning(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    effort: str | None = None
    summary: Any = None


class TextOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    format: Annotated[Any, described(shapes.TEXT_FORMAT)] = None
    verbosity: Any = None


class InputTokensBody(BaseModel):
    """What decides what the prompt is."""

    model_config = ConfigDict(strict=True, extra="ignore", json_schema_extra={"required": ["input"]})

    model: str | None = None
    input: Annotated[Any, WithJsonSchema(shapes.RESPONSES_INPUT)] = None
    """May be missing where there are instructions."""
    instructions: str | None = None
    tools: Annotated[list[Any] | None, described(shapes.RESPONSES_TOOLS)] = None
    tool_choice: Annotated[Any, described(shapes.RESPONSES_TOOL_CHOICE)] = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: TextOptions | None = None
    truncation: Any = None

    # Understood, in order to be refused.
    previous_response_id: Annotated[Any, refused()] = None
    conversation: Annotated[Any, refused()] = None
    prompt: Annotated[Any, refused()] = None


class ResponsesBody(InputTokensBody):
    stream: bool | None = None
    include: list[Any] | None = None
    max_output_tokens: Annotated[Int | None, limits(least=1)] = None
    temperature: Annotated[float | None, limits(least=0, most=100)] = None
    top_p: Annotated[float | None, limits(above=0, most=1)] = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), BeforeValidator(as_int)] | None = None
    background: Annotated[bool | None, described(shapes.NOT_IN_BACKGROUND)] = None
    metadata: Any = None
    store: Any = None

    # Hints about who asks; `identity.identify` reads them and tolerates any type.
    user: Any = None
    prompt_cache_key: Any = None


def refuse_state(body: InputTokensBody) -> None:
    """Raises UnsupportedParameterError for what only a server that keeps answers could honour."""
    for name in ("previous_response_id", "conversation", "prompt"):
        if getattr(body, name) is not None:
            raise UnsupportedParameterError(
                f"{name}: no responses, conversations or prompts are stored here; send the whole input", param=name
            )
    if isinstance(body, ResponsesBody) and body.background:
        raise UnsupportedParameterError("background: no responses are stored here; use stream", param="background")
