"""`/v1/chat/completions` and `/v1/completions`."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable

from aiohttp import web

from agentserve.errors import AgentServeError
from agentserve.server.body import read_json_object
from agentserve.server.errors import describe_error
from agentserve.server.generation import Generation
from agentserve.server.identity import identify
from agentserve.server.openai_chat import ChatEncoder, parse_chat_request
from agentserve.server.openai_common import ChoiceResult, Encoder, JsonObject, ParsedCall, ReplyHeader
from agentserve.server.openai_completions import CompletionEncoder, parse_completion_request
from agentserve.server.sse import SseWriter
from agentserve.server.state import REQUEST_ID, STATE
from agentserve.server.types import ChoiceFinished, Finished, Identity, TextDelta, TokenLogprob

logger = logging.getLogger(__name__)
Parse = Callable[[JsonObject, Identity], ParsedCall]
MakeEncoder = Callable[[ReplyHeader, ParsedCall, int], Encoder]


async def chat_completions(request: web.Request) -> web.StreamResponse:
    return await _generate(request, parse_chat_request, ChatEncoder, "chatcmpl")


async def completions(request: web.Request) -> web.StreamResponse:
    return await _generate(request, parse_completion_request, CompletionEncoder, "cmpl")


async def _generate(
    request: web.Request, parse: Parse, make_encoder: MakeEncoder, id_prefix: str
) -> web.StreamResponse:
    state = request.app[STATE]
    with state.track():
        body = await read_json_object(request)
        call = parse(body, identify(request.headers, body))
        header = ReplyHeader(f"{id_prefix}-{uuid.uuid4().hex}", state.resolve_model(call.model), int(time.time()))
        # Whatever is wrong is raised up to here: no header has been sent yet.
        generating = state.generation.generate(call.generate, request_id=header.id, log_id=request[REQUEST_ID])
        async with generating as generation:
            encoder = make_encoder(header, call, generation.num_prompt_tokens)
            if call.stream:
                return await _stream(request, generation, encoder, state.options.sse_ping_interval_s)
            return web.json_response(await _collect(generation, encoder))


async def _collect(generation: Generation, encoder: Encoder) -> JsonObject:
    texts: dict[int, list[str]] = {}
    logprobs: dict[int, list[TokenLogprob]] = {}
    choices: dict[int, ChoiceResult] = {}
    async for event in generation:
        if isinstance(event, TextDelta):
            texts.setdefault(event.choice, []).append(event.text)
            logprobs.setdefault(event.choice, []).extend(event.logprobs)
        elif isinstance(event, ChoiceFinished):
            text = "".join(texts.pop(event.choice, ()))
            choices[event.choice] = ChoiceResult(text, tuple(logprobs.pop(event.choice, ())), event.reason)
        elif isinstance(event, Finished):
            return encoder.whole([choices[index] for index in sorted(choices)], event.usage)
    raise AssertionError("a generation ends with Finished")


async def _stream(
    request: web.Request, generation: Generation, encoder: Encoder, ping_interval_s: float
) -> web.StreamResponse:
    """Headers are out, so from here on an error is an event of the stream."""
    writer = SseWriter(request, ping_interval_s=ping_interval_s)
    try:
        async with writer:
            try:
                for item in encoder.open():
                    await writer.send(item)
                async for event in generation:
                    for item in encoder.encode(event):
                        await writer.send(item)
                await writer.send_done()
            except ConnectionError:
                raise
            except AgentServeError as error:
                await writer.send(describe_error(error).body())
            except Exception as error:
                logger.exception("id=%s failed while streaming", request[REQUEST_ID])
                await writer.send(describe_error(error).body())
    except ConnectionError:
        logger.debug("id=%s the client is gone", request[REQUEST_ID])
    return writer.response
