"""From an HTTP request to its answer, the same way for every dialect."""

from __future__ import annotations

import dataclasses
import logging
import time
import uuid
from collections.abc import Callable
from typing import TypeVar

from aiohttp import web

from agentserve.errors import AgentServeError
from agentserve.server.body import read_json_object
from agentserve.server.dialect import ChoiceResult, Encoder, JsonObject, ParsedCall, Part, ReplyHeader, ToolCall
from agentserve.server.errors import describe_error
from agentserve.server.generation import Generation
from agentserve.server.identity import identify
from agentserve.server.sse import SseWriter, write_within
from agentserve.server.state import REQUEST_ID, STATE, ServerOptions
from agentserve.server.types import ChoiceFinished, Delta, Finished, Identity, TokenLogprob
from agentserve.text.tools.spec import Piece, ReasoningPiece, TextPiece, ToolCallFinished, ToolCallStarted

logger = logging.getLogger(__name__)
CallT = TypeVar("CallT", bound=ParsedCall)


async def answer(
    request: web.Request,
    parse: Callable[[JsonObject, Identity], CallT],
    make_encoder: Callable[[ReplyHeader, CallT], Encoder],
    id_prefix: str,
) -> web.StreamResponse:
    """Parses, generates and encodes. Raises AgentServeError for whatever is wrong before the first header is sent."""
    state = request.app[STATE]
    with state.track():
        body = await read_json_object(request)
        call = parse(body, identify(request.headers, body))
        model = state.resolve_model(call.model)
        answer_id = f"{id_prefix}{uuid.uuid4().hex}"
        generate = dataclasses.replace(call.generate, adapter=state.adapter_of(model))
        generating = state.generation.generate(generate, request_id=answer_id, log_id=request[REQUEST_ID])
        async with generating as generation:
            header = ReplyHeader(answer_id, model, int(time.time()), request[REQUEST_ID], generation.num_prompt_tokens)
            encoder = make_encoder(header, call)
            if call.stream:
                return await _stream(request, generation, encoder, state.options)
            response = web.json_response(await collect(generation, encoder))
        try:
            await response.prepare(request)
            await write_within(request, state.options.write_timeout_s, response.write_eof())
        except ConnectionError:
            logger.debug("id=%s the client is gone", request[REQUEST_ID])
        return response


async def count_tokens(request: web.Request, parse: Callable[[JsonObject, Identity], ParsedCall]) -> int:
    """Tokens of the prompt as it would be read. Raises AgentServeError."""
    state = request.app[STATE]
    body = await read_json_object(request)
    call = parse(body, identify(request.headers, body))
    state.resolve_model(call.model)
    prompts = await state.generation.tokenize(call.generate)
    return sum(len(prompt.token_ids) for prompt in prompts)


class _Collected:
    """What is known of one choice."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.logprobs: list[TokenLogprob] = []
        self._call_ids: dict[int, str] = {}

    def add(self, piece: Piece) -> None:
        last = self.parts[-1] if self.parts else None
        if isinstance(piece, TextPiece) and isinstance(last, TextPiece):
            self.parts[-1] = TextPiece(last.text + piece.text)
        elif isinstance(piece, ReasoningPiece) and isinstance(last, ReasoningPiece):
            self.parts[-1] = ReasoningPiece(last.text + piece.text)
        elif isinstance(piece, TextPiece | ReasoningPiece):
            self.parts.append(piece)
        elif isinstance(piece, ToolCallStarted):
            self._call_ids[piece.index] = piece.call_id
        elif isinstance(piece, ToolCallFinished) and piece.complete:
            # One that was cut off must not be acted upon, so it is not shown at all.
            self.parts.append(ToolCall(self._call_ids[piece.index], piece.name, piece.arguments))


async def collect(generation: Generation, encoder: Encoder) -> JsonObject:
    """The whole answer. Raises what the generation raises."""
    collected: dict[int, _Collected] = {}
    ends: dict[int, ChoiceFinished] = {}
    async for event in generation:
        if isinstance(event, Delta):
            choice = collected.setdefault(event.choice, _Collected())
            choice.logprobs.extend(event.logprobs)
            for piece in event.pieces:
                choice.add(piece)
        elif isinstance(event, ChoiceFinished):
            ends[event.choice] = event
        elif isinstance(event, Finished):
            results = []
            for index in sorted(ends):
                choice = collected.get(index) or _Collected()
                results.append(ChoiceResult(tuple(choice.parts), tuple(choice.logprobs), ends[index]))
            return encoder.whole(results, event.usage)
    raise AssertionError("a generation ends with Finished")


async def _stream(
    request: web.Request, generation: Generation, encoder: Encoder, options: ServerOptions
) -> web.StreamResponse:
    """Headers are out, so from here on an error is an event of the stream."""
    writer = SseWriter(
        request,
        ping_interval_s=options.sse_ping_interval_s,
        write_timeout_s=options.write_timeout_s,
        names_events=encoder.names_events,
        keep_alive=encoder.keep_alive,
    )
    try:
        async with writer:
            try:
                for item in encoder.open():
                    await writer.send(item)
                async for event in generation:
                    for item in encoder.encode(event):
                        await writer.send(item)
                if encoder.sends_done:
                    await writer.send_done()
            except ConnectionError:
                raise
            except Exception as error:
                if not isinstance(error, AgentServeError):
                    logger.exception("id=%s failed while streaming", request[REQUEST_ID])
                for item in encoder.fail(describe_error(error)):
                    await writer.send(item)
            await writer.end()
    except ConnectionError:
        logger.debug("id=%s the client is gone", request[REQUEST_ID])
    return writer.response
