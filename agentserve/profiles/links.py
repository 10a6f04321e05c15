"""The link between a card and the host's memory, for devices whose profile was not measured with copies.

PCI Express x16 moves 31.5 GB/s each way in generation 4 and 63 GB/s in generation 5 (16 and 32 GT/s on 16 lanes with
128b/130b coding: PCI Express Base Specification 4.0 and 5.0). That copies from pinned memory reach 80 % of it is an
estimate. Which generation a card has is on its data sheet.
"""

from __future__ import annotations

from dataclasses import dataclass

from agentserve.config import TierConfig, TieringConfig

_LANES = 16
_CODING = 128 / 130
_EFFICIENCY = 0.8
_LATENCY_NS = 10_000
"""Of starting a copy and learning of its end; an estimate."""
_DISK_EFFICIENCY = 0.5
_DISK_LATENCY_NS = 200_000
_PAGE_BYTES, _FILE_HEADER_BYTES = 4096, 128
"""Files take whole pages of a disk; what describes a block in its file takes less than so much."""
_TRANSFERS_PER_S = {4: 16e9, 5: 32e9}
_GENERATIONS = {
    "rtx-3090": 4,
    "rtx-4090": 4,
    "rtx-a5000": 4,
    "rtx-a6000": 4,
    "rtx-5090": 5,
    "rtx-pro-6000": 5,
    "h100": 5,
    "h200": 5,
}
_UNKNOWN_GENERATION = 4


@dataclass(frozen=True, slots=True)
class LinkFigures:
    """A link between a device and a tier of memory; the same each way."""

    bytes_per_s: float
    latency_ns: int
    source: str
    """In words: where the figures come from."""


def host_link(profile_name: str) -> LinkFigures:
    """The link of a card to the host, by the name of its profile; unknown ones count as PCIe 4.0 x16."""
    generation = _GENERATIONS.get(profile_name, _UNKNOWN_GENERATION)
    bytes_per_s = _TRANSFERS_PER_S[generation] * _CODING * _LANES / 8 * _EFFICIENCY
    of = "data sheet" if profile_name in _GENERATIONS else "a guess"
    peak = bytes_per_s / _EFFICIENCY / 1e9
    source = f"estimated: PCIe {generation}.0 x16 ({of}), {_EFFICIENCY:.0%} of {peak:.1f} GB/s"
    return LinkFigures(bytes_per_s, _LATENCY_NS, source)


def cxl_link() -> LinkFigures:
    """A CXL 2.0 memory expander on eight lanes of PCIe 5.0, read by the device through the host."""
    bytes_per_s = _TRANSFERS_PER_S[5] * _CODING * 8 / 8 * _EFFICIENCY
    source = f"estimated: CXL 2.0 on PCIe 5.0 x8, {_EFFICIENCY:.0%} of {bytes_per_s / _EFFICIENCY / 1e9:.1f} GB/s"
    return LinkFigures(bytes_per_s, 2 * _LATENCY_NS, source)


def disk_link() -> LinkFigures:
    """A solid-state disk on four lanes of PCIe 4.0, through its file system."""
    bytes_per_s = _TRANSFERS_PER_S[4] * _CODING * 4 / 8 * _DISK_EFFICIENCY
    source = (
        f"estimated: NVMe on PCIe 4.0 x4, {_DISK_EFFICIENCY:.0%} of {bytes_per_s / _DISK_EFFICIENCY / 1e9:.1f} GB/s"
    )
    return LinkFigures(bytes_per_s, _DISK_LATENCY_NS, source)


def disk_blocks(gib: float, block_bytes: int) -> int:
    """How many blocks, each in a file of its own, so much of a disk holds."""
    return int(gib * 2**30) // (-(-(block_bytes + _FILE_HEADER_BYTES) // _PAGE_BYTES) * _PAGE_BYTES)


@dataclass(frozen=True, slots=True)
class TierSizes:
    """What somebody asked for: gibibytes of each tier below the device (0 or None: no such tier), and what replaces the
    figures of the links."""

    host_gib: float | None = None
    cxl_gib: float | None = None
    host_bytes_per_s: float | None = None
    cxl_bytes_per_s: float | None = None
    write_back: str | None = None
    disk_gib: float | None = None


def make_tiering(sizes: TierSizes, profile_name: str, block_bytes: int) -> tuple[TieringConfig | None, tuple[str, ...]]:
    """The tiers below a device, and a note for each about its link; None and nothing if no tier was asked for.

    Args:
        sizes: of the tiers.
        profile_name: of the device's profile.
        block_bytes: KV of one block.

    Raises ConfigError if a tier has no room for one block.
    """
    tiers, notes = [], []
    for name, gib, bytes_per_s, figures in (
        ("host", sizes.host_gib, sizes.host_bytes_per_s, host_link(profile_name)),
        ("cxl", sizes.cxl_gib, sizes.cxl_bytes_per_s, cxl_link()),
        ("disk", sizes.disk_gib, None, disk_link()),
    ):
        if not gib:
            continue
        rate = bytes_per_s or figures.bytes_per_s
        num_blocks = disk_blocks(gib, block_bytes) if name == "disk" else int(gib * 2**30) // block_bytes
        tiers.append(TierConfig(name, num_blocks, rate, rate, figures.latency_ns))
        source = figures.source if bytes_per_s is None else "as given"
        notes.append(f"{name} tier: {gib:g} GiB behind a link of {rate / 1e9:.1f} GB/s each way ({source})")
    if not tiers:
        return None, ()
    return TieringConfig(block_bytes, tuple(tiers), sizes.write_back or "incremental"), tuple(notes)
