"""How a piece of a request becomes a chunk of a batch."""

from __future__ import annotations

from collections.abc import Iterable

from agentserve.core.batch import PENDING_TOKEN, SampleSpec, ScheduledChunk
from agentserve.core.classify import classify
from agentserve.core.request import Request, WorkClass

_DECODE = WorkClass.DECODE  # looking up a member of an enumeration costs as much as a call
_PENDING = (PENDING_TOKEN,)


def decode_chunks(requests: Iterable[Request]) -> list[ScheduledChunk]:
    """For each of these, which decode, the last token, and the next one to be sampled."""
    chunks = []
    for request in requests:
        token_ids, num_prompt_tokens = request.token_ids, request.num_prompt_tokens
        last = len(token_ids) - 1
        history = tuple(token_ids) if request.needs_history else ()
        spec = SampleSpec(request.sampling, last + 1 - num_prompt_tokens, history, num_prompt_tokens)
        chunks.append(
            ScheduledChunk(
                request.request_id, _DECODE, last, (token_ids[last],), request.block_ids, spec, request.adapter_slot
            )
        )
    return chunks


def pending_chunk(request: Request, before: SampleSpec, start: int) -> ScheduledChunk:
    """The token at position `start`, which will be sampled as `before` says, and the next one behind it."""
    spec = SampleSpec(before.params, before.output_index + 1, (), before.num_prompt_tokens)
    return ScheduledChunk(request.request_id, _DECODE, start, _PENDING, request.block_ids, spec, request.adapter_slot)


def prompt_chunk(
    request: Request, num_tokens: int, block_ids: tuple[int, ...], min_cached_tokens: int
) -> ScheduledChunk:
    """The next tokens of a prompt; `min_cached_tokens` as for `classify`."""
    token_ids, start = request.token_ids, request.num_computed_tokens
    end = start + num_tokens
    spec = None
    if end == len(token_ids):
        history = tuple(token_ids) if request.needs_history else ()
        spec = SampleSpec(request.sampling, request.num_output_tokens, history, request.num_prompt_tokens)
    return ScheduledChunk(
        request.request_id,
        classify(request, min_cached_tokens),
        start,
        tuple(token_ids[start:end]),
        block_ids,
        spec,
        request.adapter_slot,
    )
