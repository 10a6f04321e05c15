"""Green Contexts on a driver of our own: what is made, of which SMs, and that all of it goes away again."""

from __future__ import annotations

import inspect

import pytest

from agentserve.core.batch import Lane
from agentserve.core.slots import build_partition_table
from agentserve.errors import ConfigError, EngineError
from agentserve.executors.pytorch.devices.cuda_driver import CudaDriver, CudaDriverError, CudaUnavailableError
from agentserve.executors.pytorch.devices.green_contexts import GreenContext, GreenContextPool, make_plan, read_facts
from agentserve.executors.pytorch.devices.green_plan import SplitMethod
from tests.executors.fake_cuda import A100, A5000, GPUS, H200, RTX4090, RTX5090, CUresult, FakeDriver, Gpu


def make_pool(fake: FakeDriver) -> GreenContextPool:
    driver = fake.driver()
    facts = read_facts(driver)
    return GreenContextPool(driver, facts, make_plan(driver, facts))


def check_disjoint(fake: FakeDriver, pool: GreenContextPool) -> None:
    """The SMs, not the counts."""
    plan = pool.plan
    table = build_partition_table(
        plan.compute_units, plan.unit_granularity, plan.min_units, unused_units=plan.unused_units
    )
    assert table.splits
    for split in table.splits:
        decode = fake.sms_of(pool.stream(Lane.DECODE, split.decode_units))
        prefill = fake.sms_of(pool.stream(Lane.PREFILL, split.prefill_units))
        assert (len(decode), len(prefill)) == (split.decode_units, split.prefill_units)
        assert not decode & prefill


# ---- facts ----


def test_facts_are_read() -> None:
    facts = read_facts(FakeDriver(H200, mps=True).driver())
    assert (facts.name, facts.compute_capability, facts.num_sms) == ("NVIDIA H200", (9, 0), 132)
    assert (facts.memory_bytes, facts.l2_bytes) == (141 << 30, 50 << 20)
    assert (facts.driver_version, facts.bindings_version, facts.can_split_unequal) == (13000, 13000, False)
    assert (facts.min_partition_sms, facts.coscheduled_alignment) == (8, 8)
    assert facts.mps and not facts.mig


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_bindings_without_the_fields_find_the_granularity_by_splitting(gpu: Gpu) -> None:
    facts = read_facts(FakeDriver(gpu, driver_version=12080, bindings_version=12080).driver())
    assert (facts.min_partition_sms, facts.coscheduled_alignment) == (gpu.min_partition, gpu.alignment)


def test_a_slice_of_a_gpu_is_known_by_its_name() -> None:
    slice_of_a100 = Gpu("NVIDIA A100-SXM4-40GB MIG 3g.20gb", (8, 0), (14, 14, 14), 4, 2)
    assert read_facts(FakeDriver(slice_of_a100).driver()).mig


def test_an_old_driver_is_not_asked_what_it_cannot_know() -> None:
    facts = read_facts(FakeDriver(A5000, driver_version=12020).driver())
    assert facts.min_partition_sms is None


def test_an_attribute_that_the_driver_does_not_know_is_not_set() -> None:
    fake = FakeDriver(A5000, mps=True)
    fake.fails["cuDeviceGetAttribute"] = (5, CUresult.CUDA_ERROR_INVALID_VALUE)  # the fifth that is asked for
    assert not read_facts(fake.driver()).mps


# ---- pools ----


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("version", [12080, 13000, 13010], ids=["12.8", "13.0", "13.1"])
def test_slots_of_a_partition_are_disjoint(gpu: Gpu, version: int) -> None:
    fake = FakeDriver(gpu, driver_version=version, bindings_version=version)
    pool = make_pool(fake)
    assert pool.plan.method is (SplitMethod.PAIRS if version >= 13010 else SplitMethod.GROUPS)
    assert pool.realized == {(spec.lane, spec.units): spec.units for spec in pool.plan.slots}
    check_disjoint(fake, pool)
    assert pool.memory_bytes == len(pool.plan.slots) << 20  # the fake takes 1 MiB for each
    assert pool.creation_ns > 0
    # Hardware queues can be had from 13.1 only.
    assert all(context.balanced == (version >= 13010) for context in fake.contexts())
    pool.close()
    pool.close()
    fake.assert_clean()


@pytest.mark.parametrize(
    ("gpu", "group", "num_groups", "remainder"),
    [(A5000, 4, 16, 0), (A100, 6, 18, 0), (RTX4090, 8, 16, 0), (RTX5090, 8, 21, 2), (H200, 8, 15, 12)],
    ids=lambda value: value.name if isinstance(value, Gpu) else "",
)
def test_the_split_of_each_gpu(gpu: Gpu, group: int, num_groups: int, remainder: int) -> None:
    fake = FakeDriver(gpu)
    driver = fake.driver()
    split = make_plan(driver, read_facts(driver)).split
    assert split is not None
    assert (split.group_sms, split.num_groups, split.remainder_sms) == (group, num_groups, remainder)
    assert split.remainder_joins == (remainder > 0)


