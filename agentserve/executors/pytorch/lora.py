"""LoRA adapters on the device: slots that are allocated once, the thread that fills them, and batches that use them.

Each product of a layer has one tensor of `A` and one of `B` over all layers and slots. An adapter is copied there layer
by layer, its scale multiplied into `B`; what it does not adapt is not computed. The rows of a batch are grouped by
adapter, and each group is two small products beside the large one.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from agentserve.core.adapters import AdapterLoad, AdapterLoadOutput
from agentserve.core.batch import ScheduledChunk
from agentserve.core.clock import Clock
from agentserve.errors import EngineError
from agentserve.executors.pytorch.devices.interface import Device
from agentserve.executors.pytorch.transfer import upload
from agentserve.models.config import ModelConfig
from agentserve.models.interface import DecoderModel, Product
from agentserve.models.layers import joins_gate_up
from agentserve.models.lora import LoraAdapter, linear_shapes

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Delta:
    """What an adapter adds to one product of one layer."""

    down: Tensor
    """`A^T` of all parts side by side, `[num_inputs, num_parts * rank]`."""
    ups: tuple[tuple[int, int, Tensor], ...]
    """For each part its columns of the result, from and to, and `s B^T` `[rank, num_outputs]`."""
    rank: int


_Layers = list[dict[Product, _Delta]]


class LoraStore:
    """The slots. Written by one thread, read by those of the lanes: never the same slot at the same time."""

    def __init__(
        self,
        config: ModelConfig,
        adapters: Sequence[LoraAdapter],
        device: Device,
        *,
        num_slots: int,
        max_rank: int,
        dtype: torch.dtype,
    ) -> None:
        """Allocates the slots on the device, which is all the memory that adapters ever take there.

        Args:
            config: of the model.
            adapters: all that may be loaded.
            device: where to.
            num_slots: adapters that are there at once.
            max_rank: the largest of their ranks.
            dtype: of the model.
        """
        self._shapes = linear_shapes(config)
        self._adapters = {adapter.name: adapter for adapter in adapters}
        self._num_layers = config.num_layers
        self._dtype = dtype
        self._torch_device = device.torch_device
        joined = joins_gate_up(device.torch_device, dtype)
        mlp = (Product.GATE_UP,) if joined else (Product.GATE, Product.UP)
        self._memory: dict[Product, tuple[Tensor, Tensor]] = {}
        for product in (Product.QKV, Product.OUTPUT, *mlp, Product.DOWN):
            parts = product.value
            num_outputs = sum(self._shapes[part][0] for part in parts)
            place = (config.num_layers, num_slots)
            self._memory[product] = (
                device.empty((*place, len(parts) * max_rank, self._shapes[parts[0]][1]), dtype),
                device.empty((*place, num_outputs * max_rank), dtype),
            )
        self._slots: list[_Layers] = [[] for _ in range(num_slots)]
        """By slot and layer; as many layers as are there."""
        self._open: tuple[str, Any] | None = None

    @property
    def num_bytes(self) -> int:
        """Of all slots."""
        return sum(part.numel() * part.element_size() for pair in self._memory.values() for part in pair)

    def write(self, load: AdapterLoad) -> None:
        """Copies layers of an adapter into its slot, from its file.

        Raises EngineError if the slot is not there or has not the layers before these, ModelFormatError and what
        safetensors raises if the file cannot be read.
        """
        if load.adapter not in self._adapters or not 0 <= load.slot < len(self._slots):
            raise EngineError(f"there is no adapter {load.adapter} or no slot {load.slot}")
        if load.first_part == 0:
            self._slots[load.slot] = []
        layers = self._slots[load.slot]
        if len(layers) != load.first_part or load.first_part + load.num_parts > self._num_layers:
            raise EngineError(f"slot {load.slot} has {len(layers)} layers; {load.first_part} were to be there")
        adapter = self._adapters[load.adapter]
        file = self._file(adapter)
        try:
            for layer in range(load.first_part, load.first_part + load.num_parts):
                layers.append(self._write_layer(adapter, file, layer, load.slot))
        finally:
            if load.first_part + load.num_parts == self._num_layers:
                self._open = None

    def batch(self, chunks: Sequence[ScheduledChunk], last_rows: Sequence[int]) -> BatchLora | None:
        """The adapters of a batch; None if it has none.

        `last_rows`: for each chunk the row of its last token.

        Raises EngineError for a slot that holds no whole adapter.
        """
        ranges: dict[int, list[tuple[int, int]]] = {}
        places = zip(chunks, last_rows, strict=True)
        for end, chunk in sorted(((row + 1, c) for c, row in places if c.adapter_slot is not None), key=lambda p: p[0]):
            slot = chunk.adapter_slot
            assert slot is not None
            if not 0 <= slot < len(self._slots) or len(self._slots[slot]) != self._num_layers:
                raise EngineError(f"request {chunk.request_id}: there is no adapter in slot {slot}")
            own = ranges.setdefault(slot, [])
            start = end - chunk.num_tokens
            if own and own[-1][1] == start:
                own[-1] = (own[-1][0], end)
            else:
                own.append((start, end))
        if not ranges:
            return None
        return BatchLora([_Group(self._slots[slot], own, self._torch_device) for slot, own in ranges.items()])

    def _file(self, adapter: LoraAdapter) -> Any:
        """The file of an adapter, kept open from its first layer to its last."""
        if self._open is None or self._open[0] != adapter.name:
            self._open = (adapter.name, safe_open(adapter.path, framework="pt", device="cpu"))
        return self._open[1]

    def _write_layer(self, adapter: LoraAdapter, file: Any, layer: int, slot: int) -> dict[Product, _Delta]:
        deltas: dict[Product, _Delta] = {}
        for product, (downs, ups) in self._memory.items():
            present = [part for part in product.value if (layer, part) in adapter.tensors]
            if not present:
                continue
            rank = adapter.rank
            down, up = downs[layer, slot], ups[layer, slot]
            views: list[tuple[int, int, Tensor]] = []
            first_column, used = 0, 0
            for part in product.value:
                num_outputs = self._shapes[part][0]
                if part in present:
                    a, b = (file.get_tensor(name) for name in adapter.tensors[layer, part])
                    row = len(views) * rank
                    down[row : row + rank].copy_(a)
                    view = up[used : used + rank * num_outputs].view(num_outputs, rank)
                    view.copy_((b.float() * adapter.scaling).to(self._dtype))
                    views.append((first_column, first_column + num_outputs, view.T))
                    used += rank * num_outputs
                first_column += num_outputs
            deltas[product] = _Delta(down[: len(views) * rank].T, tuple(views), rank)
        return deltas


def make_store(
    model: DecoderModel, adapters: Sequence[LoraAdapter], device: Device, *, max_slots: int, max_rank: int
) -> LoraStore | None:
    """Slots for the adapters of a model, no more than there are adapters; None if there are none."""
    if not adapters:
        return None
    num_slots = min(max_slots, len(adapters))
    return LoraStore(model.config, adapters, device, num_slots=num_slots, max_rank=max_rank, dtype=model.dtype)


class _Group:
    """The rows of a batch that have one adapter."""

    __slots__ = ("index", "layers", "ranges")

    def __init__(self, layers: _Layers, ranges: list[tuple[int, int]], device: torch.device) -> None:
        self.layers = layers
        self.ranges = ranges
        """From and to, in order."""
        self.index: Tensor | None = None
        """The rows one by one, if they are not neighbours."""
        if len(ranges) > 1:
            self.index = upload([row for start, end in ranges for row in range(start, end)], torch.int64, device)


class BatchLora:
    """Implements `models.interface.BatchAdapters`."""

    def __init__(self, groups: Sequence[_Group]) -> None:
        self._groups = groups

    def layer(self, index: int) -> LayerLora:
        """See `BatchAdapters.layer`."""
        return LayerLora([(group, group.layers[index]) for group in self._groups])


class LayerLora:
    """Implements `models.interface.LayerAdapters`."""

    __slots__ = ("_groups",)

    def __init__(self, groups: Sequence[tuple[_Group, Mapping[Product, _Delta]]]) -> None:
        self._groups = groups

    def add(self, product: Product, x: Tensor, y: Tensor, first_row: int = 0) -> None:
        """See `LayerAdapters.add`."""
        num_rows = x.shape[0]
        for group, deltas in self._groups:
            delta = deltas.get(product)
            if delta is None:
                continue
            # A part of the batch is looked at range by range: rows that are picked by index would have to be searched.
            if group.index is not None and first_row == 0 and num_rows >= group.ranges[-1][1]:
                _add_at(delta, x, y, group.index)
                continue
            for start, end in group.ranges:
                low, high = max(0, start - first_row), min(num_rows, end - first_row)
                if low < high:
                    _add(delta, x[low:high], y[low:high])


def _add(delta: _Delta, x: Tensor, y: Tensor) -> None:
    inner, rank = x @ delta.down, delta.rank
    for index, (start, end, up) in enumerate(delta.ups):
        y[:, start:end].addmm_(inner[:, index * rank : (index + 1) * rank], up)


def _add_at(delta: _Delta, x: Tensor, y: Tensor, rows: Tensor) -> None:
    inner, rank = x.index_select(0, rows) @ delta.down, delta.rank
    for index, (start, end, up) in enumerate(delta.ups):
        y[:, start:end].index_add_(0, rows, inner[:, index * rank : (index + 1) * rank] @ up)


class LoraLoader:
    """Carries out `AdapterLoad`s on a thread of its own, one after the other, while batches run."""

    def __init__(
        self, store: LoraStore, clock: Clock, report: Callable[[AdapterLoadOutput], None], device: Device
    ) -> None:
        """`report` is called with each output, on that thread."""
        self._store = store
        self._clock = clock
        self._report = report
        make_stream: Any = torch.cuda.Stream  # has no types
        self._stream: Any = make_stream(device.torch_device) if device.torch_device.type == "cuda" else None
        self._inbox: SimpleQueue[AdapterLoad | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._main, name="agentserve-adapters", daemon=True)
        self._thread.start()

    def submit(self, load: AdapterLoad) -> None:
        """Takes a load and returns at once."""
        self._inbox.put(load)

    def close(self) -> None:
        """Carries out what was submitted, then ends the thread."""
        self._inbox.put(None)
        self._thread.join()

    def _main(self) -> None:
        while (load := self._inbox.get()) is not None:
            started_ns, error = self._clock.now_ns(), None
            try:
                with torch.inference_mode():
                    self._write(load)
            except (EngineError, OSError, RuntimeError, SafetensorError) as exception:
                logger.exception("the adapter %s was not loaded", load.adapter)
                error = f"{type(exception).__name__}: {exception}"
            self._report(AdapterLoadOutput(load.load_id, started_ns, self._clock.now_ns(), error))

    def _write(self, load: AdapterLoad) -> None:
        if self._stream is None:
            self._store.write(load)
            return
        with torch.cuda.stream(self._stream):
            self._store.write(load)
        # What is reported is there, whichever stream reads it.
        self._stream.synchronize()
