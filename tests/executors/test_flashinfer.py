"""How FlashInfer is called: a stand-in computes attention from the plans it is given, as the real one would.

Whether the real one agrees is seen on a GPU only.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from agentserve.core.batch import Lane
from agentserve.executors.pytorch.attention.paged import PagedBackend, table_width
from agentserve.executors.pytorch.attention.paged_kernels import AttentionShape, SingleRows, TorchKernels
from agentserve.executors.pytorch.devices.cpu import CpuDevice
from agentserve.executors.pytorch.paged_pool import PagedPool
from tests.contract.harness import chunk
from tests.executors.builders import TINY

SHAPE = AttentionShape.of(TINY, 4, torch.float32)
NUM_BLOCKS = 64


class Planned:
    """What the two wrappers have in common: pages of each sequence as an offset into a list of blocks."""

    def __init__(self, workspace: Tensor, layout: str, **values: Any) -> None:
        assert layout == "HND" and values["backend"] == "fa2"
        self.values = values
        self.num_plans = 0

    def _keep(self, starts: Tensor, blocks: Tensor, last: Tensor, sizes: tuple[int, ...], values: dict) -> None:
        assert {t.dtype for t in (starts, blocks, last)} == {torch.int32}
        assert starts.is_cpu and last.is_cpu, "the planner would wait for the device"
        assert sizes == (TINY.num_heads, TINY.num_kv_heads, TINY.head_dim, 4)
        assert values["q_data_type"] == values["kv_data_type"] == torch.float32
        assert values["sm_scale"] == SHAPE.scale
        self.num_plans += 1
        self.tables = [blocks[a:b] for a, b in pairwise(starts.tolist())]
        self.lengths = [4 * (len(t) - 1) + int(n) for t, n in zip(self.tables, last, strict=True)]


class Decode(Planned):
    made: ClassVar[list[Decode]] = []

    def __init__(self, workspace: Tensor, layout: str, **values: Any) -> None:
        super().__init__(workspace, layout, **values)
        assert not values["use_tensor_cores"]  # 3 heads to a KV head
        Decode.made.append(self)

    def plan(self, starts: Tensor, blocks: Tensor, last: Tensor, *sizes: int, **values: Any) -> None:
        if self.values.get("use_cuda_graph"):
            assert len(last) == len(self.values["paged_kv_last_page_len_buffer"])
            assert len(starts) == len(self.values["paged_kv_indptr_buffer"])
            assert len(blocks) <= len(self.values["paged_kv_indices_buffer"])
        self._keep(starts, blocks, last, sizes, values)

    def run(self, query: Tensor, pages: tuple[Tensor, Tensor], *, out: Tensor) -> None:
        assert query.is_contiguous() and len(query) == len(self.tables)
        for row, (table, length) in enumerate(zip(self.tables, self.lengths, strict=True)):
            rows = SingleRows(torch.tensor([length]), table[None])
            TorchKernels(SHAPE).decode(query[row : row + 1], pages, out[row : row + 1], rows)


class Prefill(Planned):
    def plan(self, query_starts: Tensor, starts: Tensor, blocks: Tensor, last: Tensor, *sizes: int, **values) -> None:
        assert values["causal"] and query_starts.is_cpu and query_starts.dtype == torch.int32
        self.query_starts = query_starts
        self._keep(starts, blocks, last, sizes, values)

    def run(self, query: Tensor, pages: tuple[Tensor, Tensor], *, out: Tensor) -> None:
        assert query.is_contiguous() and len(query) == self.query_starts[-1]
        for index, (table, length) in enumerate(zip(self.tables, self.lengths, strict=True)):
            start, end = self.query_starts[index : index + 2].tolist()
            for row in range(start, end):
                rows = SingleRows(torch.tensor([length - (end - 1 - row)]), table[None])
                TorchKernels(SHAPE).decode(query[row : row + 1], pages, out[row : row + 1], rows)


class Event:
    log: ClassVar[list[str]] = []

    def record(self) -> None:
        self.log.append("record")

    def synchronize(self) -> None:
        self.log.append("wait")


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[PagedBackend]:
    fake = ModuleType("flashinfer")
    fake.__dict__.update(BatchDecodeWithPagedKVCacheWrapper=Decode, BatchPrefillWithPagedKVCacheWrapper=Prefill)
    monkeypatch.setitem(sys.modules, "flashinfer", fake)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "log", [])
    monkeypatch.setattr(Decode, "made", [])
    name = "agentserve.executors.pytorch.attention.flashinfer"
    monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module(name)
    device = CpuDevice([0])
    pool = make_pool(device)
    yield PagedBackend(
        pool,
        device,
        lambda: module.FlashInferKernels(
            SHAPE, torch.device("cpu"), spare_block=pool.spare_block, max_blocks=table_width(256, 4)
        ),
        max_num_seqs=12,
        max_model_len=256,
        lookahead=2,
    )
    sys.modules.pop(name)


def attention_of(backend: PagedBackend, chunks, heads: Tensor | None = None) -> Tensor:
    """The batch's attention in layer 1, in the order of the flat batch."""
    with torch.inference_mode():
        batch = backend.open(Lane.DECODE, chunks, [-1] * len(chunks), 1)
        torch.manual_seed(batch.num_rows)
        heads = torch.randn(batch.num_rows, 10, 8)
        for layer in range(2):
            out = batch.attention.attend(layer, heads[:, :6], heads[:, 6:8], heads[:, 8:])
    return out[batch.last_rows]


