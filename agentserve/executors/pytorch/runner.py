"""Runs a model on batches: inputs, forward pass, sampling.

A batch goes through two functions. `launch` checks it, prepares what the host must prepare and puts forward pass and
sampling on the device; `read` looks at the results, behind a fence. A sampled token stays on the device as well, where
the next batch of the lane finds it, so that the next one can be launched before this one is read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from agentserve.core.batch import PENDING_TOKEN, Batch, Lane, ScheduledChunk, TokenSample
from agentserve.core.masks import TokenMasks
from agentserve.errors import EngineError
from agentserve.executors.pytorch.attention.interface import KvBackend, OpenBatch
from agentserve.executors.pytorch.devices.interface import Device, Slot
from agentserve.executors.pytorch.lora import LoraStore
from agentserve.executors.pytorch.sampler import RowSampler, Sampled, enqueue, read
from agentserve.executors.pytorch.transfer import upload
from agentserve.models.interface import BatchAdapters, DecoderModel


class StepGraphs(Protocol):
    """Graphs of the decode steps of a lane: `devices.graphs.DecodeGraphs`."""

    def enqueue(self, slot: Any, num_rows: int) -> int:
        """Replays or enqueues the step of `num_rows` rows in `slot`."""
        ...

    def prepare(self, slot: Any, buckets: Iterable[int]) -> None:
        """Captures the steps of these numbers of rows."""
        ...

    def close(self) -> None:
        """Destroys the graphs; none may run."""
        ...


MakeGraphs: TypeAlias = Callable[[Callable[[Slot, int], None], tuple[int, ...]], StepGraphs]
"""From a function that enqueues the step of so many rows in a slot, and the numbers of rows that occur."""


@dataclass(slots=True)
class Launched:
    """A batch on the device."""

    request_ids: tuple[str, ...]
    """Of the sampled tokens, in the order of the chunks."""
    sampled: Sampled | None
    """None: nothing was to be sampled."""
    is_dependent: bool
    """Whether it was given tokens of the lane's batch before it."""


