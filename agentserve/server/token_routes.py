"""`/tokenize`, `/detokenize` and `/props`, which tools know from llama.cpp's server and from vLLM."""

from __future__ import annotations

from typing import Annotated, Any

from aiohttp import web
from pydantic import BaseModel, ConfigDict, WithJsonSchema

from agentserve import __version__
from agentserve.server import openapi_shapes as shapes
from agentserve.server.body import read_json_object, validate
from agentserve.server.identity import identify
from agentserve.server.openai_chat import parse_chat_request
from agentserve.server.openai_schema import Int
from agentserve.server.state import STATE
from agentserve.server.tool_fields import text_field


class TokenizeBody(BaseModel):
    """`content` (llama.cpp) or `prompt` (vLLM), or a conversation as for `/v1/chat/completions`."""

    model_config = ConfigDict(
        strict=True,
        extra="ignore",
        json_schema_extra={"anyOf": [{"required": [name]} for name in ("content", "prompt", "messages")]},
    )

    model: str | None = None
    content: Annotated[str | None, WithJsonSchema({"type": "string"})] = None
    prompt: Annotated[str | None, WithJsonSchema({"type": "string"})] = None
    messages: Annotated[list[Any] | None, WithJsonSchema(shapes.CHAT_MESSAGES)] = None
    add_special: bool | None = None
    add_special_tokens: bool | None = None
    with_pieces: bool | None = None


class DetokenizeBody(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    model: str | None = None
    tokens: Annotated[list[Int], WithJsonSchema(shapes.TOKEN_IDS)]


async def tokenize(request: web.Request) -> web.Response:
    """Token ids of a text or a conversation, and the window that they must fit."""
    state = request.app[STATE]
    data = await read_json_object(request)
    body = validate(TokenizeBody, data)
    state.resolve_model(body.model)
    if body.messages is not None:
        generate = parse_chat_request(data, identify(request.headers, data)).generate
        (prompt,) = await state.generation.tokenize(generate)
        token_ids = list(prompt.token_ids)
    else:
        text = body.content if body.content is not None else text_field(body.prompt, "prompt")
        special = body.add_special if body.add_special is not None else body.add_special_tokens
        # The defaults of the two servers differ, as the names of their fields do.
        special = body.content is None if special is None else special
        token_ids = await state.generation.encode(text, add_special_tokens=special)
    reply: dict[str, Any] = {"tokens": token_ids, "count": len(token_ids), "max_model_len": state.client.max_model_len}
    if body.with_pieces:
        reply["tokens"] = [{"id": token, "piece": state.generation.decode([token])} for token in token_ids]
    return web.json_response(reply)


async def detokenize(request: web.Request) -> web.Response:
    """The text of token ids, special tokens included."""
    state = request.app[STATE]
    body = validate(DetokenizeBody, await read_json_object(request))
    state.resolve_model(body.model)
    text = state.generation.decode(body.tokens)
    return web.json_response({"content": text, "prompt": text})


async def props(request: web.Request) -> web.Response:
    """What tools that know llama.cpp's server read: the window of one request, above all."""
    state = request.app[STATE]
    options = state.options
    return web.json_response(
        {
            "default_generation_settings": {"n_ctx": state.client.max_model_len},
            "total_slots": options.max_num_seqs,
            "model_alias": options.model_name,
            "model_path": options.model_name,
            "modalities": {"vision": False, "audio": False},
            "build_info": f"agentserve {__version__}",
        }
    )
