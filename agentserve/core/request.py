"""One generation and what is known about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import TYPE_CHECKING

from agentserve.errors import InvalidRequestError

if TYPE_CHECKING:
    from agentserve.core.memory.eviction import SessionBlocks


class WorkClass(StrEnum):
    """What a piece of work is (AgentServe, section 3). Derived from token counts, never stored."""

    COLD_PREFILL = "cold_prefill"
    RESUME_PREFILL = "resume_prefill"
    DECODE = "decode"


class RequestStatus(Enum):
    WAITING = "waiting"  # no blocks; also after a preemption
    RUNNING = "running"  # holds blocks: prefilling or decoding
    FINISHED = "finished"


class FinishReason(StrEnum):
    STOP = "stop"  # end-of-sequence or stop token, or a stop string found by the client side
    LENGTH = "length"  # max_tokens or the end of the window
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen. Validated on construction; raises InvalidRequestError.

    `temperature == 0` is greedy. `top_k == 0` and `top_p == 1` and `min_p == 0` switch the filters off. The random
    number for output token *i* is a function of `(seed, i)` alone: not of the batch, the lane or a preemption.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the generation, the model's end-of-sequence tokens included unless `ignore_eos`."""
    min_tokens: int = 0
    """`stop_token_ids` cannot be sampled before this many output tokens."""
    logprobs: int | None = None
    """None: no log-probabilities; n: that of the chosen token and of the n most likely ones (n may be 0)."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    constrained: bool = False
    """Whether a grammar decides which tokens may be sampled; the executor has it, see `core.masks`."""

    def __post_init__(self) -> None:
        check = _Check()
        check(self.max_tokens >= 1, "max_tokens", "must be at least 1")
        check(0.0 <= self.temperature <= 100.0, "temperature", "must lie between 0 and 100")
        check(0.0 < self.top_p <= 1.0, "top_p", "must be above 0 and at most 1")
        check(self.top_k >= 0, "top_k", "must be at least 0 (0: off)")
        check(0.0 <= self.min_p <= 1.0, "min_p", "must lie between 0 and 1")
        check(-2.0 <= self.presence_penalty <= 2.0, "presence_penalty", "must lie between -2 and 2")
        check(-2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty", "must lie between -2 and 2")
        check(0.0 < self.repetition_penalty <= 100.0, "repetition_penalty", "must be above 0")
        check(
            0 <= self.min_tokens <= self.max_tokens,
            "min_tokens",
            "must lie between 0 and max_tokens",
        )
        check(not (self.constrained and self.min_tokens), "min_tokens", "cannot be combined with a grammar")
        check(
            self.logprobs is None or 0 <= self.logprobs <= 20,
            "logprobs",
            "must lie between 0 and 20",
        )
        check(
            all(-100.0 <= bias <= 100.0 for _, bias in self.logit_bias),
            "logit_bias",
            "must lie between -100 and 100",
        )

    @property
    def needs_history(self) -> bool:
        """Whether the sampler must see the tokens so far."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0


class _Check:
    def __call__(self, holds: bool, param: str, what: str) -> None:
        # A NaN fails every comparison above and so ends up here, too.
        if not holds:
            raise InvalidRequestError(f"{param} {what}", param=param)


@dataclass(slots=True, eq=False)
class Request:
    """The state of one generation. Only `EngineCore` and what it owns change it."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    arrival_ns: int
    sequence: int
    """Order of arrival: the last word in every tie."""
    agent_id: str | None = None
    session_id: str | None = None
    priority: int = 0
    """Lower goes first (vLLM's meaning)."""
    cache_salt: str | None = None
    """Prefixes are shared only between requests of the same salt."""
    adapter: str | None = None
    """The LoRA adapter that it is computed with."""
    adapter_slot: int | None = None
    """Where that is on the device, while the request runs."""
    order_key: tuple[float, ...] = ()
    """Its place among those of its priority, if a policy says so; changed only while it is in no queue."""
    session_blocks: SessionBlocks | None = None
    """To whom its blocks belong, if a policy wants to know."""

    status: RequestStatus = RequestStatus.WAITING
    token_ids: list[int] = field(init=False)
    """Prompt and output, in order."""
    num_prompt_tokens: int = field(init=False)
    needs_history: bool = field(init=False)
    """Of `sampling`: whether the sampler must see the tokens so far."""
    num_computed_tokens: int = 0
    """Tokens whose KV is in blocks. While a batch is in flight this is the count before it."""
    num_cached_tokens: int = 0
    """Prompt tokens that were found in the prefix cache at the *first* admission: what `usage` reports."""
    num_cached_at_admission: int = 0
    """The same for the latest admission (they differ after a preemption)."""
    prefill_target: int = field(init=False)
    """Tokens to compute before the next one is sampled: prompt, plus output so far after a preemption."""
    block_ids: tuple[int, ...] = ()
    """The blocks of its first `num_block_tokens` tokens, when it decodes: kept until it needs another one."""
    num_block_tokens: int = 0
    """0: the memory must be asked."""
    commit_at: int = 0
    """Computed tokens at which the memory must be told. Fewer than these fill no block."""
    in_flight: bool = False
    """Whether a batch with it is in flight; there may be two, if the scheduler looked ahead."""
    num_preemptions: int = 0
    num_slices: int = 0
    """Time slices that it has used up: each time it has given its place to one that had fewer. Changed only while it is
    in no queue."""
    runs_since_ns: int = 0
    """When it was admitted last, and what had to be loaded for it was there."""
    first_work_class: WorkClass | None = None
    """What it was when it was admitted first; for statistics."""
    finish_after_flight: FinishReason | None = None
    """Set when it was cancelled while a batch with it was in flight: its blocks may still be written to."""
    first_scheduled_ns: int | None = None
    first_token_ns: int | None = None
    last_token_ns: int | None = None

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_token_ids)
        self.num_prompt_tokens = self.prefill_target = len(self.prompt_token_ids)
        self.needs_history = self.sampling.needs_history

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def is_prefilling(self) -> bool:
        return self.num_computed_tokens < self.prefill_target

    @property
    def num_remaining_prefill_tokens(self) -> int:
        return max(0, self.prefill_target - self.num_computed_tokens)
