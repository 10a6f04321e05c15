"""Copies of KV blocks between tiers: what the control plane asks an executor to move, and what became of it."""

from __future__ import annotations

from enum import StrEnum

from agentserve.core.records import record


class Tier(StrEnum):
    """Where the bytes of a block are."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"
    CXL = "cxl"


class TransferKind(StrEnum):
    """Why blocks are copied."""

    LOAD = "load"  # to the device, for a request that waits for them
    STORE = "store"  # to a lower tier


@record
class Transfer:
    """A copy of whole blocks from one tier to another.

    Block `source_ids[i]` of the source is written to `destination_ids[i]` of the destination. Ids count from 0 in each
    tier: on the device they are those of the KV pool, elsewhere they are slots of a store with as many places as the
    tier has blocks. Until its output has come, nobody else writes to any of them, and nobody reads the destinations.
    """

    transfer_id: int
    """Unique and increasing."""
    kind: TransferKind
    source: Tier
    destination: Tier
    source_ids: tuple[int, ...]
    destination_ids: tuple[int, ...]
    num_bytes: int

    @property
    def link(self) -> tuple[Tier, bool]:
        """The lower of the two tiers, and whether the blocks go up: each is one copy after the other."""
        goes_up = self.destination is Tier.DEVICE
        return (self.source if goes_up else self.destination), goes_up


@record
class TransferOutput:
    """What became of a transfer. Exactly one for every submitted one."""

    transfer_id: int
    started_ns: int
    finished_ns: int
    error: str | None = None
    """Set when it failed: then nothing may be read from its destinations."""
