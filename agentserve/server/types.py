"""The neutral request and stream between HTTP dialects and the engine.

A dialect parses its body into a `GenerateRequest` and encodes `GenerationEvent`s; neither knows the other dialects.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from agentserve.core.request import FinishReason
from agentserve.text.tools.spec import Piece, ResponseFormat, TextFormat, ToolChoice, ToolSpec

# ---- what comes in ----


@dataclass(frozen=True, slots=True)
class Identity:
    """Who asks, as far as the client says so. A hint: never required, never trusted for correctness."""

    session_id: str | None = None
    agent_id: str | None = None
    distance: float | None = None
    """How far the agent's next call is once this one has ended."""
    program_id: str | None = None
    """The task that this call is a part of, if that has several sessions."""
    is_last_turn: bool | None = None
    """Whether the task ends with this call; None: the client does not say."""

    @property
    def name(self) -> str | None:
        """The agent, else its session: what rules about agents go by."""
        return self.agent_id or self.session_id


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation, to be rendered by the model's chat template."""

    messages: tuple[Mapping[str, Any], ...]
    """In OpenAI's form, with one string as the content of each."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Further variables of the template, such as `enable_thinking`."""
    tools: tuple[ToolSpec, ...] = ()
    """What the model is told that it may call, even if `GenerateRequest.tool_choice` forbids it this time: the prompt
    stays an extension of the one before."""
    prefill: str = ""
    """How the assistant's answer starts; it is not repeated in the answer."""


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
    clamp_max_tokens: bool = False
    """Whether `max_tokens` may be more than what is left of the window, which then is the limit. For dialects whose
    clients always send the most that the model they know could write."""
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
    tool_choice: ToolChoice = field(default_factory=ToolChoice)
    """Only for prompts with tools."""
    response_format: ResponseFormat = field(default_factory=TextFormat)
    format_param: str = "response_format"
    """The field of the body to blame for a form that cannot be enforced."""
    with_progress: bool = False
    """Whether the client wants to see `Progress`."""
    identity: Identity = Identity()
    priority: int = 0
    """Lower goes first."""
    cache_salt: str | None = None
    adapter: str | None = None
    """The LoRA adapter that the client's model name means."""


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
class Delta:
    """What is new of one choice. Without pieces when only log-probabilities are new."""

    choice: int
    pieces: tuple[Piece, ...]
    logprobs: tuple[TokenLogprob, ...]
    num_output_tokens: int
    """Of this choice, so far."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How much of the prompt of one choice is in the cache or computed by now."""

    choice: int
    num_computed_tokens: int
    num_prompt_tokens: int
    elapsed_ns: int
    """Since the request arrived."""


@dataclass(frozen=True, slots=True)
class ChoiceFinished:
    """The last event of a choice. `reason` is STOP or LENGTH; anything else is raised as an error."""

    choice: int
    reason: FinishReason
    num_output_tokens: int
    num_tool_calls: int = 0
    """Complete ones."""
    stop_string: str | None = None
    """The one of the request's stop strings that ended the text."""
    at_window: bool = False
    """Whether it was the end of the window that ended the text, not the client's own limit."""

    @property
    def calls_tools(self) -> bool:
        """Whether the client is to run tools now. Not if the answer was cut off: the last call may be missing."""
        return self.num_tool_calls > 0 and self.reason is FinishReason.STOP


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts over all choices. Each prompt counts once, however many choices it has."""

    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    num_reasoning_tokens: int
    """Those of `num_output_tokens` that were spent on thinking."""
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


GenerationEvent: TypeAlias = Delta | Progress | ChoiceFinished | Finished
