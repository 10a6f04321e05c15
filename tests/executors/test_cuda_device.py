"""The CUDA device on a driver and a runtime of our own, and on a machine without a GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import pytest
import torch

from agentserve.core.batch import Lane
from agentserve.core.slots import PartitionTable, build_partition_table
from agentserve.errors import ConfigError, EngineError
from agentserve.executors.pytorch.devices import cuda_driver, smid
from agentserve.executors.pytorch.devices.cpu import CpuDevice
from agentserve.executors.pytorch.devices.cuda import CudaDevice, describe_versions
from agentserve.executors.pytorch.devices.cuda_driver import CudaDriverError, CudaUnavailableError, load_driver
from agentserve.executors.pytorch.devices.cuda_runtime import TorchRuntime, cuda_obstacle
from agentserve.executors.pytorch.devices.green_contexts import read_facts
from agentserve.executors.pytorch.devices.green_plan import SlotMode
from agentserve.executors.pytorch.devices.interface import Device, FinishedFence
from agentserve.executors.pytorch.devices.memory import MemoryReading, kv_pool_bytes
from tests.executors.fake_cuda import A5000, H200, RTX5090, CUresult, FakeDriver
from tests.executors.fake_runtime import FakeRuntime

GPU_OBSTACLE = cuda_obstacle()
needs_no_gpu = pytest.mark.skipif(GPU_OBSTACLE is None, reason="there is a GPU")


def make(gpu=H200, slots: str = "auto", **driver: object) -> tuple[CudaDevice, FakeRuntime, FakeDriver]:
    fake = FakeDriver(gpu, **driver)  # type: ignore[arg-type]
    runtime = FakeRuntime(gpu, fake)
    return CudaDevice(slots=slots, runtime=runtime), runtime, fake


def table_of(device: Device) -> PartitionTable:
    return build_partition_table(
        device.compute_units, device.unit_granularity, device.min_units, unused_units=device.unused_units
    )


# ---- which slots there are ----


@pytest.mark.parametrize("gpu", [A5000, H200, RTX5090], ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("joins", [True, False])
def test_every_entry_of_the_partition_table_has_its_slots(gpu, joins: bool) -> None:
    device, _, fake = make(gpu, remainder_joins=joins)
    table = table_of(device)
    assert table.splits and device.decision.mode is SlotMode.GREEN
    for entry in table.entries:
        for lane in Lane:
            slot = device.slot(lane, entry.units(lane))
            assert (slot.units, slot.lane) == (entry.units(lane), lane)
            assert device.slot(lane, entry.units(lane)) is slot
    for split in table.splits:
        decode = fake.sms_of(device.slot(Lane.DECODE, split.decode_units).stream.handle)
        prefill = fake.sms_of(device.slot(Lane.PREFILL, split.prefill_units).stream.handle)
        assert not decode & prefill
    device.close()
    fake.assert_clean()


def test_the_whole_device_is_two_streams_of_which_decode_goes_first() -> None:
    device, _, _ = make()
    assert device.slot(Lane.DECODE, 132).stream.urgent is True
    assert device.slot(Lane.PREFILL, 132).stream.urgent is False
    assert device.compute_units == 132
    device.close()


def test_there_is_no_slot_of_another_size() -> None:
    device, _, _ = make(A5000)
    with pytest.raises(EngineError, match="no decode slot of 5 SMs, only of 8, 12"):
        device.slot(Lane.DECODE, 5)
    device.close()


@pytest.mark.parametrize("mode", ["stream", "off"])
def test_without_green_contexts_the_table_has_no_splits(mode: str) -> None:
    device, _, fake = make(slots=mode)
    assert device.decision.mode == mode and device.plan is None
    table = table_of(device)
    assert table.splits == () == table.caps
    device.slot(Lane.PREFILL, table.stream.prefill_units)
    assert "cuGreenCtxCreate" not in fake.calls
    assert device.report().slots == ()
    device.close()
    fake.assert_clean()


def test_a_report_says_what_came_to_be(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        device, _, _ = make(H200)
    report = device.report()
    assert {(slot.units, slot.realized_units) for slot in report.slots if slot.lane is Lane.DECODE} >= {(24, 24)}
    assert report.plan is not None and report.creation_ns > 0 and report.memory_bytes == len(report.slots) << 20
    assert device.description == "NVIDIA H200, 132 SMs, 141 GiB"
    assert describe_versions(report.facts) == "sm_90, driver of CUDA 13.0, cuda-python of CUDA 13.0"
    # The log says what was chosen, and why.
    assert "NVIDIA H200, 132 SMs, 141 GiB: Green Contexts, " in caplog.text
    assert "15 groups of 8 SMs, the remainder of 12 joins the prefill slots; made in " in caplog.text
    device.close()


# ---- what stands in the way ----


def test_auto_without_bindings_uses_streams_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    runtime = FakeRuntime(H200, None)
    with caplog.at_level("INFO"):
        device = CudaDevice(runtime=runtime)
    assert device.decision.mode is SlotMode.STREAM
    assert "both lanes use the whole device because cuda-python is not installed" in caplog.text
    assert (device.compute_units, device.facts.driver_version) == (132, None)
    assert describe_versions(device.facts) == "sm_90"
    device.close()
    with pytest.raises(ConfigError, match="cuda-python is not installed"):
        CudaDevice(slots="green", runtime=runtime)


def test_auto_goes_on_when_the_driver_refuses_and_green_does_not(caplog: pytest.LogCaptureFixture) -> None:
    for slots in ("auto", "green"):
        fake = FakeDriver(H200)
        fake.fails["cuGreenCtxCreate"] = (4, CUresult.CUDA_ERROR_NOT_SUPPORTED)
        runtime = FakeRuntime(H200, fake)
        if slots == "green":
            with pytest.raises(CudaDriverError, match="cuGreenCtxCreate failed with CUDA_ERROR_NOT_SUPPORTED"):
                CudaDevice(slots=slots, runtime=runtime)
        else:
            device = CudaDevice(slots=slots, runtime=runtime)
            assert device.decision.mode is SlotMode.STREAM
            assert "CUDA_ERROR_NOT_SUPPORTED" in device.decision.reason
            assert table_of(device).splits == ()
            device.close()
        fake.assert_clean()
    assert [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.mark.parametrize("values", [{"slots": "maybe"}, {"lookahead": 0}])
def test_wrong_options_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        CudaDevice(runtime=FakeRuntime(), **values)  # type: ignore[arg-type]


def test_a_failure_after_the_contexts_destroys_them() -> None:
    fake = FakeDriver(A5000)
    runtime = FakeRuntime(A5000, fake)

    def fail(index: int, *, urgent: bool) -> None:
        raise RuntimeError("out of streams")

    runtime.stream = fail  # type: ignore[method-assign,assignment]
    with pytest.raises(RuntimeError, match="out of streams"):
        CudaDevice(runtime=runtime)
    assert "cuGreenCtxCreate" in fake.calls
    fake.assert_clean()


# ---- work ----


@pytest.fixture
def on_fake() -> Iterator[tuple[CudaDevice, FakeRuntime, list[str]]]:
    device, runtime, fake = make(A5000)
    yield device, runtime, []
    device.close()
    fake.assert_clean()


def test_run_returns_when_the_device_is_done(on_fake) -> None:
    device, runtime, log = on_fake
    device.slot(Lane.DECODE, 8).run(lambda: runtime.enqueue(lambda: log.append("kernel")))
    assert log == ["kernel"]
    assert runtime.current is None


def test_launch_returns_before_the_device_is_done(on_fake) -> None:
    device, runtime, log = on_fake
    fence = device.slot(Lane.DECODE, 8).launch(lambda: runtime.enqueue(lambda: log.append("kernel")))
    assert log == [] and not fence.done()
    fence.wait()
    assert log == ["kernel"] and fence.done()
    fence.wait()
    assert fence.event.num_sleeps == 1  # who comes late does not sleep


def test_batches_of_a_lane_stay_in_order_through_changes_of_its_slot(on_fake) -> None:
    device, runtime, log = on_fake
    names = [f"{units}-{i}" for i, units in enumerate((8, 64, 64, 20, 8, 20))]
    for name in names:
        slot = device.slot(Lane.DECODE, int(name.split("-")[0]))
        fence = slot.launch(lambda name=name: runtime.enqueue(lambda: log.append(name)))
    fence.wait()
    assert log == names


def test_lanes_are_ordered_by_fences_only(on_fake) -> None:
    device, runtime, log = on_fake
    decode, prefill = device.slot(Lane.DECODE, 20), device.slot(Lane.PREFILL, 44)

    def kernel(name: str) -> Callable[[], None]:
        return lambda: runtime.enqueue(lambda: log.append(name))

    fence = prefill.launch(kernel("prefill 1"))
    before = decode.launch(kernel("decode 1"))
    decode.wait_for(fence)
    decode.launch(kernel("decode 2"))
    prefill.launch(kernel("prefill 2"))
    before.wait()
    assert log.index("decode 1") == len(log) - 1  # it did not need the fence
    device.synchronize()
    assert log.index("prefill 1") < log.index("decode 2")
    decode.wait_for(FinishedFence())


def test_work_that_fails_is_drained_before_its_memory_is_given_back(on_fake) -> None:
    device, runtime, log = on_fake

    def work() -> None:
        runtime.enqueue(lambda: log.append("first half"))
        raise ValueError("second half")

    slot = device.slot(Lane.DECODE, 8)
    with pytest.raises(ValueError, match="second half"):
        slot.launch(work)
    assert log == ["first half"] and runtime.current is None
    slot.run(lambda: runtime.enqueue(lambda: log.append("well again")))
    assert log[-1] == "well again"


def test_errors_of_the_device_come_out_where_it_is_waited_for(on_fake) -> None:
    device, runtime, _ = on_fake
    fence = device.slot(Lane.DECODE, 8).launch(lambda: runtime.enqueue(lambda: None))
    runtime.broken = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        fence.wait()
    runtime.broken = None


def test_choosing_another_partition_asks_the_driver_nothing() -> None:
    device, _, fake = make(H200)
    fake.calls.clear()
    for split in table_of(device).splits:
        device.slot(Lane.DECODE, split.decode_units).run(lambda: None)
    assert fake.calls == []
    device.close()


def test_close_waits_first_and_may_be_called_twice() -> None:
    device, runtime, fake = make(A5000)
    log: list[str] = []
    device.slot(Lane.PREFILL, 64).launch(lambda: runtime.enqueue(lambda: log.append("kernel")))
    device.close()
    device.close()
    assert log == ["kernel"] and runtime.log.count("synchronize") == 1
    fake.assert_clean()


def test_lookahead_and_memory() -> None:
    device, _, _ = make(A5000)
    assert device.lookahead == 2 and device.torch_device == torch.device("cuda", 0)
    assert device.memory() == MemoryReading(24 << 30, 12 << 30)
    device.close()


# ---- memory ----


def test_the_pool_is_what_weights_and_activations_leave() -> None:
    # 0.9 * 1000 - (1000 - 600) - 50 = 450: four blocks of 100.
    assert kv_pool_bytes(MemoryReading(1000, 600), 0.9, block_bytes=100, reserve_bytes=50) == 400
    assert kv_pool_bytes(MemoryReading(1000, 1000), 1.0, block_bytes=100) == 1000


def test_what_does_not_fit_is_refused_with_the_sum() -> None:
    gib = 1 << 30
    reading = MemoryReading(24 * gib, 6 * gib)
    with pytest.raises(ConfigError) as caught:  # 21.6 - 18 - 2 = 1.6
        kv_pool_bytes(reading, 0.9, block_bytes=gib // 10, reserve_bytes=2 * gib, min_blocks=20)
    assert "90% of 24.00 GiB less 18.00 GiB in use and 2.00 GiB in reserve leave 1.60 GiB" in str(caught.value)
    assert "at least 2.00 GiB are needed" in str(caught.value)
    with pytest.raises(ConfigError, match=r"leave 0\.00 GiB"):
        kv_pool_bytes(MemoryReading(100, 0), 0.5, block_bytes=1)


@pytest.mark.parametrize("utilization", [0.0, -1.0, 1.01])
def test_a_share_is_a_share(utilization: float) -> None:
    with pytest.raises(ConfigError, match="--gpu-memory-utilization"):
        kv_pool_bytes(MemoryReading(100, 100), utilization, block_bytes=1)


# ---- this machine ----


@needs_no_gpu
def test_without_a_gpu_the_device_says_why() -> None:
    with pytest.raises(ConfigError, match="there is no GPU to compute on: "):
        CudaDevice()
    with pytest.raises(ConfigError):
        TorchRuntime().initialize(0)


@needs_no_gpu
def test_real_bindings_without_a_driver_are_one_clear_error() -> None:
    pytest.importorskip("cuda.bindings.driver", reason="cuda-python is not installed")
    driver = load_driver()
    assert driver.bindings_version >= 12040
    # Whatever the bindings raise when there is no libcuda, or the driver returns when there is no device.
    with pytest.raises((CudaUnavailableError, CudaDriverError), match="cuInit"):
        read_facts(driver)


def test_real_bindings_have_what_is_asked_of_them() -> None:
    """Names and numbers that the fake takes for granted."""
    module = pytest.importorskip("cuda.bindings.driver", reason="cuda-python is not installed")
    names = {name for name in dir(FakeDriver) if name.startswith("cu") and name[2].isupper()}
    if module.CUDA_VERSION < 13010:
        names -= {"cuDevSmResourceSplit"}
    assert not {name for name in names if not hasattr(module, name)}
    assert module.CUdevResourceType(1).name == "CU_DEV_RESOURCE_TYPE_SM"
    assert module.CUdevice_attribute(133).name == "CU_DEVICE_ATTRIBUTE_MPS_ENABLED"
    assert module.CUdevice_attribute(16).name == "CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT"
    assert module.CUdevice_attribute(38).name == "CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE"
    assert int(module.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM) == 1
    assert int(module.CUstream_flags.CU_STREAM_NON_BLOCKING) == 1
    assert int(module.CUresult.CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION) == 915
    resource = module.CUdevResource()
    resource.sm.smCount = 24
    assert (resource.sm.smCount, int(resource.type)) == (24, 0)
    if module.CUDA_VERSION >= 13010:
        resource.wqConfig.sharingScope = module.CUdevWorkqueueConfigScope(1)
        resource.wqConfig.wqConcurrencyLimit = 1
        assert resource.wqConfig.sharingScope.name == "CU_WORKQUEUE_SCOPE_GREEN_CTX_BALANCED"
        group = module.CU_DEV_SM_RESOURCE_GROUP_PARAMS()
        group.smCount, group.flags = 8, 1
        assert module.CUdevSmResourceGroup_flags(group.flags).name == "CU_DEV_SM_RESOURCE_GROUP_BACKFILL"


def test_without_bindings_the_driver_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in cuda_driver._MODULES:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(CudaUnavailableError, match="cuda-python is not installed"):
        load_driver()


# ---- the probe ----


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 120])
def test_the_probe_compiles_for_every_gpu(capability: int) -> None:
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    compiler = pytest.importorskip("triton.backends.compiler")
    from agentserve.executors.pytorch.devices.smid_kernel import write_smid  # noqa: PLC0415 - needs Triton

    source = triton.compiler.ASTSource(write_smid, signature={"out": "*i32", "hold_ns": "i32"}, constexprs={})
    target = compiler.GPUTarget("cuda", capability, 32)
    ptx = triton.compile(source, target=target, options={"num_warps": 1}).asm["ptx"]
    assert ptx.count("%smid;") == 1
    assert ptx.count("%globaltimer;") == 2  # before the loop and in it


def test_without_triton_the_probe_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "agentserve.executors.pytorch.devices.smid_kernel", None)
    device = CpuDevice()
    with pytest.raises(EngineError, match="without Triton"):
        smid.which_sms(device, Lane.DECODE, 1)
    device.close()


def test_a_proof_is_complete_or_not() -> None:
    (split,) = build_partition_table(2, 1, 1).splits
    assert smid.PartitionProof(split, frozenset({0}), frozenset({1})).complete
    assert smid.PartitionProof(split, frozenset({0}), frozenset({1})).disjoint
    assert not smid.PartitionProof(split, frozenset({0}), frozenset({0})).disjoint
    assert not smid.PartitionProof(split, frozenset({0, 1}), frozenset({1})).complete
    assert smid.seen(torch.tensor([3, 3, 1])) == {1, 3}
    with pytest.raises(EngineError, match="did not run"):
        smid.seen(torch.tensor([3, -1]))
