"""What crosses the boundary between the control plane and an executor: plain data in, plain data out."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from agentserve.core.records import record
from agentserve.core.request import SamplingParams, WorkClass
from agentserve.core.slots import SlotPartition

PENDING_TOKEN = -1
"""In `ScheduledChunk.token_ids`: the token that the batch before it in this lane samples for the same request. It is
not known to the control plane when the batch is made; the executor has it."""


class Lane(StrEnum):
    """A sequence of batches; batches of two lanes may run at the same time."""

    PREFILL = "prefill"
    DECODE = "decode"


@record
class SampleSpec:
    """How to sample the token that follows a chunk."""

    params: SamplingParams
    output_index: int
    """Which output token this is, from 0: with the seed it determines the random number."""
    history: tuple[int, ...]
    """Prompt and output tokens so far if `params.needs_history`, else empty."""
    num_prompt_tokens: int
    """How many of `history` are prompt: presence and frequency penalties count output tokens only."""


@record
class ScheduledChunk:
    """A piece of one request: compute the KV of `token_ids` at positions `start, start + 1, ...`.

        0 ........... start ............. end              end = start + num_tokens
        | in blocks    | this chunk       |
        | block_ids[0] ... block_ids[-1]  |                len(block_ids) == ceil(end / block_size)

    Token *i* lives in block `block_ids[i // block_size]` at offset `i % block_size`. Blocks that lie wholly before
    `start` may be shared with other requests and must not be written.
    """

    request_id: str
    work_class: WorkClass
    start: int
    token_ids: tuple[int, ...]
    """What the tokens are; `(PENDING_TOKEN,)` in a decode that is looked ahead to."""
    block_ids: tuple[int, ...]
    sample: SampleSpec | None
    """None: no token is sampled (the prompt is not done yet)."""
    adapter_slot: int | None = None
    """The resident slot of the LoRA adapter to compute it with; None: without one."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


@record
class BatchShape:
    """What the cost of a batch depends on."""

    num_decodes: int = 0
    """Sequences of which one token is decoded."""
    num_decode_context: int = 0
    """Sum over the decodes of the tokens that they attend to, themselves included."""
    num_prefill_chunks: int = 0
    num_prefill_tokens: int = 0
    num_prefill_context: int = 0
    """Sum over the prefill chunks of the tokens whose KV is read or written: the end of the chunk."""
    num_prefill_pairs: int = 0
    """Sum over the chunks of n * start + n * (n + 1) / 2: each token looks at what is before it and at itself."""
    num_samples: int = 0
    """Tokens that pass through the output head: all decodes, and the last token of each prompt that is finished."""
    num_prefill_longest: int = 0
    """Largest end of a prefill chunk. 0 stands for `num_prefill_context`, which it is if there is one chunk."""

    @property
    def num_tokens(self) -> int:
        return self.num_decodes + self.num_prefill_tokens

    @classmethod
    def of(cls, batch: Batch) -> BatchShape:
        """What `batch.shape` is: the sums over its chunks."""
        num_decodes = decode_context = num_samples = 0
        num_chunks = num_tokens = prefill_context = num_pairs = longest = 0
        decode = WorkClass.DECODE  # looking up a member of an enumeration costs as much as a call
        for chunk in batch.chunks:
            if chunk.sample is not None:
                num_samples += 1
            if chunk.work_class is decode:
                num_decodes += 1
                decode_context += chunk.start + 1
                continue
            n, end = chunk.num_tokens, chunk.end
            num_chunks += 1
            num_tokens += n
            prefill_context += end
            num_pairs += n * chunk.start + n * (n + 1) // 2
            longest = max(longest, end)
        return cls(
            num_decodes, decode_context, num_chunks, num_tokens, prefill_context, num_pairs, num_samples, longest
        )

    def with_prefill(self, num_tokens: int, start: int = 0) -> BatchShape:
        """This shape and one more prefill chunk, of a prompt that is not finished by it."""
        return BatchShape(
            self.num_decodes,
            self.num_decode_context,
            self.num_prefill_chunks + 1,
            self.num_prefill_tokens + num_tokens,
            self.num_prefill_context + start + num_tokens,
            self.num_prefill_pairs + num_tokens * start + num_tokens * (num_tokens + 1) // 2,
            self.num_samples,
            max(self.num_prefill_longest or self.num_prefill_context, start + num_tokens),
        )


@record
class OpenPrompts:
    """What a batch may read beside its decodes."""

    num_tokens: int
    """Of all prompts that can be read now."""
    waited_ns: int
    """For how long they can be, added up."""
    decodes: BatchShape
    """Of the batch."""
    num_waiting: int
    """Requests that wait for memory or for their turn."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What one lane runs next."""

    batch_id: int
    """Unique and increasing over both lanes."""
    lane: Lane
    partition: SlotPartition
    """The lane runs on `partition.units(lane)` compute units."""
    co_running: bool
    """Whether the other lane was busy when this batch was made."""
    chunks: tuple[ScheduledChunk, ...]
    """Never empty; a request occurs at most once. It is in two batches in flight only as a decode that is looked ahead
    to: in a batch of the decode lane, and in the next one with its `PENDING_TOKEN`."""
    ended_request_ids: tuple[str, ...] = ()
    """Requests that ended or lost their blocks since the last batch: what an executor keeps for them is stale."""
    shape: BatchShape = field(init=False, repr=False, compare=False)
    """Follows from `chunks`; kept because the control plane needs it more than once."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", BatchShape.of(self))

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)


@record
class TokenSample:
    """A sampled token. `logprob` and `top_logprobs` are those of the model's distribution, natural logarithm."""

    request_id: str
    token_id: int
    logprob: float | None = None
    """None unless log-probabilities were asked for."""
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """The most likely tokens in descending order, as many as were asked for."""


@record
class BatchOutput:
    """What became of a batch. Exactly one for every submitted batch."""

    batch_id: int
    lane: Lane
    started_ns: int
    finished_ns: int
    samples: tuple[TokenSample, ...]
    """One for each chunk with a `sample`, in the order of the chunks. Empty after an error."""
    error: str | None = None
    """Set when the batch failed; none of its results may be used."""
