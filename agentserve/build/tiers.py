"""The KV tiers of a real executor: what can be refused, how large they are, and how fast."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from agentserve.config import DEFAULT_FLUSH_TIMEOUT_S, ServeConfig, TierConfig, TieringConfig
from agentserve.errors import ConfigError
from agentserve.models.fingerprint import weights_fingerprint
from agentserve.models.registry import ModelSource
from agentserve.profiles.links import disk_blocks

if TYPE_CHECKING:
    from agentserve.executors.pytorch.devices.interface import Device
    from agentserve.executors.pytorch.tiers.disk import DiskOptions
    from agentserve.executors.pytorch.tiers.rates import LinkRates

_HOST_LATENCY_NS = 50_000
_DISK_LATENCY_NS = 200_000
"""Of a transfer: its way through the engine and a thread. Orders of magnitude; the rates are measured."""


def check_tiers(config: ServeConfig, kind: str) -> None:
    """Refuses, before a model is loaded, what cannot be. `kind` is that of the executor. Raises ConfigError."""
    has_disk = config.kv_disk_size > 0.0
    if config.kv_disk_path is None and config.kv_flush_timeout != DEFAULT_FLUSH_TIMEOUT_S:
        raise ConfigError("--kv-flush-timeout needs --kv-disk-path")
    if not has_disk and not config.kv_offloading_size:
        if config.kv_write_back != "incremental":
            raise ConfigError("--kv-write-back needs --kv-offloading-size or --kv-disk-size")
        if config.kv_disk_path is not None:
            raise ConfigError("--kv-disk-path needs --kv-disk-size")
        return
    if not config.prefix_caching:
        raise ConfigError("KV tiers keep cached prefixes: they need prefix caching")
    if kind == "simulated":
        if config.kv_disk_path is not None:
            raise ConfigError("--kv-disk-path: simulated timing keeps no files; --kv-disk-size alone simulates a disk")
        return
    if has_disk != (config.kv_disk_path is not None):
        raise ConfigError("--kv-disk-path and --kv-disk-size need each other")
    free_gib = psutil.virtual_memory().available / 2**30
    if config.kv_offloading_size > free_gib:
        raise ConfigError(
            f"--kv-offloading-size {config.kv_offloading_size:g} GiB: only {free_gib:.1f} GiB of memory are free"
        )
    if config.kv_disk_path is not None:
        from agentserve.executors.pytorch.tiers.disk import prepare_directory

        prepare_directory(Path(config.kv_disk_path).expanduser())


def measured_tiering(config: ServeConfig, device: Device, block_bytes: int) -> TieringConfig | None:
    """The tiers that the options ask for, with links as fast as they are measured; None if they ask for none.

    Raises ConfigError if a tier has no room for one block or cannot be written.
    """
    from agentserve.executors.pytorch.tiers.rates import measure_disk_link, measure_host_link

    tiers = []
    if config.kv_offloading_size:
        num_blocks = int(config.kv_offloading_size * 2**30) // block_bytes
        tiers.append(_tier("host", num_blocks, measure_host_link(device, block_bytes), _HOST_LATENCY_NS))
    if config.kv_disk_path is not None:
        rates = measure_disk_link(Path(config.kv_disk_path).expanduser(), block_bytes)
        tiers.append(_tier("disk", disk_blocks(config.kv_disk_size, block_bytes), rates, _DISK_LATENCY_NS))
    return TieringConfig(block_bytes, tuple(tiers), config.kv_write_back) if tiers else None


def disk_options(config: ServeConfig, source: ModelSource) -> DiskOptions | None:
    """Where the disk tier is. Raises ModelFormatError if the weights cannot be told from others."""
    if config.kv_disk_path is None:
        return None
    from agentserve.executors.pytorch.tiers.disk import DiskOptions

    identity = weights_fingerprint(source, load_format=config.load_format, seed=config.seed)
    return DiskOptions(Path(config.kv_disk_path).expanduser(), identity)


def tier_notes(tiering: TieringConfig | None, num_found: int) -> tuple[str, ...]:
    """A line for each tier. `num_found`: blocks that the disk tier held before."""
    notes = []
    for tier in () if tiering is None else tiering.tiers:
        rates = f"{tier.read_bytes_per_s / 1e9:.1f} GB/s up, {tier.write_bytes_per_s / 1e9:.1f} GB/s down (measured)"
        found = f", {num_found} found there" if tier.name == "disk" else ""
        notes.append(f"{tier.name} tier: {tier.num_blocks} KV blocks{found}; {rates}")
    return tuple(notes)


def _tier(name: str, num_blocks: int, rates: LinkRates, latency_ns: int) -> TierConfig:
    return TierConfig(name, num_blocks, rates.read_bytes_per_s, rates.write_bytes_per_s, latency_ns)
