"""What the executor needs of a device, so that lanes, KV store and runner are the same code on all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from agentserve.core.batch import Lane


class Slot(Protocol):
    """A share of a device in which one lane runs its batches."""

    units: int
    """Compute units in it."""

    def run(self, work: Callable[[], None]) -> None:
        """Does `work` on the units of this slot, and returns when all of it is finished.

        Finished means visible to every other slot: this is the fence between the lanes. On a device that works
        asynchronously it includes what `work` launched. Whatever `work` raises is raised here.
        """
        ...


class Device(Protocol):
    """A device that can be shared by two lanes."""

    name: str
    """The kind, for `Capabilities.name`."""
    description: str
    """The device in words, for banners."""
    torch_device: torch.device
    compute_units: int
    unit_granularity: int
    """Slots are multiples of this many compute units."""
    min_units: int
    """The smallest slot."""
    lookahead: int
    """Batches that may be in flight in one lane."""

    def slot(self, lane: Lane, units: int) -> Slot:
        """The slot of `lane` with `units` units; the same object each time.

        Two slots of different lanes share no unit if their sizes add up to at most `compute_units`. Only the thread of
        `lane` calls this. Raises EngineError for a size that the device does not have.
        """
        ...

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory for KV that both lanes may use, not initialized and, where the device allows it, not yet touched."""
        ...

    def close(self) -> None:
        """Gives the slots back; nothing may run in them. May be called twice."""
        ...
