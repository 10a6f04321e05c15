"""Carries out transfers between the tiers, beside the batches.

Each link, a lower tier in one direction, has a thread: its copies follow each other, those of other links and all
batches overlap with them. On a GPU the thread has a stream of its own. An output is reported when its bytes are where
they belong, whoever looks; so nobody else has to wait for a stream.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import nullcontext
from queue import SimpleQueue
from typing import Any

import torch

from agentserve.config import TieringConfig
from agentserve.core.clock import Clock
from agentserve.core.transfers import Tier, TierContents, Transfer, TransferOutput
from agentserve.errors import ConfigError, EngineError
from agentserve.executors.pytorch.attention.interface import KvBackend
from agentserve.executors.pytorch.devices.interface import Device
from agentserve.executors.pytorch.tiers.disk import DiskOptions, DiskTier, make_signature
from agentserve.executors.pytorch.tiers.memory import HostMemory, as_rows, row_bytes
from agentserve.models.config import ModelConfig

logger = logging.getLogger(__name__)

_NUM_STAGED = 8
"""Blocks that are on their way between a disk and a GPU at once."""


class TierLinks:
    """The host and the disk tier of one executor."""

    def __init__(
        self,
        config: TieringConfig,
        model_config: ModelConfig,
        backend: KvBackend,
        device: Device,
        *,
        clock: Clock,
        report: Callable[[TransferOutput], None],
        disk: DiskOptions | None = None,
    ) -> None:
        """Allocates the host tier and reads the directory of the disk tier.

        Args:
            config: which tiers there are, and their sizes.
            model_config: of the model whose KV it is.
            backend: has the pool.
            device: where the pool is.
            clock: stamps the outputs.
            report: called with each output, on the thread of its link.
            disk: where the disk tier is, if there is one.

        Raises ConfigError for a tier that there is not, for blocks of another size, and if the directory cannot be
        used.
        """
        self._rows = as_rows(backend.pages)
        self._backend = backend
        self._device = device
        self._clock = clock
        self._report = report
        self._host: HostMemory | None = None
        self._disk: DiskTier | None = None
        self._sizes = {Tier.DEVICE: backend.num_blocks}
        block_bytes = self._rows.shape[1]
        if block_bytes != config.block_bytes:
            raise ConfigError(f"KV blocks have {block_bytes} bytes, not {config.block_bytes}")
        for tier in config.tiers:
            self._sizes[Tier(tier.name)] = tier.num_blocks
            if tier.name == Tier.HOST:
                self._host = HostMemory(device, tier.num_blocks, block_bytes)
            elif tier.name == Tier.DISK and disk is not None:
                signature = make_signature(disk.identity, model_config, backend.pages.dtype, *backend.pages.shape[1:])
                self._disk = DiskTier(
                    disk.directory, num_blocks=tier.num_blocks, block_bytes=block_bytes, signature=signature
                )
            else:
                raise ConfigError(f"the executor {device.name} has no {tier.name} tier, or it was not said where")
        self.contents = () if self._disk is None else (TierContents(Tier.DISK, self._disk.found),)
        """What the tiers held at the start."""
        links = [(tier, goes_up) for tier in self.tiers[1:] for goes_up in (True, False)]
        self._threads = {link: _LinkThread(link, self._carry_out) for link in links}

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """The device and all below it."""
        return tuple(self._sizes)

    def submit(self, transfer: Transfer) -> None:
        """Takes a transfer and returns at once. Raises RuntimeError for a link that there is not."""
        thread = self._threads.get(transfer.link)
        if thread is None or {transfer.source, transfer.destination} - self._sizes.keys():
            raise RuntimeError(f"there is no copy from {transfer.source} to {transfer.destination} here")
        thread.inbox.put(transfer)

    def close(self) -> None:
        """Carries out what was submitted, then ends the threads and gives the memory back."""
        for thread in self._threads.values():
            thread.close()
        if self._host is not None:
            self._host.close()
        if self._disk is not None:
            self._disk.close()

    # ---- on the thread of a link ----

    def _carry_out(self, transfer: Transfer, staging: _Staging) -> None:
        started_ns, error = self._clock.now_ns(), None
        try:
            self._check(transfer)
            with staging.ready(self._device, self._rows.shape[1]):
                self._copy(transfer, staging)
        except EngineError as problem:  # it has been logged where it was found
            error = str(problem)
        except Exception as exception:
            logger.exception("transfer %d failed", transfer.transfer_id)
            error = f"{type(exception).__name__}: {exception}"
        self._report(TransferOutput(transfer.transfer_id, started_ns, self._clock.now_ns(), error))

    def _check(self, transfer: Transfer) -> None:
        sides = ((transfer.source, transfer.source_ids), (transfer.destination, transfer.destination_ids))
        for tier, ids in sides:
            if len(ids) != len(transfer.source_ids) or not ids or min(ids) < 0 or max(ids) >= self._sizes[tier]:
                raise EngineError(f"transfer {transfer.transfer_id} has a block id outside the {tier} tier, or none")

    def _copy(self, transfer: Transfer, staging: _Staging) -> None:
        sources, destinations = transfer.source_ids, transfer.destination_ids
        if transfer.destination is Tier.DEVICE:
            # Whoever keeps copies of these blocks must not take them for what comes now.
            self._backend.overwritten(destinations)
        match transfer.source, transfer.destination:
            case Tier.DEVICE, Tier.HOST:
                self._host_memory.fill(destinations, self._rows, sources)
                staging.wait()
            case Tier.HOST, Tier.DEVICE:
                self._host_memory.read(sources, self._rows, destinations)
                staging.wait()
            case Tier.HOST, Tier.DISK:
                for index, source in enumerate(sources):
                    self._write(transfer, index, self._host_memory.bytes_of(source))
            case Tier.DEVICE, Tier.DISK:
                self._device_to_disk(transfer, staging)
            case Tier.DISK, Tier.DEVICE:
                self._disk_to_device(transfer, staging)
            case _:
                raise EngineError(f"nothing is copied from {transfer.source} to {transfer.destination}")

    def _device_to_disk(self, transfer: Transfer, staging: _Staging) -> None:
        sources = transfer.source_ids
        if staging.memory is None:
            for index, source in enumerate(sources):
                self._write(transfer, index, row_bytes(self._rows, source))
            return
        for first in range(0, len(sources), _NUM_STAGED):
            piece = sources[first : first + _NUM_STAGED]
            staging.memory.fill(range(len(piece)), self._rows, piece)
            staging.wait()
            for place in range(len(piece)):
                self._write(transfer, first + place, staging.memory.bytes_of(place))

    def _disk_to_device(self, transfer: Transfer, staging: _Staging) -> None:
        destinations = transfer.destination_ids
        if staging.memory is None:
            for index, destination in enumerate(destinations):
                self._read(transfer, index, row_bytes(self._rows, destination))
            return
        for first in range(0, len(destinations), _NUM_STAGED):
            piece = destinations[first : first + _NUM_STAGED]
            for place in range(len(piece)):
                self._read(transfer, first + place, staging.memory.bytes_of(place))
            staging.memory.read(range(len(piece)), self._rows, piece)
            staging.wait()

    def _write(self, transfer: Transfer, index: int, payload: memoryview) -> None:
        assert self._disk is not None
        slot = transfer.destination_ids[index]
        self._disk.write(slot, transfer.content_ids[index], transfer.parent_ids[index], payload)

    def _read(self, transfer: Transfer, index: int, into: memoryview) -> None:
        assert self._disk is not None
        self._disk.read(transfer.content_ids[index], transfer.parent_ids[index], into)

    @property
    def _host_memory(self) -> HostMemory:
        assert self._host is not None
        return self._host


class _Staging:
    """The stream of a link, and memory between disk and GPU. On a CPU there is neither: files are read in place."""

    def __init__(self) -> None:
        self.memory: HostMemory | None = None
        self._stream: Any = None

    def ready(self, device: Device, block_bytes: int) -> Any:
        """A context in which copies are enqueued."""
        if device.torch_device.type == "cpu":
            return nullcontext()
        if self._stream is None:
            make_stream: Any = torch.cuda.Stream  # has no types
            self._stream = make_stream(device.torch_device)
            self.memory = HostMemory(device, _NUM_STAGED, block_bytes)
        return torch.cuda.stream(self._stream)

    def wait(self) -> None:
        """Until all copies of this link are done."""
        if self._stream is not None:
            self._stream.synchronize()

    def close(self) -> None:
        self.memory = None


class _LinkThread:
    """Transfers of one link, one after the other."""

    def __init__(self, link: tuple[Tier, bool], carry_out: Callable[[Transfer, _Staging], None]) -> None:
        self.inbox: SimpleQueue[Transfer | None] = SimpleQueue()
        self._carry_out = carry_out
        tier, goes_up = link
        name = f"agentserve-{tier}-{'up' if goes_up else 'down'}"
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Carries out what is in the inbox, then ends the thread."""
        self.inbox.put(None)
        self._thread.join()

    def _main(self) -> None:
        staging = _Staging()
        with torch.inference_mode():
            while (transfer := self.inbox.get()) is not None:
                self._carry_out(transfer, staging)
        staging.close()
