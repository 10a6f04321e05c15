"""Controllers: how to share the device while both lanes have work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from agentserve.core.slots import SlotPartition


@dataclass(frozen=True, slots=True)
class ControlSignal:
    """What a controller may look at. Counts are those of the moment before scheduling."""

    now_ns: int
    num_decodes: int
    """Requests that are decoding."""
    num_pending_prefill_tokens: int
    """Prompt tokens of admitted requests that are not computed yet."""
    decode_step_ns: int | None
    """Duration of the latest batch of the decode lane; None before the first."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What a controller returns."""

    partition: SlotPartition
    """For the time while both lanes are busy; a lone lane always runs on the whole device."""
    resume_budget: int
    """Resume-prefill tokens in one batch of the decode lane."""
    prefill_chunk: int
    """Prompt tokens in one batch of the prefill lane."""


class Controller(Protocol):
    def decide(self, signal: ControlSignal) -> Decision:
        """Pure: the same controller state and signal give the same decision."""
        ...