def make_pool(device: CpuDevice) -> PagedPool:
    """With some contents: contexts of these batches were not computed by anybody."""
    pool = PagedPool(TINY, device, torch.float32, num_blocks=NUM_BLOCKS, block_size=4)
    pool.pages.copy_(torch.randn(pool.pages.shape, generator=torch.Generator().manual_seed(1)))
    return pool


def reference() -> PagedBackend:
    device = CpuDevice([0])
    pool = make_pool(device)
    return PagedBackend(pool, device, lambda: TorchKernels(SHAPE), max_num_seqs=12, max_model_len=256, lookahead=2)


BATCHES = [
    [chunk("a", range(9), range(0, 5)), chunk("b", range(6), range(5, 10))],  # prompts only
    [
        chunk("a", [1], range(0, 5), start=9),
        chunk("c", range(5), range(20, 25)),
        chunk("b", [1], range(5, 10), start=6),
    ],
    [chunk(n, [1], range(5 * i, 5 * i + 5), start=4 + i) for i, n in enumerate("defghijkl"[:9])],  # padded to 10
    [chunk("a", [1], range(0, 5), start=10)],
    [chunk(n, [1], range(5 * i, 5 * i + 5), start=5 + i) for i, n in enumerate("defghijkl"[:9])],
]


def test_plans_describe_the_batches(backend):
    other = reference()
    for chunks in BATCHES:
        torch.testing.assert_close(attention_of(backend, chunks), attention_of(other, chunks), atol=1e-5, rtol=1e-5)


def test_decode_steps_have_a_planner_for_each_bucket(backend):
    for chunks in BATCHES:
        attention_of(backend, chunks)
    # One of each lane for mixed batches, used once; one for ten rows, used twice; one for a single row.
    fixed = {len(d.values["paged_kv_last_page_len_buffer"]): d for d in Decode.made if "use_cuda_graph" in d.values}
    assert {size: planner.num_plans for size, planner in fixed.items()} == {10: 2, 1: 1}
    assert sorted(d.num_plans for d in Decode.made if "use_cuda_graph" not in d.values) == [0, 1]
    # Rows of padding attend to one token of the block that belongs to nobody.
    assert fixed[10].lengths[9:] == [1] and fixed[10].tables[9].tolist() == [NUM_BLOCKS]


def test_a_plan_waits_until_the_one_before_it_was_fetched(backend):
    attention_of(backend, BATCHES[0])
    attention_of(backend, BATCHES[1])
    assert Event.log == ["record", "wait", "record"]


def test_padding_alone_can_be_planned(backend):
    backend.pad(Lane.DECODE, 4, 1)
    steps = backend.static_steps
    assert steps is not None
    heads = torch.zeros(4, 10, 8)
    with torch.inference_mode():
        out = steps.batch(Lane.DECODE, 4).attention.attend(0, heads[:, :6], heads[:, 6:8], heads[:, 8:])
    assert torch.isfinite(out).all()


def test_tensor_cores_are_used_for_large_groups(backend, monkeypatch):
    module = sys.modules["agentserve.executors.pytorch.attention.flashinfer"]
    seen = []
    monkeypatch.setattr(
        module,
        "flashinfer",
        SimpleNamespace(
            BatchDecodeWithPagedKVCacheWrapper=lambda *_, **values: seen.append(values["use_tensor_cores"]),
            BatchPrefillWithPagedKVCacheWrapper=Prefill,
        ),
    )
    for num_heads in (28, 12):  # 7 and 3 heads to a KV head
        shape = AttentionShape(num_heads, 4, 128, 16, torch.bfloat16)
        module.FlashInferKernels(shape, torch.device("cpu"), spare_block=9, max_blocks=16)
    assert seen == [True, False]
