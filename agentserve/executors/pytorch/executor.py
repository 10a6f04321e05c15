"""Runs batches of a real model with torch: each lane launches on its own, and waits on its own."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable

import torch

from agentserve.config import TieringConfig
from agentserve.core.adapters import AdapterLoad, TransferOrder
from agentserve.core.batch import Batch, BatchOutput, Lane, TokenSample
from agentserve.core.clock import Clock
from agentserve.core.executor import Capabilities, Completion, Tier
from agentserve.core.masks import TokenMasks
from agentserve.core.transfers import TierContents
from agentserve.errors import EngineError
from agentserve.executors.pytorch.attention.backends import make_backend
from agentserve.executors.pytorch.attention.choice import AUTO, AttentionChoice, choose_attention, read_facts
from agentserve.executors.pytorch.attention.paged_kernels import AttentionShape
from agentserve.executors.pytorch.devices.interface import Device, Fence, Slot
from agentserve.executors.pytorch.lanes import LaneThread
from agentserve.executors.pytorch.lora import LoraLoader, LoraStore
from agentserve.executors.pytorch.runner import Launched, MakeGraphs, ModelRunner
from agentserve.executors.pytorch.sampler import RowSampler
from agentserve.executors.pytorch.tiers.disk import DiskOptions
from agentserve.executors.pytorch.tiers.links import TierLinks
from agentserve.models.config import ModelConfig
from agentserve.models.interface import DecoderModel

logger = logging.getLogger(__name__)


def kv_bytes_per_block(config: ModelConfig, dtype: torch.dtype | str, block_size: int) -> int:
    """Bytes of a block of the pool; `dtype` is that of the model, a name as in `torch.float32` without `torch.`."""
    resolved = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return config.kv_bytes_per_token(resolved.itemsize) * block_size


def _sampler_maker(
    choice: AttentionChoice, max_num_seqs: int, model: DecoderModel, device: Device
) -> Callable[[], RowSampler] | None:
    """Our Triton kernels draw wherever they run at all."""
    if not choice.is_fused or choice.name == "native":
        return None
    from agentserve.executors.pytorch.device_sampler import DeviceSampler  # noqa: PLC0415 - needs Triton

    return lambda: DeviceSampler(max_num_seqs, model.config.vocab_size, device.torch_device)


class _Flight:
    """A batch between its launch and its output."""

    __slots__ = ("batch", "error", "fence", "launched", "started_ns")

    def __init__(self, batch: Batch, started_ns: int) -> None:
        self.batch = batch
        self.started_ns = started_ns
        self.launched: Launched | None = None
        self.fence: Fence | None = None
        self.error: Exception | None = None
        """Why it could not be launched."""


class _LaneRecord:
    """What is known of the lane's batch that finished last; used by the thread that finishes."""

    __slots__ = ("failed_batch_id", "finished_ns")

    def __init__(self) -> None:
        self.finished_ns = 0
        self.failed_batch_id: int | None = None
        """None: it did not fail."""


