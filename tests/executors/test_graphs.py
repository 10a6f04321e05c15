"""The cache of CUDA graphs: what is captured, when, and within which limits."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agentserve.core.batch import Lane
from agentserve.errors import ConfigError
from agentserve.executors.pytorch.devices.cuda import CudaDevice, CudaSlot
from agentserve.executors.pytorch.devices.cuda_runtime import cuda_obstacle
from agentserve.executors.pytorch.devices.graphs import (
    DecodeGraphs,
    TorchGraphRuntime,
    batch_buckets,
    bucket_for,
)
from tests.executors.fake_cuda import A5000, FakeDriver
from tests.executors.fake_runtime import FakeRuntime


def test_buckets() -> None:
    assert batch_buckets(1) == (1,)
    assert batch_buckets(5) == (1, 2, 3, 4, 5)
    assert batch_buckets(32) == (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32)
    assert batch_buckets(9)[-2:] == (8, 9)
    with pytest.raises(ConfigError):
        batch_buckets(0)


@given(st.integers(1, 600), st.integers(1, 600))
def test_every_batch_has_a_bucket_that_is_not_much_larger(max_batch: int, batch: int) -> None:
    bucket = bucket_for(batch_buckets(max_batch), batch)
    if batch > max_batch:
        assert bucket is None
    else:
        assert bucket is not None and batch <= bucket <= min(max_batch, batch * 5 / 4)


@dataclass
class FakeGraph:
    work: Callable[[], None]
    log: list[str]

    def replay(self) -> None:
        self.log.append("replay")

    def reset(self) -> None:
        self.log.append("reset")


@dataclass
class FakeGraphRuntime:
    log: list[str] = field(default_factory=list)
    pools: list[object] = field(default_factory=list)
    captured: list[tuple[Any, object]] = field(default_factory=list)
    free: int = 1000

    def pool(self) -> object:
        self.pools.append(object())
        return self.pools[-1]

    def capture(self, stream: Any, pool: object, work: Callable[[], None]) -> FakeGraph:
        self.log.append("capture")
        self.captured.append((stream, pool))
        self.free -= 100
        work()
        return FakeGraph(work, self.log)

    def free_bytes(self) -> int:
        return self.free


class FullDevice(FakeGraphRuntime):
    def capture(self, stream: Any, pool: object, work: Callable[[], None]) -> FakeGraph:
        self.log.append("capture")
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_without_memory_for_a_graph_no_request_fails(device: CudaDevice) -> None:
    runtime, steps = FullDevice(), []
    graphs = DecodeGraphs(
        lambda _, rows: steps.append(rows), buckets=batch_buckets(8), max_graphs=9, max_bytes=1 << 30, runtime=runtime
    )
    slot = device.slot(Lane.DECODE, device.compute_units)
    for _ in range(5):
        assert graphs.enqueue(slot, 3) == 3
    assert steps == [3] * 5
    assert runtime.log == ["capture"]  # once: it is not tried again
    assert graphs.report().full and graphs.report().num_graphs == 0


class BrokenCapture:
    """torch.cuda.CUDAGraph whose capture is invalidated by an error, as by the driver."""

    log: ClassVar[list[str]] = []

    def capture_begin(self, **values: object) -> None:
        self.log.append(f"begin {values['capture_error_mode']}")

    def capture_end(self) -> None:
        self.log.append("end")
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


def test_a_step_that_fails_in_a_capture_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream stops capturing, and what is raised is the reason, not that the capture is broken."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", BrokenCapture)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    collects: list[bool] = []

    def work() -> None:
        collects.append(gc.isenabled())
        raise KeyError("a step")

    with pytest.raises(KeyError, match="a step"):
        TorchGraphRuntime().capture(None, None, work)
    assert BrokenCapture.log == ["begin thread_local", "end"]
    assert collects == [False] and gc.isenabled()  # nothing is freed in the middle of a capture
    with pytest.raises(RuntimeError, match="previous error"):
        TorchGraphRuntime().capture(None, None, lambda: None)


@pytest.fixture
def device() -> Any:
    made = CudaDevice(runtime=FakeRuntime(A5000, FakeDriver(A5000)))
    yield made
    made.close()


def graphs_of(runtime: FakeGraphRuntime, max_graphs: int = 100, max_bytes: int = 10_000) -> DecodeGraphs:
    def step(slot: CudaSlot, rows: int) -> None:
        runtime.log.append(f"step {rows}")

    return DecodeGraphs(step, buckets=batch_buckets(8), max_graphs=max_graphs, max_bytes=max_bytes, runtime=runtime)


def test_rare_entries_are_captured_at_their_third_use(device) -> None:
    runtime = FakeGraphRuntime()
    graphs = graphs_of(runtime)
    slot = device.slot(Lane.DECODE, 8)
    for _ in range(4):
        slot.run(lambda: graphs.enqueue(slot, 5))
    assert runtime.log == ["step 5", "step 5", "capture", "step 5", "replay", "replay"]
    report = graphs.report()
    assert (report.num_graphs, report.num_replays, report.num_eager, report.memory_bytes) == (1, 2, 2, 100)
    graphs.close()
    graphs.close()
    assert runtime.log[6:] == ["reset"]


def test_what_is_prepared_is_warmed_up_and_captured_largest_first(device) -> None:
    runtime = FakeGraphRuntime()
    graphs = graphs_of(runtime)
    slot = device.slot(Lane.DECODE, 64)
    graphs.prepare(slot, (1, 4))
    assert runtime.log == ["step 4", "capture", "step 4", "step 1", "capture", "step 1"]
    assert graphs.enqueue(slot, 4) == 4
    assert runtime.log[-1] == "replay"
    graphs.close()


def test_each_slot_has_graphs_and_a_pool_of_its_own_on_its_stream(device) -> None:
    runtime = FakeGraphRuntime()
    graphs = graphs_of(runtime)
    small, whole = device.slot(Lane.DECODE, 8), device.slot(Lane.DECODE, 64)
    for slot in (small, whole):
        graphs.prepare(slot, (1, 2))
    assert [stream for stream, _ in runtime.captured] == [small.stream, small.stream, whole.stream, whole.stream]
    first, second = runtime.pools
    assert [pool for _, pool in runtime.captured] == [first, first, second, second]
    assert graphs.report().num_graphs == 4
    graphs.close()


@pytest.mark.parametrize(("limits", "expected"), [({"max_graphs": 2}, 2), ({"max_bytes": 250}, 3)])
def test_limits(device, limits: dict[str, int], expected: int, caplog: pytest.LogCaptureFixture) -> None:
    runtime = FakeGraphRuntime()
    graphs = graphs_of(runtime, **limits)
    slot = device.slot(Lane.DECODE, 8)
    with caplog.at_level("INFO"):
        graphs.prepare(slot, batch_buckets(8))
    report = graphs.report()
    assert (report.num_graphs, report.full) == (expected, True)
    assert caplog.text.count("no more CUDA graphs") == 1
    runtime.log.clear()
    for _ in range(5):
        assert graphs.enqueue(slot, 1) == 1  # the smallest came too late
    assert runtime.log == ["step 1"] * 5
    graphs.close()


def test_a_batch_larger_than_all_buckets_runs_as_it_is(device) -> None:
    runtime = FakeGraphRuntime()
    graphs = graphs_of(runtime)
    slot = device.slot(Lane.DECODE, 8)
    assert [graphs.enqueue(slot, 9) for _ in range(4)] == [9] * 4
    assert runtime.log == ["step 9"] * 4
    graphs.close()


@pytest.mark.gpu
@pytest.mark.skipif(cuda_obstacle() is not None, reason=str(cuda_obstacle()))
def test_graphs_compute_what_eager_computes_in_every_slot() -> None:
    device = CudaDevice()
    weights = torch.randn(256, 256, device=device.torch_device)
    inputs = torch.randn(8, 256, device=device.torch_device)
    outputs = torch.empty_like(inputs)

    def step(slot: CudaSlot, rows: int) -> None:
        outputs[:rows].copy_(torch.relu(inputs[:rows] @ weights))

    graphs = DecodeGraphs(step, buckets=batch_buckets(8), max_graphs=1000, max_bytes=1 << 30)
    sizes = {device.compute_units} | {slot.units for slot in device.report().slots if slot.lane is Lane.DECODE}
    device.synchronize()
    for units in sorted(sizes):
        slot = device.slot(Lane.DECODE, units)
        graphs.prepare(slot, (1, 4, 8))
        for rows in (1, 3, 4, 8):
            inputs.normal_()
            expected = torch.relu(inputs @ weights)[:rows]
            device.synchronize()
            slot.run(lambda slot=slot, rows=rows: graphs.enqueue(slot, rows))
            torch.testing.assert_close(outputs[:rows], expected, rtol=1e-4, atol=1e-4)
    assert graphs.report().num_replays >= 3 * len(sizes)
    graphs.close()
    device.close()
