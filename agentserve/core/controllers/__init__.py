"""Controllers: how to share the device while both kinds of work are present."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from agentserve.core.batch import Batch
from agentserve.core.costmodel import BatchShape
from agentserve.core.records import record
from agentserve.core.slots import SlotPartition


@record
class ControlSignal:
    """What a controller may look at. Counts are those of the moment before scheduling."""

    now_ns: int
    decodes: BatchShape
    """The batch of all requests that are decoding, without any prefill."""
    num_resume_tokens: int
    """Prompt tokens left of admitted requests whose prefill is a resume that may ride in the decode lane."""
    num_prefill_tokens: int
    """Prompt tokens left of all other admitted requests: work for the prefill lane."""
    num_waiting_prefill_tokens: int
    """Those of them that the prefill lane does not come to before it is done with another prompt."""
    num_prompts: int
    """Admitted requests whose prompts are not computed yet, those included whose last chunk is running."""
    prefill_start: int
    """Tokens already computed of the prompt that is next in the prefill lane (0 without one)."""
    riding_start: int
    """The same of the prompt that is next to ride in a batch of the decode lane."""
    oldest_prefill_arrival_ns: int | None
    """When the request arrived that has waited longest for its first token; None without one."""
    decode_running_ns: int | None = None
    """How long the batch of the decode lane has been running; None if that lane is idle."""
    decode_is_ahead: bool = False
    """Whether another batch of that lane is to follow at once."""


@record
class BatchObservation:
    """A batch that is done."""

    batch: Batch
    shape: BatchShape
    duration_ns: int
    finished_ns: int
    since_previous_decode_ns: int | None
    """Decode lane only: time since the end of the previous decode batch, if some request was in both: a gap that its
    reader saw. None otherwise."""
    co_running: bool
    """The other lane was busy from its start to its end: it says something about contention."""
    alone: bool
    """The other lane was idle from its start to its end."""


@record
class Decision:
    """What a controller returns.

    If `partition` is a whole device, the lanes take turns: while something decodes, prompts of both lanes are computed
    in the batches of the decode lane, `prefill_chunk` tokens each.
    """

    partition: SlotPartition
    """For the time while both kinds of work are present; a lone lane always runs on the whole device."""
    resume_budget: int
    """Resume-prefill tokens in one batch of the decode lane; with 0 all prompts are for the prefill lane."""
    prefill_chunk: int
    """Prompt tokens in one batch of the prefill lane."""
    shares_budget: bool = False
    """Whether prompts that wait for the prefill lane may use what the resumes leave of the budget."""


@record
class DecodeSteps:
    """Decode batches that follow each other at once, with the same requests, each of which gets a token from each."""

    batch: Batch
    """How they run. Its chunks are those of a batch before them."""
    shape: BatchShape
    """Of the first of them."""
    started_ns: int
    """When that one started."""
    ends_ns: Sequence[int]
    """When each of them ends."""
    is_shared: bool
    """Whether the other lane is busy all the time."""
    signal: ControlSignal
    """Of the moment before the first one is made. Later ones have another time and other decodes."""

    def durations_ns(self) -> list[int]:
        """How long each of them takes."""
        ends_ns = self.ends_ns
        return [end - start for start, end in zip((self.started_ns, *ends_ns), ends_ns, strict=False)]

    def shape_of(self, index: int) -> BatchShape:
        """Of one of the batches, from 0."""
        num_decodes = self.shape.num_decodes
        return BatchShape(num_decodes, self.shape.num_decode_context + index * num_decodes, num_samples=num_decodes)

    def signal_of(self, index: int) -> ControlSignal:
        """Of the moment before one of them is made, from 0."""
        first = self.signal
        if index == 0:
            return first
        return ControlSignal(
            self.ends_ns[index - 1],
            self.shape_of(index),
            first.num_resume_tokens,
            first.num_prefill_tokens,
            first.num_waiting_prefill_tokens,
            first.num_prompts,
            first.prefill_start,
            first.riding_start,
            first.oldest_prefill_arrival_ns,
            first.decode_running_ns,
            first.decode_is_ahead,
        )

    def observation_of(self, index: int) -> BatchObservation:
        """The end of one of them, from 0."""
        started_ns = self.ends_ns[index - 1] if index else self.started_ns
        took_ns = self.ends_ns[index] - started_ns
        is_shared = self.is_shared and took_ns > 0
        return BatchObservation(
            self.batch, self.shape_of(index), max(1, took_ns), self.ends_ns[index], took_ns, is_shared, not is_shared
        )


class Controller(Protocol):
    def observe(self, observation: BatchObservation) -> None:
        """Takes what became of a batch; called once for each, in order of completion, before `decide`."""
        ...

    def decide(self, signal: ControlSignal) -> Decision:
        """The same observations and signals in the same order give the same decisions."""
        ...

    def follow(self, steps: DecodeSteps, present: Decision) -> tuple[int, Decision]:
        """Decides before each of these batches and observes it, as long as the decision is `present`.

        Returns how many were made that way, and the last decision. What `follow_singly` does, in less time.
        """
        ...


def follow_singly(controller: Controller, steps: DecodeSteps, present: Decision) -> tuple[int, Decision]:
    """`Controller.follow`, one batch after the other."""
    for index in range(len(steps.ends_ns)):
        decision = controller.decide(steps.signal_of(index))
        if decision != present:
            return index, decision
        controller.observe(steps.observation_of(index))
    return len(steps.ends_ns), present
