"""The body of `/v1/messages` as far as it is understood. What is not named here is ignored: betas come and go."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from agentserve.server import openapi_shapes as shapes
from agentserve.server.openai_schema import MAX_STOP_STRINGS, Int, StopString
from agentserve.server.openapi_shapes import described, limits


class AnthropicMessage(BaseModel):
    """One message. Its content is read by `anthropic_messages`, which can name the block at fault."""

    model_config = ConfigDict(strict=True, extra="ignore")

    role: Literal["user", "assistant", "system"]
    """`system` between other messages is what one widely used agent sends."""
    content: Any


class OutputConfig(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    effort: str | None = None
    format: Annotated[Any, described(shapes.OUTPUT_FORMAT)] = None


class CountTokensBody(BaseModel):
    """What decides what the prompt is."""

    model_config = ConfigDict(strict=True, extra="ignore")

    model: str | None = None
    messages: Annotated[list[AnthropicMessage], Field(min_length=1), WithJsonSchema(shapes.ANTHROPIC_MESSAGES)]
    system: Annotated[Any, described(shapes.SYSTEM)] = None
    tools: Annotated[list[Any] | None, described(shapes.ANTHROPIC_TOOLS)] = None
    tool_choice: Annotated[Any, described(shapes.ANTHROPIC_TOOL_CHOICE)] = None
    thinking: Annotated[dict[str, Any] | None, described(shapes.THINKING)] = None
    output_config: OutputConfig | None = None
    output_format: Annotated[Any, described(shapes.OUTPUT_FORMAT)] = None
    """The older place of `output_config.format`."""

    metadata: Any = None
    """A hint about who asks; `identity.identify` reads it and tolerates any type."""


class MessagesBody(CountTokensBody):
    max_tokens: Annotated[Int | None, limits(least=1)] = None
    """Required by the documented API; here the rest of the window if it is missing."""
    stream: bool | None = None
    stop_sequences: Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)] | None = None
    temperature: Annotated[float | None, limits(least=0, most=100)] = None
    top_p: Annotated[float | None, limits(above=0, most=1)] = None
    top_k: Annotated[Int | None, limits(least=-1)] = None