class _Carried:
    """The tokens that the last batch of a lane sampled."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens
        """`[max_num_seqs]` int64 on the device; always the same memory, so that any slot of the lane may read it."""
        self.places: dict[str, int] = {}
        """Where the token of a request is."""


class ModelRunner:
    """Computes batches. May be used by two threads at once, one for each lane."""

    def __init__(
        self,
        model: DecoderModel,
        backend: KvBackend,
        device: Device,
        *,
        max_num_seqs: int,
        lookahead: int,
        make_graphs: MakeGraphs | None = None,
        make_sampler: Callable[[], RowSampler] | None = None,
        token_masks: TokenMasks | None = None,
        lora: LoraStore | None = None,
    ) -> None:
        """Allocates what is the runner's on the device.

        Args:
            model: on the device.
            backend: keys and values.
            device: what to run on.
            max_num_seqs: the most chunks of a batch.
            lookahead: batches of a lane that may be in flight. With 1 no token is ever pending, and none is kept.
            make_graphs: for decode steps of the decode lane, if the backend allows it; else kernels are launched one by
                one.
            make_sampler: called once for each lane, since workspaces are not shared; else torch draws.
            token_masks: for constrained requests; without it they fail.
            lora: the slots of the adapters; without it requests with one fail.
        """
        self._model = model
        self._backend = backend
        self._device = device
        self._max_num_seqs = max_num_seqs
        self._token_masks = token_masks
        self._lora = lora
        self._carries = lookahead > 1
        self._carried = {lane: _Carried(device.empty((max_num_seqs,), torch.int64).zero_()) for lane in Lane}
        self._samplers = {lane: None if make_sampler is None else make_sampler() for lane in Lane}
        # Results of the batches before: see `launch`.
        self._kept: dict[Lane, deque[Sampled | None]] = {lane: deque(maxlen=lookahead + 1) for lane in Lane}
        self._steps = backend.static_steps
        self._graphs: StepGraphs | None = None
        if make_graphs is not None and self._steps is not None:
            # What a graph computes must lie where it was when it was captured.
            self._static_logits = device.empty((max_num_seqs, model.config.vocab_size), torch.float32)
            self._graphs = make_graphs(self._static_step, self._steps.buckets)
        device.synchronize()

    def prepare_graphs(self, slots: Iterable[Slot], buckets: Iterable[int] | None = None) -> None:
        """Captures decode steps at start-up, of all numbers of rows or of those `buckets`; nothing may be in flight.

        Does nothing without graphs. Raises what a capture raises.
        """
        if self._graphs is None or self._steps is None:
            return
        steps = self._steps
        # The largest first: the smaller ones find the memory that they need.
        sizes = sorted(steps.buckets if buckets is None else buckets, reverse=True)
        with torch.inference_mode():
            for slot in slots:
                for size in sizes:
                    slot.run(partial(steps.pad, Lane.DECODE, size, slot.units))
                    self._graphs.prepare(slot, [size])

    def close(self) -> None:
        """Destroys the graphs and gives page-locked memory back; nothing may be in flight."""
        if self._graphs is not None:
            self._graphs.close()
        for kept in self._kept.values():
            kept.clear()
        self._backend.close()

    def launch(self, batch: Batch, slot: Slot) -> Launched:
        """Puts the batch on the device; called in `slot`, in the order of the lane's batches.

        Raises EngineError for a batch that cannot be right, before anything is written.
        """
        carried = self._carried[batch.lane]
        # If this batch fails, nothing is carried to the next one.
        places, carried.places = carried.places, {}
        chunks = batch.chunks
        if not 1 <= len(chunks) <= self._max_num_seqs:
            raise EngineError(f"a batch of {len(chunks)} chunks; the limit is {self._max_num_seqs}")
        sources = [self._check(chunk, places) for chunk in chunks]
        with torch.inference_mode():
            opened = self._backend.open(batch.lane, chunks, sources, slot.units)
            try:
                sampled = self._compute(batch, opened, slot)
            finally:
                opened.close()
        # Page-locked memory that is freed has torch record an event in the stream that used it. While a graph is
        # captured there, that event would be the graph's, and whoever asks it later gets an error. So results are freed
        # here, by the thread that captures, and not by the one that reads them.
        self._kept[batch.lane].append(sampled)
        request_ids = tuple(chunk.request_id for chunk in chunks if chunk.sample is not None)
        if sampled is not None and self._carries:
            carried.places = {request_id: place for place, request_id in enumerate(request_ids)}
        return Launched(request_ids, sampled, is_dependent=max(sources) >= 0)

    def read(self, launched: Launched) -> tuple[TokenSample, ...]:
        """The sampled tokens of a batch that is finished. Raises EngineError if they are not to be had."""
        if launched.sampled is None:
            return ()
        samples = tuple(
            TokenSample(request_id, choice.token_id, choice.logprob, choice.top_logprobs)
            for request_id, choice in zip(launched.request_ids, read(launched.sampled), strict=True)
        )
        if self._token_masks is not None:
            # The next masks are computed while the tokens are booked and the next step runs.
            for sample in samples:
                self._token_masks.accept(sample.request_id, sample.token_id)
        return samples

    # ---- on the device ----

    def _compute(self, batch: Batch, opened: OpenBatch, slot: Slot) -> Sampled | None:
        carried = self._carried[batch.lane].tokens
        rows = [row for row, chunk in zip(opened.last_rows, batch.chunks, strict=True) if chunk.sample is not None]
        adapters = None if self._lora is None else self._lora.batch(batch.chunks, opened.last_rows)
        # What an adapter adds depends on who is in the batch, so it is in no graph: such steps run kernel by kernel.
        if self._graphs is not None and opened.is_static and batch.lane is Lane.DECODE and adapters is None:
            self._graphs.enqueue(slot, opened.num_rows)
            logits = self._select(self._static_logits, rows) if rows else None
        else:
            hidden = self._hidden(opened, carried, adapters)
            # Only the last token of a finished prompt goes through the head, the largest matrix of a small model.
            logits = self._model.logits(self._select(hidden, rows)) if rows else None
        opened.finish()
        if logits is None:
            return None
        specs = [spec for chunk in batch.chunks if (spec := chunk.sample) is not None]
        sampled = enqueue(logits, specs, self._samplers[batch.lane], self._masks(batch.chunks))
        if self._carries:
            carried[: len(rows)].copy_(sampled.token_ids)
        return sampled

    def _masks(self, chunks: tuple[ScheduledChunk, ...]) -> dict[int, bytes]:
        """Of the constrained ones among the rows that are sampled; asked for when the forward pass is on its way."""
        masks: dict[int, bytes] = {}
        row = 0
        for chunk in chunks:
            if chunk.sample is None:
                continue
            if chunk.sample.params.constrained:
                if self._token_masks is None:
                    raise EngineError(f"request {chunk.request_id} is constrained, but there are no grammars here")
                masks[row] = self._token_masks.mask(chunk.request_id, chunk.sample.output_index)
            row += 1
        return masks

    def _static_step(self, slot: Slot, bucket: int) -> None:  # noqa: ARG002 - the current stream is that of the slot
        """The step that was made ready last, into the static logits: what graphs capture."""
        assert self._steps is not None
        opened = self._steps.batch(Lane.DECODE, bucket)
        hidden = self._hidden(opened, self._carried[Lane.DECODE].tokens)
        self._static_logits[:bucket].copy_(self._model.logits(hidden))

    def _hidden(self, opened: OpenBatch, carried: Tensor, adapters: BatchAdapters | None = None) -> Tensor:
        token_ids, positions = opened.inputs(carried)
        return self._model.forward(token_ids, positions, opened.attention, adapters)

    @staticmethod
    def _select(x: Tensor, rows: list[int]) -> Tensor:
        """The `rows` of `x`; a view if they are the first ones in order."""
        if rows == list(range(len(rows))):
            return x if len(rows) == x.shape[0] else x[: len(rows)]
        return x[upload(rows, torch.int64, x.device)]

    # ---- checks ----

    def _check(self, chunk: ScheduledChunk, places: dict[str, int]) -> int:
        """An index out of range would read or write memory of other requests.

        Returns where the chunk's token is if it is pending, else -1.
        """
        config, backend = self._model.config, self._backend
        name = f"request {chunk.request_id}"
        source = -1
        if not chunk.token_ids or chunk.start < 0 or chunk.end > config.max_position_embeddings:
            raise EngineError(f"{name}: no such positions: {chunk.start} to {chunk.end}")
        if chunk.token_ids == (PENDING_TOKEN,):
            if chunk.request_id not in places:
                raise EngineError(f"{name} waits for a token that the lane's last batch did not sample")
            source = places[chunk.request_id]
        elif min(chunk.token_ids) < 0 or max(chunk.token_ids) >= config.vocab_size:
            raise EngineError(f"{name} has a token id outside the vocabulary of {config.vocab_size}")
        if len(chunk.block_ids) != -(-chunk.end // backend.block_size):
            raise EngineError(f"{name} has {len(chunk.block_ids)} blocks for {chunk.end} tokens")
        if min(chunk.block_ids) < 0 or max(chunk.block_ids) >= backend.num_blocks:
            raise EngineError(f"{name} has a block id outside the pool of {backend.num_blocks}")
        if chunk.adapter_slot is not None and self._lora is None:
            raise EngineError(f"{name} has an adapter, but there are no slots for adapters here")
        if chunk.sample is not None:
            outside = [t for t, _ in chunk.sample.params.logit_bias if not 0 <= t < config.vocab_size]
            outside += [t for t in chunk.sample.history if not 0 <= t < config.vocab_size]
            if outside:
                raise EngineError(f"{name}: no such token: {outside[0]}")
        return source
