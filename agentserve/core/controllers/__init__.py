"""Controllers: how to share the device while both kinds of work are present."""

from __future__ import annotations

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


class Controller(Protocol):
    def observe(self, observation: BatchObservation) -> None:
        """Takes what became of a batch; called once for each, in order of completion, before `decide`."""
        ...

    def decide(self, signal: ControlSignal) -> Decision:
        """The same observations and signals in the same order give the same decisions."""
        ...
