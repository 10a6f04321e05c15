"""The dialect of `/v1/completions`: a pure parser and a per-stream encoder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from agentserve.errors import InvalidRequestError
from agentserve.server.body import validate
from agentserve.server.dialect import ChoiceResult, JsonObject, ReplyHeader
from agentserve.server.errors import UnsupportedParameterError
from agentserve.server.openai_common import (
    OpenAICall,
    OpenAIEncoder,
    StreamUsage,
    encode_progress,
    encode_usage,
    parse_call_options,
    parse_sampling,
)
from agentserve.server.openai_schema import MAX_CHOICES, CompletionBody, refuse_unsupported
from agentserve.server.tool_fields import parse_constraints
from agentserve.server.types import (
    ChoiceFinished,
    Delta,
    Finished,
    GenerateRequest,
    GenerationEvent,
    Identity,
    Progress,
    Prompt,
    TextPrompt,
    TokenLogprob,
    TokenPrompt,
    Usage,
)
from agentserve.text.tools.spec import TextPiece

DEFAULT_MAX_TOKENS = 16
"""The documented default of this route; chat has none."""


def parse_completion_request(body: JsonObject, identity: Identity) -> OpenAICall:
    """Raises InvalidRequestError, or UnsupportedParameterError for what must not be ignored."""
    completion = validate(CompletionBody, body)
    refuse_unsupported(completion)
    if completion.echo and completion.logprobs is not None:
        raise UnsupportedParameterError(
            "echo: log-probabilities of the prompt are not supported; use echo or logprobs, not both", param="echo"
        )
    prompts = _parse_prompts(completion.prompt)
    num_choices = completion.n or 1
    if len(prompts) * num_choices > MAX_CHOICES:
        raise InvalidRequestError(f"prompt: at most {MAX_CHOICES} choices (prompts times n) at once", param="prompt")
    response_format, format_param = parse_constraints(body)
    stream, include_usage, continuous_usage = parse_call_options(completion)
    generate = GenerateRequest(
        prompts=prompts,
        prompt_param="prompt",
        sampling=parse_sampling(
            completion,
            max_tokens=completion.max_tokens,
            default_max_tokens=DEFAULT_MAX_TOKENS,
            logprobs=completion.logprobs,
        ),
        num_choices=num_choices,
        echo=bool(completion.echo),
        response_format=response_format,
        format_param=format_param,
        with_progress=bool(completion.return_progress),
        identity=identity,
        priority=completion.priority or 0,
        cache_salt=completion.cache_salt,
    )
    return OpenAICall(generate, completion.model, stream, include_usage, continuous_usage)


def _parse_prompts(prompt: Any) -> tuple[Prompt, ...]:
    """A string, strings, token ids, or lists of token ids."""
    if isinstance(prompt, str):
        return (TextPrompt(prompt),)
    if isinstance(prompt, list) and prompt:
        if all(_is_token_id(item) for item in prompt):
            return (_token_prompt(prompt),)
        if all(isinstance(item, str) for item in prompt):
            return tuple(TextPrompt(item) for item in prompt)
        if all(isinstance(item, list) and all(_is_token_id(token) for token in item) for item in prompt):
            return tuple(_token_prompt(item) for item in prompt)
    raise InvalidRequestError(
        "prompt: must be a string, a list of strings, a list of token ids or a list of lists of token ids",
        param="prompt",
    )


def _is_token_id(value: Any) -> bool:
    return (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and value.is_integer())


def _token_prompt(token_ids: list[Any]) -> TokenPrompt:
    return TokenPrompt(tuple(map(int, token_ids)))


class CompletionEncoder(OpenAIEncoder):
    """Encodes one answer of `/v1/completions`."""

    def __init__(self, header: ReplyHeader, call: OpenAICall) -> None:
        self._header = header
        self._with_logprobs = call.generate.sampling.logprobs is not None
        self._with_progress = call.generate.with_progress
        self._usage = StreamUsage(header.num_prompt_tokens, call.include_usage, call.continuous_usage, {})
        self._text_offsets: dict[int, int] = {}

    def open(self) -> Iterable[JsonObject]:
        return ()

    def encode(self, event: GenerationEvent) -> Iterable[JsonObject]:
        if isinstance(event, Delta):
            text = "".join(piece.text for piece in event.pieces if isinstance(piece, TextPiece))
            chunk = self._chunk(event.choice, text, None, event.logprobs)
            yield chunk | self._usage.fields(event.choice, event.num_output_tokens)
        elif isinstance(event, Progress):
            if self._with_progress:
                yield self._chunk(event.choice, "", None) | encode_progress(event)
        elif isinstance(event, ChoiceFinished):
            chunk = self._chunk(event.choice, "", event.reason.value)
            yield chunk | self._usage.fields(event.choice, event.num_output_tokens)
        elif isinstance(event, Finished) and self._usage.include:
            yield self._object([], usage=encode_usage(event.usage))

    def whole(self, choices: Sequence[ChoiceResult], usage: Usage) -> JsonObject:
        encoded = []
        for index, choice in enumerate(choices):
            logprobs = self._encode_logprobs(index, choice.logprobs) if self._with_logprobs else None
            encoded.append(
                {"index": index, "text": choice.text, "logprobs": logprobs, "finish_reason": choice.end.reason.value}
            )
        return self._object(encoded, usage=encode_usage(usage))

    def _chunk(self, choice: int, text: str, reason: str | None, logprobs: tuple[TokenLogprob, ...] = ()) -> JsonObject:
        encoded = self._encode_logprobs(choice, logprobs) if logprobs else None
        return self._object([{"index": choice, "text": text, "logprobs": encoded, "finish_reason": reason}])

    def _encode_logprobs(self, choice: int, logprobs: Sequence[TokenLogprob]) -> JsonObject:
        offset = self._text_offsets.get(choice, 0)
        offsets = []
        for entry in logprobs:
            offsets.append(offset)
            offset += len(entry.text)
        self._text_offsets[choice] = offset
        return {
            "tokens": [entry.text for entry in logprobs],
            "token_logprobs": [entry.logprob for entry in logprobs],
            "top_logprobs": [{top.text: top.logprob for top in entry.top} for entry in logprobs],
            "text_offset": offsets,
        }

    def _object(self, choices: list[JsonObject], **fields: Any) -> JsonObject:
        header = self._header
        return {
            "id": header.id,
            "object": "text_completion",
            "created": header.created,
            "model": header.model,
            "choices": choices,
            **fields,
        }