def test_a_remainder_that_may_not_be_combined_stays_unused() -> None:
    fake = FakeDriver(H200, remainder_joins=False)
    pool = make_pool(fake)
    assert pool.plan.unused_units == 12
    check_disjoint(fake, pool)
    pool.close()
    fake.assert_clean()


def test_decode_goes_first() -> None:
    fake = FakeDriver(A5000)
    pool = make_pool(fake)
    priorities = {lane: {s.priority for s in fake.streams() if int(s) in own} for lane, own in streams(pool).items()}
    assert priorities == {Lane.DECODE: {-5}, Lane.PREFILL: {0}}
    pool.close()


def streams(pool: GreenContextPool) -> dict[Lane, set[int]]:
    return {lane: {pool.stream(*key) for key in pool.realized if key[0] is lane} for lane in Lane}


def test_streams_of_cuda_12_4_are_made_in_the_context() -> None:
    fake = FakeDriver(A5000, driver_version=12040, bindings_version=12040)
    pool = make_pool(fake)
    assert "cuGreenCtxStreamCreate" not in fake.calls
    check_disjoint(fake, pool)
    pool.close()
    fake.assert_clean()


def test_fifty_pools_leave_nothing_behind() -> None:
    fake = FakeDriver(H200)
    for _ in range(50):
        make_pool(fake).close()
    fake.assert_clean()


def test_everything_is_made_before_the_first_batch() -> None:
    fake = FakeDriver(H200)
    pool = make_pool(fake)
    fake.calls.clear()
    for lane, units in pool.realized:
        pool.stream(lane, units)
    assert fake.calls == []
    pool.close()


# ---- failures ----

_CREATION = (
    "cuDevicePrimaryCtxRetain",
    "cuCtxPushCurrent",
    "cuMemGetInfo",
    "cuCtxGetStreamPriorityRange",
    "cuDeviceGetDevResource",
    "cuDevSmResourceSplitByCount",
    "cuDevResourceGenerateDesc",
    "cuGreenCtxCreate",
    "cuGreenCtxGetDevResource",
    "cuGreenCtxStreamCreate",
)


@pytest.mark.parametrize("call", _CREATION)
@pytest.mark.parametrize("nth", [1, 2, 7])
def test_a_failure_half_way_leaves_nothing_behind(call: str, nth: int) -> None:
    fake = FakeDriver(A5000)
    driver = fake.driver()
    facts = read_facts(driver)
    plan = make_plan(driver, facts)
    before = fake.calls.count(call)
    fake.fails[call] = (before + nth, CUresult.CUDA_ERROR_OUT_OF_MEMORY)
    try:
        pool = GreenContextPool(driver, facts, plan)
    except CudaDriverError as error:
        assert (error.call, error.error) == (call, "CUDA_ERROR_OUT_OF_MEMORY")
        assert str(error) == f"{call} failed with CUDA_ERROR_OUT_OF_MEMORY: cuda error out of memory"
        assert isinstance(error, EngineError)
    else:
        assert fake.calls.count(call) - before < nth  # there was no such call
        fake.fails.clear()
        pool.close()
    fake.assert_clean()


def test_whoever_closes_has_the_primary_context() -> None:
    """It may be a thread that has none: the fake refuses to destroy anything there. Without one it is tried anyway."""
    fake = FakeDriver(A5000)
    pool = make_pool(fake)
    assert fake.current == []
    pool.close()
    fake.assert_clean()
    assert fake.calls[-2:] == ["cuCtxPopCurrent", "cuDevicePrimaryCtxRelease"]
    pool = make_pool(fake)
    fake.fails["cuCtxPushCurrent"] = (fake.calls.count("cuCtxPushCurrent") + 1, CUresult.CUDA_ERROR_ILLEGAL_ADDRESS)
    with pytest.raises(CudaDriverError, match="cuCtxPushCurrent failed with CUDA_ERROR_ILLEGAL_ADDRESS"):
        pool.close()
    fake.assert_clean()


