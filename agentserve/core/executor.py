"""The port behind which the hardware is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from agentserve.core.batch import Batch, BatchOutput
from agentserve.core.slots import PartitionTable, build_partition_table


class Tier(StrEnum):
    """Where the bytes of a block are."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"
    CXL = "cxl"


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an executor is and can do; fixed for its life."""

    name: str
    """`cpu`, `cuda` or `simulated`: what `/health` and the header `x-agentserve-executor` say."""
    device: str
    """The device in words, for banners."""
    compute_units: int
    """SMs of a GPU, cores of a CPU."""
    unit_granularity: int
    """Slots are multiples of this many compute units."""
    min_units: int
    """The smallest slot."""
    num_blocks: int
    """KV blocks that exist."""
    block_size: int
    """Tokens in a block."""
    tiers: tuple[Tier, ...] = (Tier.DEVICE,)
    unused_units: int = 0
    """Units that neither side of a split can have; see `build_partition_table`."""
    lookahead: int = 1
    """Batches that may be in flight in one lane."""
    simulated: bool = False
    """Durations are computed and tokens are synthetic."""

    def partition_table(self) -> PartitionTable:
        """The ways to share this device."""
        return build_partition_table(
            self.compute_units, self.unit_granularity, self.min_units, unused_units=self.unused_units
        )


class Executor(Protocol):
    """Runs batches.

    `submit` and `poll` are called by one thread, the driver's. Batches of one lane run in the order in which they
    were submitted; batches of different lanes may overlap. An executor never raises for a batch: failures are
    `BatchOutput.error`.
    """

    def capabilities(self) -> Capabilities: ...

    def submit(self, batch: Batch, now_ns: int) -> None:
        """Takes a batch and returns at once. Raises RuntimeError when the lane is full or after `close`."""
        ...

    def poll(self, now_ns: int) -> list[BatchOutput]:
        """What has finished since the last call, in the order of finishing. Does not block."""
        ...

    def next_completion_ns(self) -> int | None:
        """When the next batch will finish, or None if that is not known beforehand (or nothing is in flight)."""
        ...

    def on_completion(self, wake: Callable[[], None]) -> None:
        """Registers a function that is called, from any thread, whenever `poll` has something new."""
        ...

    def close(self) -> None:
        """Waits for what is in flight and gives everything back. May be called twice."""
        ...
