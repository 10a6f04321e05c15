"""How fast blocks move between the device and its tiers: measured once at the start, with the copies that serve later.

What is written to a disk is read from the cache of the operating system here, and often later: the disk itself may be
slower, and is not waited for.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from agentserve.errors import ConfigError
from agentserve.executors.pytorch.devices.interface import Device
from agentserve.executors.pytorch.tiers import block_file
from agentserve.executors.pytorch.tiers.block_file import ID_BYTES, BlockHeader
from agentserve.executors.pytorch.tiers.memory import HostMemory, row_bytes

_PROBE_BYTES = 32 << 20
_NUM_RUNS = 3


@dataclass(frozen=True, slots=True)
class LinkRates:
    """Bytes a second of one link."""

    read_bytes_per_s: float
    """Towards the device."""
    write_bytes_per_s: float


def measure_host_link(device: Device, block_bytes: int) -> LinkRates:
    """Copies blocks between the device and host memory, and gives the memory back."""
    num_blocks = max(1, _PROBE_BYTES // block_bytes)
    rows = device.empty((num_blocks, block_bytes), torch.uint8).zero_()
    host, ids = HostMemory(device, num_blocks, block_bytes), range(num_blocks)
    num_bytes = num_blocks * block_bytes

    def store() -> None:
        host.fill(ids, rows, ids)
        device.synchronize()

    def load() -> None:
        host.read(ids, rows, ids)
        device.synchronize()

    device.synchronize()
    write_bytes_per_s = num_bytes / _best_s(store)
    return LinkRates(num_bytes / _best_s(load), write_bytes_per_s)


def measure_disk_link(directory: Path, block_bytes: int) -> LinkRates:
    """Writes and reads files of blocks in a directory, and removes them. Raises ConfigError if that fails."""
    num_blocks = max(1, _PROBE_BYTES // block_bytes)
    memory = row_bytes(torch.zeros((1, block_bytes), dtype=torch.uint8), 0)
    header = BlockHeader(block_bytes, bytes(ID_BYTES), bytes(ID_BYTES), bytes(ID_BYTES))
    num_bytes = num_blocks * block_bytes
    try:
        with tempfile.TemporaryDirectory(prefix="agentserve-probe-", dir=directory) as place:
            paths = [Path(place) / f"{index}.kv" for index in range(num_blocks)]

            def write() -> None:
                for path in paths:
                    block_file.write_block(path, header, memory)

            def read() -> None:
                for path in paths:
                    block_file.read_block(path, header, memory)

            write_bytes_per_s = num_bytes / _best_s(write)
            return LinkRates(num_bytes / _best_s(read), write_bytes_per_s)
    except OSError as error:
        raise ConfigError(f"--kv-disk-path {directory}: {error.strerror}") from None


def _best_s(work: Callable[[], None]) -> float:
    """The shortest of a few runs: what else the machine does only ever adds."""
    best_ns = 0
    for _ in range(_NUM_RUNS):
        started_ns = time.perf_counter_ns()
        work()
        duration_ns = max(1, time.perf_counter_ns() - started_ns)
        best_ns = min(best_ns, duration_ns) if best_ns else duration_ns
    return best_ns / 1e9