@pytest.mark.parametrize("call", ["cuStreamSynchronize", "cuStreamDestroy", "cuGreenCtxDestroy"])
def test_what_cannot_be_destroyed_does_not_keep_the_rest(call: str) -> None:
    fake = FakeDriver(A5000)
    pool = make_pool(fake)
    num_contexts = len(fake.contexts())
    # A kernel crashed: from then on the driver refuses.
    fake.fails[call] = (3, CUresult.CUDA_ERROR_ILLEGAL_ADDRESS)
    with pytest.raises(CudaDriverError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        pool.close()
    assert fake.calls.count("cuGreenCtxDestroy") == num_contexts
    assert fake.num_retained == 0
    pool.close()  # nothing is tried twice
    assert fake.calls.count("cuGreenCtxDestroy") == num_contexts


def test_a_slot_of_another_size_is_an_error_not_a_surprise() -> None:
    fake = FakeDriver(A5000)
    driver = fake.driver()
    facts = read_facts(driver)
    plan = make_plan(driver, facts)
    fake.cuGreenCtxGetDevResource = lambda context, kind: fake._resource((1, 2), None)  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="a decode slot of 2 SMs where 8 were planned"):
        GreenContextPool(fake.driver(), facts, plan)
    fake.assert_clean()


def test_a_split_that_changed_its_mind_is_an_error() -> None:
    fake = FakeDriver(H200)
    driver = fake.driver()
    facts = read_facts(driver)
    plan = make_plan(driver, facts)
    other = FakeDriver(RTX5090)
    other.initialized = True
    with pytest.raises(EngineError, match="splits the device otherwise than a moment ago"):
        GreenContextPool(other.driver(), facts, plan)
    other.assert_clean()


def test_groups_of_two_splits_are_refused_by_the_driver() -> None:
    """The rule on which the plan rests."""
    fake = FakeDriver(A5000)
    driver = fake.driver()
    read_facts(driver)
    device = driver.call("cuDeviceGet", 0)
    sms = driver.call("cuDeviceGetDevResource", device, driver.enum("CUdevResourceType", 1))
    (first, *_), _, _ = driver.call("cuDevSmResourceSplitByCount", 4, sms, 0, 4)
    (_, second, *_), _, _ = driver.call("cuDevSmResourceSplitByCount", 4, sms, 0, 4)
    driver.call("cuDevicePrimaryCtxRetain", device)
    with pytest.raises(CudaDriverError, match="CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION"):
        GreenContext(driver, device, [first, second], 0)
    driver.call("cuDevicePrimaryCtxRelease", device)
    fake.assert_clean()


def test_a_device_that_cannot_be_split_is_refused() -> None:
    tiny = Gpu("Tiny", (9, 0), (6, 6, 6), 8, 8)  # 18 SMs, but no eight of them together
    driver = FakeDriver(tiny).driver()
    with pytest.raises(ConfigError, match="two groups"):
        make_plan(driver, read_facts(driver))


# ---- calls ----


def test_no_device_no_driver_no_function() -> None:
    driver = FakeDriver(A5000).driver()
    with pytest.raises(CudaDriverError, match="cuDeviceGet failed with CUDA_ERROR_INVALID_DEVICE"):
        read_facts(driver, 3)
    with pytest.raises(CudaUnavailableError, match="has no cuDevSmResourceSplit; a newer one is needed"):
        driver.call("cuDevSmResourceSplit", 1, None, 0, [])
    with pytest.raises(CudaUnavailableError, match="has no CU_DEV_SM_RESOURCE_GROUP_PARAMS"):
        driver.make("CU_DEV_SM_RESOURCE_GROUP_PARAMS")


def test_an_error_without_a_description() -> None:
    class Module:
        @staticmethod
        def cuInit(flags: int) -> tuple[int]:
            return (12345,)

        @staticmethod
        def cuGetErrorString(code: int) -> tuple[int, None]:
            return (1, None)

    with pytest.raises(CudaDriverError, match=r"cuInit failed with error 12345$"):
        CudaDriver(Module()).call("cuInit", 0)


def test_the_fake_takes_what_the_bindings_take() -> None:
    """Where cuda-python is installed, with or without a driver: the same functions, the same number of arguments."""
    bindings = pytest.importorskip("cuda.bindings.driver")
    fake = FakeDriver(A5000, bindings_version=bindings.CUDA_VERSION).module()
    names = [name for name in vars(fake) if name.startswith("cu") and name[2].isupper()]
    assert len(names) > 20
    for name in names:
        signature = str(getattr(bindings, name).__doc__).split("\n", 1)[0].removeprefix(f"{name}(").split(") ->")[0]
        depths = [signature[:at].count("[") - signature[:at].count("]") for at in range(len(signature))]
        commas = sum(letter == "," and depth == 0 for letter, depth in zip(signature, depths, strict=True))
        num_arguments = 0 if signature.strip(" )") == "" else commas + 1
        assert len(inspect.signature(getattr(FakeDriver, name)).parameters) - 1 == num_arguments, (name, signature)
    resource = bindings.CUdevResource()
    assert int(resource.type) == 0 and int(resource.sm.smCount) == 0
    assert bindings.CUdevice_attribute(133) and int(bindings.CUdevResourceType(1)) == 1
    assert int(bindings.CUstream(5)) == 5
