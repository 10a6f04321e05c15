"""Runs of decode steps: many steps in which nothing is decided, booked in one go.

While a lane decodes and nothing comes, ends or is short, each step is like the one before it: every request gets a
token and the next batch holds the same requests. On a virtual clock such steps need not be made one by one. Three parts
work together, and what comes of it is to the last bit what single steps would have made:

    EngineCore.decode_plan()           how many steps are certain, and how their batches run
    executor.decode_ends(plan, ...)    when each of their batches ends
    EngineCore.run_decodes(plan, ...)  books them; the batch behind the last one is made as in any step
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias, runtime_checkable

from agentserve.core.batch import PENDING_TOKEN, Batch, BatchOutput, Lane, SampleSpec, ScheduledChunk, TokenSample
from agentserve.core.events import BatchScheduled, EngineEvent, TokenGenerated
from agentserve.core.executor import Executor
from agentserve.core.request import WorkClass
from agentserve.core.slots import SlotPartition

if TYPE_CHECKING:
    from agentserve.core.engine import StepResult

TokenSource: TypeAlias = Callable[[SampleSpec, int, int], Sequence[int]]
"""What an executor samples for a request: a spec, how many tokens behind that of the spec to start, and how many."""


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """Decode steps that are certain as long as nothing comes from outside."""

    batches: tuple[Batch, ...]
    """In flight in the decode lane, in order: one, or two if the scheduler looks ahead."""
    num_steps: int
    """Ends of batches, at most: the last one may be followed by anything, those before it by a batch of the same
    requests."""
    partition: SlotPartition
    """Of the batches that follow `batches`."""
    co_running: bool
    """Of these."""
    is_settled: bool
    """Nothing within the engine can change the batches that follow. Otherwise the controller or a lack of memory may;
    then a run ends early."""
    before_ns: int | None = None
    """All steps must be made before this time: then a policy may act."""


@dataclass(frozen=True, slots=True)
class DecodeRun:
    """Steps that were booked in one go."""

    started_ns: int
    """When the first batch started."""
    ends_ns: tuple[int, ...]
    """When each batch ended: that many steps were made, and each request got that many tokens."""
    plan: DecodePlan
    tokens: tuple[tuple[int, ...], ...]
    """For each chunk of a batch, in order, its tokens."""
    block_ids: tuple[tuple[int, ...], ...]
    """For each chunk the blocks of the request behind the last step but one."""
    occupancy: tuple[tuple[int, int, int], ...]
    """(step, free blocks, cached blocks) after each step, from 0, at which these changed."""
    first_batch_id: int
    """Of the batches that were made behind all steps but the last one; they have consecutive ids."""
    block_size: int
    in_flight: Batch | None
    """What the decode lane was running when the events behind the run happened; None without look-ahead."""

    @property
    def num_steps(self) -> int:
        return len(self.ends_ns)

    @property
    def num_decodes(self) -> int:
        return len(self.tokens)

    def request_ids(self) -> Iterator[str]:
        """In the order of the chunks."""
        return (chunk.request_id for chunk in self.plan.batches[0].chunks)

    def starts_ns(self) -> tuple[int, ...]:
        """When each batch started."""
        return (self.started_ns, *self.ends_ns[:-1])

    def batch(self, step: int) -> Batch:
        """The batch that ended with `step`, from 0, or the next ones behind these."""
        known, depth = self.plan.batches, len(self.plan.batches)
        if step < depth:
            return known[step]
        chunks = tuple(self._chunk(index, step) for index in range(self.num_decodes))
        return Batch(self.first_batch_id + step - depth, Lane.DECODE, self.plan.partition, self.plan.co_running, chunks)

    def single_steps(self, last: StepResult) -> Iterator[tuple[BatchOutput, StepResult]]:
        """What single steps would have made of it; `last`: the result of the run.

        For tests and for reading: nothing is saved by making a run and taking it apart.
        """
        from agentserve.core.engine import StepResult  # noqa: PLC0415 - the engine imports this module

        depth, num_steps = len(self.plan.batches), self.num_steps
        for step, (start_ns, end_ns) in enumerate(zip(self.starts_ns(), self.ends_ns, strict=True)):
            batch = self.batch(step)
            events: list[EngineEvent] = []
            samples = []
            for chunk, tokens in zip(batch.chunks, self.tokens, strict=True):
                assert chunk.sample is not None
                sample = TokenSample(chunk.request_id, tokens[step])
                samples.append(sample)
                events.append(TokenGenerated(chunk.request_id, end_ns, sample, chunk.sample.output_index))
            output = BatchOutput(batch.batch_id, Lane.DECODE, start_ns, end_ns, tuple(samples))
            if step + 1 == num_steps:
                yield output, StepResult((*events, *last.events), last.batches)
            else:
                following = self.batch(step + depth)
                yield output, StepResult((*events, BatchScheduled(end_ns, following)), (following,))

    def _chunk(self, index: int, step: int) -> ScheduledChunk:
        first = self.plan.batches[0].chunks[index]
        assert first.sample is not None
        start, num_ahead = first.start + step, len(self.plan.batches) - 1
        # With look-ahead the token is not known when the batch is made.
        token_id = PENDING_TOKEN if num_ahead else self.tokens[index][step - 1]
        spec = SampleSpec(first.sample.params, first.sample.output_index + step, (), first.sample.num_prompt_tokens)
        num_blocks = start // self.block_size + 1
        block_ids = self.block_ids[index][:num_blocks]
        return ScheduledChunk(
            first.request_id, WorkClass.DECODE, start, (token_id,), block_ids, spec, first.adapter_slot
        )


@runtime_checkable
class PredictableExecutor(Executor, Protocol):
    """An executor that knows what decode batches will give before they are made."""

    def decode_ends(self, plan: DecodePlan, before_ns: int | None) -> tuple[int, list[int]]:
        """When the first batch of a plan started, and when the batches of its steps end.

        Only as many as end before `before_ns` and before a batch of the other lane does, and at most as many as give no
        token that may end a request. Changes nothing.
        """
        ...

    def decoded_tokens(self, spec: SampleSpec, skip: int, count: int) -> list[int]:
        """`count` output tokens of a request, from `skip` tokens behind the one that `spec` is for."""
        ...

    def skip_decodes(self) -> None:
        """Forgets the batches in flight in the decode lane: their outputs are booked already. What the core says is in
        flight instead is submitted next."""
        ...
