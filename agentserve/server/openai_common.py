"""What chat and completions share: a parsed call, the sampling fields, usage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from agentserve.errors import InvalidRequestError
from agentserve.server.dialect import JsonObject, ParsedCall
from agentserve.server.errors import ErrorReply
from agentserve.server.openai_schema import CommonBody
from agentserve.server.types import Progress, SamplingRequest, Usage


@dataclass(frozen=True, slots=True)
class OpenAICall(ParsedCall):
    """A call of chat or completions."""

    include_usage: bool
    continuous_usage: bool


class OpenAIEncoder:
    """What the encoders of chat and completions share."""

    names_events = False
    sends_done = True

    def keep_alive(self) -> JsonObject | None:
        return None

    def fail(self, error: ErrorReply) -> Iterable[JsonObject]:
        yield error.body()


def parse_call_options(body: CommonBody) -> tuple[bool, bool, bool]:
    """`stream`, `include_usage` and `continuous_usage`. Raises InvalidRequestError for options without a stream."""
    options = body.stream_options
    if options is not None and not body.stream:
        raise InvalidRequestError("stream_options: only allowed when stream is true", param="stream_options")
    include = bool(options and options.include_usage)
    return bool(body.stream), include, include and bool(options and options.continuous_usage_stats)


def parse_sampling(
    body: CommonBody, *, max_tokens: int | None, logprobs: int | None, default_max_tokens: int | None = None
) -> SamplingRequest:
    """Reads the sampling fields; null means the default. Ranges are checked later, by `SamplingParams`."""
    return SamplingRequest(
        max_tokens=max_tokens,
        default_max_tokens=default_max_tokens,
        temperature=_or(body.temperature, 1.0),
        top_p=_or(body.top_p, 1.0),
        # Some clients write "off" as -1.
        top_k=0 if body.top_k in (None, -1) else body.top_k,
        min_p=_or(body.min_p, 0.0),
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        seed=body.seed,
        stop=tuple(body.stop or ()),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        min_tokens=_or(body.min_tokens, 0),
        ignore_eos=bool(body.ignore_eos),
        logprobs=logprobs,
        logit_bias=_parse_logit_bias(body.logit_bias or {}),
    )


def encode_usage(usage: Usage) -> JsonObject:
    return {
        "prompt_tokens": usage.num_prompt_tokens,
        "completion_tokens": usage.num_output_tokens,
        "total_tokens": usage.num_prompt_tokens + usage.num_output_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.num_cached_tokens, "cache_write_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": usage.num_reasoning_tokens},
        # Not part of the dialect; clients keep or ignore what they do not know.
        "agentserve": {
            "work_class": usage.work_class,
            "queue_ms": usage.queue_ns / 1e6,
            "num_preemptions": usage.num_preemptions,
        },
    }


@dataclass(slots=True)
class StreamUsage:
    """Usage inside a stream: a last chunk of its own, counts in every chunk, or both."""

    num_prompt_tokens: int
    include: bool
    continuous: bool
    num_output_tokens: dict[int, int]

    def fields(self, choice: int | None = None, num_output_tokens: int = 0) -> JsonObject:
        """What a chunk with choices says about usage: null if the counts come at the end, nothing if they do not."""
        if choice is not None:
            self.num_output_tokens[choice] = num_output_tokens
        if not self.include:
            return {}
        if not self.continuous:
            return {"usage": None}
        num_output = sum(self.num_output_tokens.values())
        return {
            "usage": {
                "prompt_tokens": self.num_prompt_tokens,
                "completion_tokens": num_output,
                "total_tokens": self.num_prompt_tokens + num_output,
            }
        }


def encode_progress(progress: Progress) -> JsonObject:
    """How much of the prompt has been read, in the form of llama.cpp's server."""
    return {
        "prompt_progress": {
            "total": progress.num_prompt_tokens,
            "processed": progress.num_computed_tokens,
            "time_ms": round(progress.elapsed_ns / 1e6),
        }
    }


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _parse_logit_bias(bias: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    parsed: dict[int, float] = {}
    for key, value in bias.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 9):
            raise InvalidRequestError(f"logit_bias: {key[:32]!r} is not a token id", param="logit_bias")
        parsed[int(key)] = value
    return tuple(sorted(parsed.items()))
