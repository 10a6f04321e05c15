"""LoRA adapters, as the control plane sees them: what an executor is asked to load, and what became of it."""

from __future__ import annotations

from typing import TypeAlias

from agentserve.core.records import record
from agentserve.core.transfers import Transfer

_RESERVED = "\0"
"""No name of an adapter has it, and plain salts that begin with it are marked."""


@record
class AdapterLoad:
    """A copy of some parts of an adapter into a resident slot of the device.

    Parts are layers, or whatever else the executor can copy on its own. The parts of an adapter are loaded in order,
    from 0; with the last one the adapter is resident, and chunks may name its slot. From the first one on, nothing else
    is in the slot. Nobody reads a slot while it is written.
    """

    load_id: int
    """Unique and increasing."""
    adapter: str
    slot: int
    first_part: int
    num_parts: int
    num_bytes: int


@record
class AdapterLoadOutput:
    """What became of an `AdapterLoad`. Exactly one for every submitted one."""

    load_id: int
    started_ns: int
    finished_ns: int
    error: str | None = None
    """Set when it failed: then nothing in the slot may be used."""


TransferOrder: TypeAlias = Transfer | AdapterLoad
"""What an executor may be asked to copy while batches run."""


def salted(cache_salt: str | None, adapter: str | None, fingerprint: str = "") -> str | None:
    """The salt of the prefix cache for requests with an adapter: keys and values depend on it.

    Different arguments give different salts. `fingerprint` tells adapters apart that had the same name at different
    times, as tiers that outlive the daemon see them.
    """
    if adapter is None:
        if cache_salt is None or not cache_salt.startswith(_RESERVED):
            return cache_salt
        return f"{_RESERVED}salt{_RESERVED}{cache_salt}"
    own = "" if cache_salt is None else f"{_RESERVED}{cache_salt}"
    return f"{_RESERVED}lora{_RESERVED}{adapter}{_RESERVED}{fingerprint}{own}"
