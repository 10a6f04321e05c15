"""The table of ways to share a device between the two lanes.

A *slot* is always a share of compute units: SMs of a GPU, cores of a CPU. The table is fixed at start-up, because
making a slot (a Green Context) is too slow for the hot path; at run time only an entry is chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from agentserve.errors import ConfigError

if TYPE_CHECKING:
    from agentserve.core.batch import Lane


class PartitionKind(StrEnum):
    WHOLE = "whole"  # one lane alone, on everything
    SPLIT = "split"  # disjoint units for the two lanes
    CAP = "cap"  # prefill is capped, decode may use everything
    STREAM = "stream"  # both lanes on everything; the hardware decides


@dataclass(frozen=True, slots=True)
class SlotPartition:
    """One entry of the table."""

    decode_units: int
    prefill_units: int
    kind: PartitionKind

    def units(self, lane: Lane) -> int:
        """Compute units of a lane in this partition."""
        return self.decode_units if lane.value == "decode" else self.prefill_units

    @property
    def label(self) -> str:
        """Short name for logs and metrics: `split:4+8` is 4 units for decode, 8 for prefill."""
        return f"{self.kind.value}:{self.decode_units}+{self.prefill_units}"


@dataclass(frozen=True, slots=True)
class PartitionTable:
    """All entries. `whole` is for a lane that runs alone; the others are for two lanes at once."""

    whole: SlotPartition
    stream: SlotPartition
    splits: tuple[SlotPartition, ...]
    """By rising share of decode. Empty if the device is too small to be split."""
    caps: tuple[SlotPartition, ...]
    """By rising share of prefill."""

    @property
    def entries(self) -> tuple[SlotPartition, ...]:
        return (self.whole, self.stream, *self.splits, *self.caps)

    def split_nearest(self, decode_share: float) -> SlotPartition:
        """The split whose decode share is nearest (the larger one in a tie); `stream` if there is none."""
        if not self.splits:
            return self.stream
        total = self.whole.decode_units
        return min(self.splits, key=lambda p: (abs(p.decode_units / total - decode_share), -p.decode_units))

    def cap_nearest(self, prefill_share: float) -> SlotPartition:
        """The cap whose share for prefill is nearest (the smaller one in a tie); `stream` if there is none."""
        if not self.caps:
            return self.stream
        total = self.whole.prefill_units
        return min(self.caps, key=lambda p: (abs(p.prefill_units / total - prefill_share), p.prefill_units))


def build_partition_table(
    compute_units: int, granularity: int, min_units: int, steps: int = 10, *, unused_units: int = 0
) -> PartitionTable:
    """Makes the table: a ladder of about `steps` shares, rounded to what the device can do.

    Args:
        compute_units: units of the whole device.
        granularity: the decode side of a split, and a cap, are multiples of it.
        min_units: the smallest slot.
        steps: of the ladder.
        unused_units: units that neither side of a split can have (a GPU may not hand out what a split leaves over).
            A lane that has the whole device has them, too.

    Raises ConfigError for sizes that are not positive or a smallest slot larger than the device.
    """
    if compute_units < 1 or granularity < 1 or min_units < 1 or steps < 2:
        raise ConfigError("compute units, granularity, smallest slot and steps must be positive")
    if min_units > compute_units:
        raise ConfigError(f"the smallest slot ({min_units} units) exceeds the device ({compute_units})")
    if not 0 <= unused_units < compute_units:
        raise ConfigError(f"{unused_units} unused units on a device with {compute_units}")
    whole = SlotPartition(compute_units, compute_units, PartitionKind.WHOLE)
    stream = SlotPartition(compute_units, compute_units, PartitionKind.STREAM)
    split_units = compute_units - unused_units
    sizes = []
    for step in range(1, steps):
        wanted = compute_units * step / steps
        units = max(min_units, round(wanted / granularity) * granularity)
        # What is left over may be of any size, but not smaller than the smallest slot.
        if units <= split_units - min_units and units not in sizes:
            sizes.append(units)
    splits = tuple(SlotPartition(units, split_units - units, PartitionKind.SPLIT) for units in sizes)
    caps = tuple(SlotPartition(compute_units, units, PartitionKind.CAP) for units in sizes)
    return PartitionTable(whole=whole, stream=stream, splits=splits, caps=caps)
