"""What the executor needs of a device, so that lanes, KV store and runner are the same code on all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from agentserve.core.batch import Lane


class Fence(Protocol):
    """A point in the work of a slot: everything that was launched there before it."""

    def done(self) -> bool:
        """Whether that work is finished. Does not block. Raises what the device raised meanwhile, if it did."""
        ...

    def wait(self) -> None:
        """Blocks the calling thread until it is finished. Raises what the device raised meanwhile, if it did."""
        ...


class FinishedFence:
    """A `Fence` of work that is finished already."""

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        pass


class Slot(Protocol):
    """A share of a device in which one lane runs its batches. For one thread at a time: that of the lane."""

    units: int
    """Compute units in it."""

    def run(self, work: Callable[[], None]) -> None:
        """Does `work` on the units of this slot, and returns when all of it is finished.

        Finished means visible to every other slot: this is the fence between the lanes. On a device that works
        asynchronously it includes what `work` launched. Whatever `work` raises is raised here.
        """
        ...

    def launch(self, work: Callable[[], None]) -> Fence:
        """Calls `work`, which only enqueues, and returns a fence after what it enqueued.

        Work of one lane runs in the order of the launches, whatever the slots; that of the other lane is ordered by
        `wait_for` only. A device that does not work asynchronously is finished when this returns. Memory that `work`
        allocates from torch belongs to the slot: another lane may read it after `wait_for`, and must be done with it
        before it is freed. If `work` raises, what it had enqueued is finished first, then that is raised here.
        """
        ...

    def wait_for(self, fence: Fence) -> None:
        """Lets everything that is launched here from now on start after `fence`, without blocking the caller."""
        ...


class Device(Protocol):
    """A device that can be shared by two lanes."""

    name: str
    """The kind, for `Capabilities.name`."""
    torch_device: torch.device
    compute_units: int
    unit_granularity: int
    """Slots are multiples of this many compute units, except for the prefill side of a split, which takes the rest."""
    min_units: int
    """The smallest slot."""
    unused_units: int
    """Compute units that neither side of a split can have."""
    lookahead: int
    """Batches that may be in flight in one lane."""

    @property
    def description(self) -> str:
        """The device in words, for banners."""
        ...

    def slot(self, lane: Lane, units: int) -> Slot:
        """The slot of `lane` with `units` units; the same object each time.

        The two slots of a split of the partition table share no unit. Only the thread of `lane` calls this. Raises
        EngineError for a size that the device does not have.
        """
        ...

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory for KV that both lanes may use, not initialized and, where the device allows it, not yet touched."""
        ...

    def host_empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory of the host, not initialized, from and to which the device copies asynchronously if it can.

        To be given back before `close`: what frees it looks at the slots that it was used in.
        """
        ...

    def synchronize(self) -> None:
        """Blocks until the device is idle. What was put there by other threads (weights) is then seen by all slots."""
        ...

    def close(self) -> None:
        """Gives the slots back; nothing may run in them. May be called twice."""
        ...
