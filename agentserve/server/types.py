"""The neutral request and stream between HTTP dialects and the engine.

A dialect parses its body into a `GenerateRequest` and encodes `GenerationEvent`s; neither knows the other dialects.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from agentserve.core.request import FinishReason

# ---- what comes in ----


@dataclass(frozen=True, slots=True)
class Identity:
    """Who asks, as far as the client says so. A hint: never required, never trusted for correctness."""

    session_id: str | None = None
    agent_id: str | None = None


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation, to be rendered by the model's chat template."""

    messages: tuple[Mapping[str, Any], ...]
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Further variables of the template, such as `enable_thinking`."""


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Text, to be tokenized as it is."""

    text: str


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids, to be used as they are once they are known to be in the vocabulary."""

    token_ids: tuple[int, ...]


Prompt: TypeAlias = ChatPrompt | TextPrompt | TokenPrompt


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRequest:
    """How to sample, before the prompt's length, the model's stop tokens and the seed are known."""

    max_tokens: int | None = None
    """None: `default_max_tokens`, but no more than what is left of the window."""
    default_max_tokens: int | None = None
    """None: what is left of the window."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    """None: drawn at random when the request is prepared."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """`num_choices` generations for each prompt. Choice `p * num_choices + i` is the i-th one of prompt p."""

    prompts: tuple[Prompt, ...]
    prompt_param: str
    """The field of the body to blame for a prompt that is too long."""
    sampling: SamplingRequest
    num_choices: int = 1
    echo: bool = False
    """Whether each choice's text starts with its prompt."""
    identity: Identity = Identity()
    priority: int = 0
    """Lower goes first."""
    cache_salt: str | None = None


# ---- what goes out ----


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token, its log-probability (natural logarithm) and those of the most likely tokens in its place."""

    text: str
    data: bytes
    """The token's own bytes; `text` cannot show a token that is part of a character."""
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class TextDelta:
    """New text of one choice. May be empty when only log-probabilities are new."""

    choice: int
    text: str
    logprobs: tuple[TokenLogprob, ...]
    num_output_tokens: int
    """Of this choice, so far."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How much of the prompt of one choice is in the cache or computed by now."""

    choice: int
    num_computed_tokens: int
    num_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class ChoiceFinished:
    """The last event of a choice. `reason` is STOP or LENGTH; anything else is raised as an error."""

    choice: int
    reason: FinishReason
    num_output_tokens: int


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts over all choices. Each prompt counts once, however many choices it has."""

    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    work_class: str
    """How the first choice started: `cold_prefill` or `resume_prefill`."""
    queue_ns: int
    """How long the first choice waited to be admitted."""
    num_preemptions: int
    """Over all choices."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a generation."""

    usage: Usage


GenerationEvent: TypeAlias = TextDelta | Progress | ChoiceFinished | Finished
