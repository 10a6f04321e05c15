"""The CUDA device on a GPU: which SMs its slots run on, what they share, and that nothing is left of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from agentserve.core.batch import Lane
from agentserve.core.slots import PartitionTable, build_partition_table
from agentserve.executors.pytorch.devices import smid
from agentserve.executors.pytorch.devices.cuda import CudaDevice, CudaSlot
from agentserve.executors.pytorch.devices.cuda_runtime import cuda_obstacle
from agentserve.executors.pytorch.devices.green_plan import SlotMode

_OBSTACLE = cuda_obstacle()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_OBSTACLE is not None, reason=str(_OBSTACLE))]


def table_of(device: CudaDevice) -> PartitionTable:
    return build_partition_table(
        device.compute_units, device.unit_granularity, device.min_units, unused_units=device.unused_units
    )


@pytest.fixture(scope="module")
def real() -> Iterator[CudaDevice]:
    device = CudaDevice(slots="auto")
    if device.decision.mode is not SlotMode.GREEN:
        reason = device.decision.reason
        device.close()
        pytest.skip(reason)
    yield device
    device.close()


def test_realized_counts(real: CudaDevice) -> None:
    report = real.report()
    assert report.slots and all(slot.units == slot.realized_units for slot in report.slots)


def test_slots_of_a_partition_share_no_sm(real: CudaDevice) -> None:
    proofs = smid.prove(real, table_of(real))
    assert proofs and all(proof.complete and proof.disjoint for proof in proofs)


def test_the_whole_device_is_all_sms(real: CudaDevice) -> None:
    for lane in Lane:
        assert len(smid.which_sms(real, lane, real.compute_units)) == real.compute_units


def test_a_graph_runs_where_it_was_captured(real: CudaDevice) -> None:
    split = table_of(real).splits[0]
    decode, prefill = real.slot(Lane.DECODE, split.decode_units), real.slot(Lane.PREFILL, split.prefill_units)
    work, out = smid.probe(real)
    decode.run(work)  # compiled, and nothing left for the capture but the launch
    expected = smid.seen(out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=decode.stream):
        work()
    out.fill_(-1)
    real.synchronize()
    prefill.run(graph.replay)
    assert smid.seen(out) == expected


def test_two_lanes_at_once(real: CudaDevice) -> None:
    split = table_of(real).split_nearest(0.5)
    decode, prefill = real.slot(Lane.DECODE, split.decode_units), real.slot(Lane.PREFILL, split.prefill_units)
    values = torch.randn(1024, 1024, device=real.torch_device)
    expected = values @ values
    real.synchronize()
    results: dict[CudaSlot, list[torch.Tensor]] = {decode: [], prefill: []}
    fences = []
    for _ in range(20):
        for slot, own in results.items():
            fences.append(slot.launch(lambda own=own: own.append(values @ values)))
    for fence in fences:
        fence.wait()
    for own in results.values():
        assert len(own) == 20
        for result in own:
            torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-2)


def test_a_fence_orders_the_lanes(real: CudaDevice) -> None:
    split = table_of(real).split_nearest(0.5)
    decode, prefill = real.slot(Lane.DECODE, split.decode_units), real.slot(Lane.PREFILL, split.prefill_units)
    shared = torch.zeros(1, device=real.torch_device)
    real.synchronize()

    def slowly() -> None:
        torch.cuda._sleep(50_000_000)  # cycles: some 30 ms
        shared.fill_(1.0)

    fence = prefill.launch(slowly)
    assert not fence.done()
    decode.wait_for(fence)
    seen: list[torch.Tensor] = []
    decode.run(lambda: seen.append(shared.clone()))
    assert seen[0].item() == 1.0


def test_made_and_destroyed_fifty_times_without_a_leak(real: CudaDevice) -> None:
    real.synchronize()
    CudaDevice(slots="green").close()  # what the driver takes once and for all
    before = real.memory().free_bytes
    for _ in range(50):
        device = CudaDevice(slots="green")
        device.slot(Lane.DECODE, device.report().slots[0].units).run(lambda: None)
        device.close()
    leaked = before - real.memory().free_bytes
    assert leaked < 50 << 20, f"{leaked >> 20} MiB for 50 devices"


def test_memory_of_the_host_is_page_locked(real: CudaDevice) -> None:
    assert real.host_empty((16,), torch.float32).is_pinned()
