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
    content_ids: tuple[bytes, ...] = ()
    """For each block the digest of all that its KV depends on but the model; tiers that outlive a process need it."""
    parent_ids: tuple[bytes, ...] = ()
    """For each block the id of the content before it."""

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


@record
class StoredBlock:
    """A block in a slot of a tier. The ids are those of `Transfer`."""

    slot: int
    content_id: bytes
    parent_id: bytes


@record
class TierContents:
    """What a tier held already when its executor started: told once, before anything is copied."""

    tier: Tier
    blocks: tuple[StoredBlock, ...]
    """Those that were used least recently first."""