class TorchExecutor:
    """Implements `core.executor.Executor`."""

    def __init__(
        self,
        model: DecoderModel,
        device: Device,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        clock: Clock,
        attention: str = AUTO,
        max_model_len: int | None = None,
        lookahead: int | None = None,
        make_graphs: MakeGraphs | None = None,
        token_masks: TokenMasks | None = None,
        lora: LoraStore | None = None,
        tiering: TieringConfig | None = None,
        disk: DiskOptions | None = None,
    ) -> None:
        """Takes over `device` and closes it in `close`.

        Args:
            model: on `device.torch_device`.
            device: what to run on.
            num_blocks: KV blocks in the pool; on a CPU memory is taken as they are used.
            block_size: tokens in a block.
            max_num_seqs: requests that may hold blocks at a time; a batch never has more chunks.
            clock: stamps `started_ns` and `finished_ns`.
            attention: a name of `attention.choice`, or `auto`.
            max_model_len: the most tokens of a request; by default what model and pool allow.
            lookahead: batches that may be in flight in a lane; by default what the device says.
            make_graphs: captures decode steps, where the attention allows it.
            token_masks: what requests with a grammar may produce; without it they fail.
            lora: the slots of the adapters, on `device`.
            tiering: the tiers below the pool; their memory is allocated here.
            disk: where the disk tier is, if there is one.

        Raises ConfigError if the attention that was asked for does not run here or a tier cannot be, EngineError for
        other numbers that cannot be right.
        """
        lookahead = device.lookahead if lookahead is None else lookahead
        limit = min(model.config.max_position_embeddings, num_blocks * block_size)
        max_model_len = limit if max_model_len is None else min(max_model_len, limit)
        if min(num_blocks, block_size, max_num_seqs, max_model_len, lookahead) < 1:
            raise EngineError("the numbers of blocks, tokens in a block, sequences and batches must be positive")
        self._device = device
        self._clock = clock
        facts = read_facts(device.torch_device, AttentionShape.of(model.config, block_size, model.dtype))
        self.attention = choose_attention(attention, facts)
        """What computes attention, and why."""
        logger.info("%s", self.attention.reason)
        self._backend = make_backend(
            self.attention,
            model.config,
            model.dtype,
            device,
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            lookahead=lookahead,
        )
        self._runner = ModelRunner(
            model,
            self._backend,
            device,
            max_num_seqs=max_num_seqs,
            lookahead=lookahead,
            make_graphs=make_graphs,
            token_masks=token_masks,
            lora=lora,
            make_sampler=_sampler_maker(self.attention, max_num_seqs, model, device),
        )
        self.tiering = tiering
        self._links: TierLinks | None = None
        if tiering is not None:
            self._links = TierLinks(
                tiering, model.config, self._backend, device, clock=clock, report=self._report, disk=disk
            )
        self.tier_contents: tuple[TierContents, ...] = () if self._links is None else self._links.contents
        """What the tiers held at the start, for the first step of the engine."""
        self._capabilities = Capabilities(
            name=device.name,
            device=device.description,
            compute_units=device.compute_units,
            unit_granularity=device.unit_granularity,
            min_units=device.min_units,
            unused_units=device.unused_units,
            num_blocks=num_blocks,
            block_size=block_size,
            tiers=(Tier.DEVICE,) if self._links is None else self._links.tiers,
            lookahead=lookahead,
        )
        self._lock = threading.Lock()  # guards the four below
        self._num_in_flight = dict.fromkeys(Lane, 0)
        self._finished: deque[Completion] = deque()
        self._wake: Callable[[], None] | None = None
        self._closed = False
        self._loader = None if lora is None else LoraLoader(lora, clock, self._report, device)
        self._records = {lane: _LaneRecord() for lane in Lane}
        self._lanes = {lane: LaneThread(lane, self._launch, self._finish, lookahead=lookahead) for lane in Lane}

    def capabilities(self) -> Capabilities:
        return self._capabilities

    def submit(self, batch: Batch, now_ns: int) -> None:  # noqa: ARG002 - real batches start when they start
        """See `Executor.submit`. A batch counts as in flight until `poll` has returned its output."""
        with self._lock:
            if self._closed:
                raise RuntimeError("the executor is closed")
            if self._num_in_flight[batch.lane] >= self._capabilities.lookahead:
                raise RuntimeError(f"the {batch.lane.value} lane is full")
            self._num_in_flight[batch.lane] += 1
        self._backend.forget(batch.ended_request_ids)
        self._lanes[batch.lane].put(batch)

    def submit_transfer(self, transfer: TransferOrder, now_ns: int) -> None:  # noqa: ARG002 - copies start at once
        """See `Executor.submit_transfer`."""
        if self._closed:
            raise RuntimeError("the executor is closed")
        if isinstance(transfer, AdapterLoad):
            if self._loader is None:
                raise RuntimeError("there are no slots for adapters")
            self._loader.submit(transfer)
        elif self._links is None:
            raise RuntimeError(f"there is no tier but the device, so no {transfer.source} or {transfer.destination}")
        else:
            self._links.submit(transfer)

    def poll(self, now_ns: int) -> list[Completion]:  # noqa: ARG002 - what is finished is finished
        with self._lock:
            outputs = list(self._finished)
            self._finished.clear()
            for output in outputs:
                if isinstance(output, BatchOutput):
                    self._num_in_flight[output.lane] -= 1
        return outputs

    def next_completion_ns(self) -> int | None:
        """Always None: nobody knows how long real work takes."""
        return None

    def on_completion(self, wake: Callable[[], None]) -> None:
        """See `Executor.on_completion`; a second function replaces the first. It is called on the lane's thread."""
        with self._lock:
            self._wake = wake
            waiting = bool(self._finished)
        if waiting:
            wake()

    def prepare_graphs(self, slots: Iterable[Slot], buckets: Iterable[int] | None = None) -> None:
        """Captures decode steps before the first batch: see `ModelRunner.prepare_graphs`."""
        self._runner.prepare_graphs(slots, buckets)

    def close(self) -> None:
        """See `Executor.close`. What was in flight can still be polled."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        for lane in self._lanes.values():
            lane.close()
        if self._loader is not None:
            self._loader.close()
        if self._links is not None:
            self._links.close()
        # Graphs and page-locked memory first: they hold on to the slots in which they were captured or used.
        self._runner.close()
        self._device.close()

    # ---- on the threads of a lane ----

    def _launch(self, batch: Batch) -> _Flight:
        """Puts a batch on the device, in its slot."""
        flight = _Flight(batch, self._clock.now_ns())
        try:
            slot = self._device.slot(batch.lane, batch.partition.units(batch.lane))

            def work() -> None:
                flight.launched = self._runner.launch(batch, slot)

            flight.fence = slot.launch(work)
        except Exception as error:  # noqa: BLE001 - it becomes the output of the batch
            flight.error = error
        return flight

    def _finish(self, flight: _Flight) -> None:
        """Waits for a batch and makes its output."""
        batch, record = flight.batch, self._records[flight.batch.lane]
        samples: tuple[TokenSample, ...] = ()
        error: str | None = None
        try:
            samples = self._read(flight, record)
        except Exception as exception:
            logger.exception("batch %d of the %s lane failed", batch.batch_id, batch.lane.value)
            error = f"{type(exception).__name__}: {exception}"
        # A batch that was launched behind another one began when that one ended.
        started_ns = max(flight.started_ns, record.finished_ns)
        record.finished_ns = self._clock.now_ns()
        record.failed_batch_id = None if error is None else batch.batch_id
        output = BatchOutput(batch.batch_id, batch.lane, started_ns, record.finished_ns, samples, error)
        self._report(output)

    def _report(self, output: Completion) -> None:
        """Lets `poll` return an output; called on the thread that has it."""
        with self._lock:
            self._finished.append(output)
            wake = self._wake
        if wake is not None:
            wake()

    def _read(self, flight: _Flight, record: _LaneRecord) -> tuple[TokenSample, ...]:
        if flight.error is not None:
            raise flight.error
        assert flight.fence is not None and flight.launched is not None
        flight.fence.wait()
        if flight.launched.is_dependent and record.failed_batch_id is not None:
            raise EngineError(f"it was given tokens of batch {record.failed_batch_id}, which failed")
        return self._runner.read(flight.launched)
