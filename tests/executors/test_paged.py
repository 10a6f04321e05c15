"""Attention over blocks: inputs, padding, mixed batches, steps that can be captured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agentserve.core.batch import PENDING_TOKEN, Batch, Lane
from agentserve.core.slots import PartitionKind, SlotPartition
from agentserve.executors.pytorch.attention.inputs import DeviceInputs, HostInputs, InputSizes
from agentserve.executors.pytorch.attention.paged import PagedBackend, table_width
from agentserve.executors.pytorch.attention.paged_kernels import (
    AttentionShape,
    BatchPlan,
    TorchKernels,
    page_lists,
)
from agentserve.executors.pytorch.devices.cpu import CpuDevice
from agentserve.executors.pytorch.paged_pool import PagedPool
from agentserve.executors.pytorch.runner import ModelRunner
from agentserve_kernels.blocks import gather_blocks, scatter_blocks
from tests.contract.harness import chunk, greedy, spec
from tests.executors.builders import TINY, Generation, tiny_llama
from tests.kernels.interpreter import interpreted
from tests.models.reference import DenseCache

BLOCK_SIZE = 4
NUM_BLOCKS = 64
SHAPE = AttentionShape.of(TINY, BLOCK_SIZE, torch.float32)


class CapturableKernels(TorchKernels):
    """The reference, as if it could be captured; remembers its plans."""

    capturable = True

    def __init__(self) -> None:
        super().__init__(SHAPE)
        self.plans: list[BatchPlan] = []

    def plan(self, batch: BatchPlan) -> None:
        self.plans.append(batch)


def make_backend(make_kernels: Callable[[], TorchKernels] | None = None, lookahead: int = 2) -> PagedBackend:
    device = CpuDevice([0])
    pool = PagedPool(TINY, device, torch.float32, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
    return PagedBackend(
        pool,
        device,
        make_kernels or (lambda: TorchKernels(SHAPE)),
        max_num_seqs=8,
        max_model_len=TINY.max_position_embeddings,
        lookahead=lookahead,
    )


def open_batch(backend: PagedBackend, chunks, sources=None, lane: Lane = Lane.DECODE):
    return backend.open(lane, chunks, sources or [-1] * len(chunks), 1)


NOTHING = torch.zeros(8, dtype=torch.int64)


# ---- inputs ----


@pytest.mark.parametrize("sizes", [InputSizes(3, 0, 0, 16), InputSizes(0, 2, 11, 32), InputSizes(5, 1, 3, 16)])
def test_host_and_device_see_the_same_arrays(sizes):
    host = HostInputs(torch.empty(sizes.num_bytes, dtype=torch.uint8), sizes)
    device = DeviceInputs(torch.empty(sizes.num_bytes, dtype=torch.uint8), sizes)
    names = ["token_ids", "positions", "slots", "sources", "kv_lengths", "query_starts", "block_tables"]
    for mark, name in enumerate(names):
        getattr(host, name)[:] = mark * 1000 + np.arange(getattr(host, name).size).reshape(getattr(host, name).shape)
    device.buffer.copy_(host.buffer)
    for name in names:
        assert getattr(device, name).tolist() == getattr(host, name).tolist(), name
        assert (getattr(device, name).data_ptr() - device.buffer.data_ptr()) % 16 == 0
    assert device.block_tables.shape == (sizes.num_sequences, sizes.width)
    assert len(device.token_ids) == sizes.num_singles + sizes.num_chunk_rows


def test_a_decode_step_is_padded_to_its_bucket():
    kernels = CapturableKernels()
    backend = make_backend(lambda: kernels)
    # Positions 4 and 9: the fifth and the tenth token.
    chunks = [chunk(f"r{i}", [50 + i], range(10 * i, 10 * i + 10), start=start) for i, start in enumerate((4, 9))]
    chunks += [chunk(f"p{i}", [60 + i], [40 + i], start=0) for i in range(7 - len(chunks))]
    batch = open_batch(backend, chunks)
    inputs = batch._inputs
    assert backend.buckets == (1, 2, 3, 4, 5, 6, 7, 8)
    assert batch.num_rows == 7 and batch.is_static
    batch = open_batch(backend, chunks[:3])
    assert inputs.token_ids.data_ptr() == batch._inputs.token_ids.data_ptr()  # the same memory each time
    token_ids, positions = batch.inputs(NOTHING)
    assert (token_ids.tolist(), positions.tolist()) == ([50, 51, 60], [4, 9, 0])
    # Block 1 of the first holds token 4 at offset 0: 1 * 4 + 0; block 12 of the second token 9 at offset 1; 40 * 4.
    assert batch._inputs.slots.tolist() == [4, 49, 160]
    assert batch._inputs.kv_lengths.tolist() == [5, 10, 1]
    assert batch._inputs.block_tables[1, :3].tolist() == [10, 11, 12]
    assert batch.last_rows == [0, 1, 2]
    assert kernels.plans[-1].kv_lengths == [5, 10, 1] and kernels.plans[-1].is_static


def test_rows_of_padding_are_harmless():
    backend = make_backend(CapturableKernels)
    before = backend._pool.pages[:NUM_BLOCKS].fill_(7.0).clone()
    backend.pad(Lane.DECODE, 3, 1)
    batch = backend.batch(Lane.DECODE, 3)
    token_ids, positions = batch.inputs(NOTHING)
    assert (token_ids.tolist(), positions.tolist()) == ([0, 0, 0], [0, 0, 0])
    assert batch._inputs.kv_lengths.tolist() == [0, 0, 0]
    heads = torch.randn(3, 10, 8)
    with torch.inference_mode():
        out = batch.attention.attend(0, heads[:, :6], heads[:, 6:8], heads[:, 8:])
    assert torch.equal(out, torch.zeros(3, 48))
    assert torch.equal(backend._pool.pages[:NUM_BLOCKS], before)


def test_pending_tokens_are_filled_in_from_the_last_batch():
    backend = make_backend()
    carried = torch.tensor([100, 101, 102, 0, 0, 0, 0, 0])
    singles = [chunk("a", [PENDING_TOKEN], [0, 1], start=5), chunk("b", [9], [2, 3], start=5)]
    batch = open_batch(backend, singles, [2, -1])
    assert batch.inputs(carried)[0].tolist() == [102, 9]
    # Beside a chunk of a prompt, which comes behind them in the flat batch.
    mixed = open_batch(backend, [chunk("p", [5, 6, 7], [4]), *singles], [-1, 1, -1])
    assert not mixed.is_static
    assert mixed.inputs(carried)[0].tolist() == [101, 9, 5, 6, 7]
    assert mixed.last_rows == [4, 0, 1]


def test_block_tables_grow_and_change():
    backend = make_backend()

    def table(*block_ids: int) -> list[int]:
        batch = open_batch(backend, [chunk("a", [1], block_ids, start=4 * len(block_ids) - 1)])
        return batch._inputs.block_tables[0, : len(block_ids)].tolist()

    assert table(7, 3) == [7, 3]
    assert table(7, 3, 9) == [7, 3, 9]
    assert table(7, 3) == [7, 3]  # back, as after a preemption
    assert table(8, 3, 9) == [8, 3, 9]
    backend.forget(["a", "nobody"])
    assert not backend._tables._entries
    assert table(5) == [5]


def test_two_batches_in_flight_do_not_share_host_memory():
    backend = make_backend(lookahead=2)
    state = backend._lanes[Lane.DECODE]
    first, second = (buffer.data_ptr() for buffer in state._host_buffers)
    assert first != second
    prefill = backend._lanes[Lane.PREFILL]
    assert {buffer.data_ptr() for buffer in prefill._host_buffers}.isdisjoint({first, second})
    assert prefill.kernels is not state.kernels


def test_lists_of_pages():
    tables = [np.array([5, 6, 7], np.int32), np.array([9], np.int32), np.array([2, 3], np.int32)]
    # 9 tokens: 3 blocks with 1 in the last; 4: a full one; 3 of a table that has a block more than it needs.
    starts, indices, last = page_lists(tables, [9, 4, 3], 4)
    assert (starts.tolist(), indices.tolist(), last.tolist()) == ([0, 3, 4, 5], [5, 6, 7, 9, 2], [1, 4, 3])
    assert {t.dtype for t in (starts, indices, last)} == {torch.int32}


def test_the_width_of_tables():
    assert table_width(1, 16) == 16  # 1 block, rounded up
    assert table_width(4096, 16) == 256
    assert table_width(4097, 16) == 272


# ---- attention ----


@settings(max_examples=30)
@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=4))
def test_attention_equals_the_definition(plan):
    """Each sequence comes in chunks of the given sizes; in each round all that are left are one batch."""
    torch.manual_seed(sum(map(sum, plan)))
    backend, reference = make_backend(), DenseCache()
    starts = [0] * len(plan)
    for turn in range(max(map(len, plan))):
        alive = [i for i, sizes in enumerate(plan) if turn < len(sizes)]
        chunks = [chunk(str(i), [0] * plan[i][turn], range(16 * i, 16 * i + 16), start=starts[i]) for i in alive]
        with torch.inference_mode():
            batch = open_batch(backend, chunks)
            batch.inputs(NOTHING)
            theirs = reference.batch(*[(c.request_id, c.num_tokens) for c in chunks])
            for layer in range(TINY.num_layers):
                heads = torch.randn(batch.num_rows, 10, 8)
                ours = batch.attention.attend(layer, heads[:, :6], heads[:, 6:8], heads[:, 8:])
                # The order of the chunks is another one there.
                rows = [
                    row
                    for c, last in zip(chunks, batch.last_rows, strict=True)
                    for row in range(last - c.num_tokens + 1, last + 1)
                ]
                expected = theirs.attend(layer, heads[rows, :6], heads[rows, 6:8], heads[rows, 8:])
                torch.testing.assert_close(ours[rows], expected, atol=1e-5, rtol=1e-5)
        for i, c in zip(alive, chunks, strict=True):
            starts[i] = c.end


# ---- captured steps ----


class ReplayedSteps:
    """Calls steps where graphs would be replayed, and counts; a stand-in for `DecodeGraphs`."""

    def __init__(self, step: Callable[..., None], buckets: tuple[int, ...]) -> None:
        self.step = step
        self.buckets = buckets
        self.prepared: list[int] = []
        self.enqueued: list[int] = []
        self.closed = False

    def enqueue(self, slot, num_rows: int) -> int:
        self.enqueued.append(num_rows)
        self.step(slot, num_rows)
        self.step(slot, num_rows)  # capturing calls it more than once
        return num_rows

    def prepare(self, slot, buckets: Iterable[int]) -> None:
        for bucket in buckets:
            self.prepared.append(bucket)
            slot.run(lambda bucket=bucket: self.inference(slot, bucket))

    def inference(self, slot, bucket: int) -> None:
        with torch.inference_mode():
            self.step(slot, bucket)

    def close(self) -> None:
        self.closed = True


def test_decode_steps_go_through_the_graphs():
    """Mixed batches and the other lane do not; the tokens are the same."""
    device = CpuDevice([0])
    made: list[ReplayedSteps] = []

    def make_graphs(step, buckets):
        made.append(ReplayedSteps(step, buckets))
        return made[-1]

    outputs = []
    for graphs in (None, make_graphs):
        backend = make_backend(CapturableKernels)
        runner = ModelRunner(tiny_llama(), backend, device, max_num_seqs=8, lookahead=1, make_graphs=graphs)
        slots = {lane: device.slot(lane, 1) for lane in Lane}
        runner.prepare_graphs([slots[Lane.DECODE]])
        a, b, c = (Generation(name, [3, 1, 4, 1, 5], range(9 * i, 9 * i + 9)) for i, name in enumerate("abc"))
        turns = [([a, b], Lane.PREFILL), ([a, b], Lane.DECODE), ([a, c, b], Lane.DECODE), ([c, a, b], Lane.DECODE)]
        turns += [([b], Lane.PREFILL), ([c, b], Lane.DECODE)]
        for number, (sequences, lane) in enumerate(turns):
            chunks = tuple(sequence.next_chunk() for sequence in sequences)
            batch = Batch(number, lane, SlotPartition(1, 1, PartitionKind.WHOLE), False, chunks)
            launched = []
            slots[lane].run(lambda b=batch, s=slots[lane], r=runner, into=launched: into.append(r.launch(b, s)))
            for sequence, sample in zip(sequences, runner.read(launched[0]), strict=True):
                sequence.num_computed = len(sequence.token_ids)
                sequence.token_ids.append(sample.token_id)
        runner.close()
        outputs.append([g.output for g in (a, b, c)])
    device.close()
    assert outputs[0] == outputs[1]
    (graphs,) = made
    assert graphs.prepared == [8, 7, 6, 5, 4, 3, 2, 1]
    # [a, b], not [a, c, b] with the prompt of c, then [c, a, b], [c, b].
    assert graphs.enqueued == [2, 3, 2]
    assert graphs.closed


def test_a_step_with_a_row_that_is_not_sampled():
    """Rows of prompts that are read one token at a time lie between the others."""
    device = CpuDevice([0])
    backend = make_backend(CapturableKernels)
    runner = ModelRunner(tiny_llama(), backend, device, max_num_seqs=8, lookahead=1, make_graphs=ReplayedSteps)
    chunks = (
        chunk("p", [8], [20], start=0),
        chunk("a", [3], [0], sample=spec(greedy())),
        chunk("q", [9], [30], start=0),
        chunk("b", [4], [10], sample=spec(greedy())),
    )
    slot = device.slot(Lane.DECODE, 1)
    partition = SlotPartition(1, 1, PartitionKind.WHOLE)
    together = runner.read(runner.launch(Batch(0, Lane.DECODE, partition, False, chunks), slot))
    alone = [
        runner.read(runner.launch(Batch(1, Lane.PREFILL, partition, False, (c,)), slot))[0]
        for c in chunks
        if c.sample is not None
    ]
    device.close()
    assert list(together) == alone and [sample.request_id for sample in together] == ["a", "b"]


def test_the_reference_cannot_be_captured():
    backend = make_backend()
    assert backend.static_steps is None
    assert not open_batch(backend, [chunk("a", [1], [0])]).is_static


def test_blocks_of_the_pool_go_to_staging_memory_and_back():
    """What moves between tiers will do: the kernels over the pool of the executor and the device's staging memory."""
    device = CpuDevice()
    try:
        config = replace(TINY, head_dim=16)
        pool = PagedPool(config, device, torch.bfloat16, num_blocks=6, block_size=8)
        pool.pages.copy_(torch.arange(pool.pages.numel()).view(pool.pages.shape))
        before = pool.pages.clone()
        staging = device.host_empty((3, *pool.pages.shape[1:]), torch.bfloat16)
        with interpreted():
            gather_blocks(pool.pages, torch.tensor([4, 0, 2], dtype=torch.int32), staging, num_units=2)
            pool.pages.zero_()
            scatter_blocks(staging, torch.tensor([1, 0, 5], dtype=torch.int32), pool.pages, num_units=2)
    finally:
        device.close()
    assert torch.equal(pool.pages[[1, 0, 5]], before[[4, 0, 2]])
    assert not pool.pages[[2, 3, 4, 6]].any()
