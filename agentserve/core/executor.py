"""The port behind which the hardware is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from agentserve.config import TieringConfig
from agentserve.core.adapters import AdapterLoadOutput, TransferOrder
from agentserve.core.batch import Batch, BatchOutput
from agentserve.core.slots import PartitionTable, build_partition_table
from agentserve.core.transfers import Tier, TierContents, TransferOutput
from agentserve.errors import ConfigError

__all__ = ["Capabilities", "Completion", "Executor", "Report", "Tier", "require_tiers"]

Completion: TypeAlias = BatchOutput | TransferOutput | AdapterLoadOutput
"""What an executor reports: a batch that is done, or a copy between tiers or of an adapter."""

Report: TypeAlias = Completion | TierContents
"""What the control plane is told: completions, and in the first step what the tiers of the executor hold already."""


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
    """Where it can keep blocks: it takes transfers between these."""
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


def require_tiers(capabilities: Capabilities, tiering: TieringConfig | None) -> None:
    """Raises ConfigError if KV is to be kept in a tier that the executor does not have."""
    for tier in () if tiering is None else tiering.tiers:
        if Tier(tier.name) not in capabilities.tiers:
            raise ConfigError(
                f"the executor {capabilities.name} has no {tier.name} tier: it cannot keep KV outside its pool; "
                "--executor simulated can"
            )


class Executor(Protocol):
    """Runs batches, and copies blocks between its tiers.

    `submit`, `submit_transfer` and `poll` are called by one thread, the driver's. Batches of one lane run in the order
    in which they were submitted; batches of different lanes may overlap, and transfers overlap with both. An executor
    never raises for a batch or a transfer: failures are their outputs' `error`.
    """

    def capabilities(self) -> Capabilities: ...

    def submit(self, batch: Batch, now_ns: int) -> None:
        """Takes a batch and returns at once. Raises RuntimeError when the lane is full or after `close`."""
        ...

    def submit_transfer(self, transfer: TransferOrder, now_ns: int) -> None:
        """Takes a copy and returns at once. Transfers of one link run in the order in which they were submitted.

        Raises RuntimeError for a tier that `capabilities` does not name, for adapters where there are no slots for
        them, and after `close`.
        """
        ...

    def poll(self, now_ns: int) -> Sequence[Completion]:
        """What has finished since the last call, in the order of finishing. Does not block."""
        ...

    def next_completion_ns(self) -> int | None:
        """When the next batch or transfer will finish; None if nobody knows, or nothing is in flight."""
        ...

    def on_completion(self, wake: Callable[[], None]) -> None:
        """Registers a function that is called, from any thread, whenever `poll` has something new."""
        ...

    def close(self) -> None:
        """Waits for what is in flight and gives everything back. May be called twice."""
        ...
