"""Green Contexts: made at start-up, each with one stream, destroyed in the right order.

A Green Context is a share of a GPU's SMs. What is launched on its stream runs on those SMs; memory, modules and events
are those of the primary context, so that no context has to be made current to use it. What to make is decided in
`green_plan`; here the driver is asked for the facts, and the plan is carried out.

The order matters: the primary context is retained first (each Green Context would otherwise bring it up and take it
down again), a stream is destroyed before its context (the driver does not do it, and the stream of a dead context is of
no use), the primary context is released last. Descriptors live as long as the process; the driver has no call that
frees them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from agentserve.core.batch import Lane
from agentserve.errors import EngineError
from agentserve.executors.pytorch.devices.cuda_driver import CudaDriver, CudaDriverError
from agentserve.executors.pytorch.devices.green_plan import (
    FIRST_DRIVER,
    DeviceFacts,
    GreenPlan,
    SlotSpec,
    SplitFacts,
    SplitMethod,
    candidate_group_sizes,
    choose_split,
    plan_groups,
    plan_pairs,
)

# Numbers of the driver's interface, which do not change between versions while some of their names do.
_SM_RESOURCE, _WORKQUEUE_CONFIG = 1, 1000  # CUdevResourceType
_DEFAULT_STREAM = 1  # CUgreenCtxCreate_flags: the only kind that cuGreenCtxCreate makes before CUDA 13
_NON_BLOCKING = 1  # CUstream_flags; cuGreenCtxStreamCreate takes no other
_BACKFILL = 1  # CUdevSmResourceGroup_flags
_BALANCED = 1  # CUdevWorkqueueConfigScope: no two contexts share a hardware queue if that can be had
_L2_BYTES, _SM_COUNT, _MAJOR, _MINOR, _MPS = 38, 16, 75, 76, 133  # CUdevice_attribute
_UNSUITABLE = "CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION"
_LONGEST_NAME = 256


# ---- facts ----


def read_facts(driver: CudaDriver, ordinal: int = 0) -> DeviceFacts:
    """What the driver says about a device.

    Raises CudaUnavailableError or CudaDriverError.
    """
    driver.call("cuInit", 0)
    device = driver.call("cuDeviceGet", ordinal)

    def attribute(number: int) -> int:
        return int(driver.call("cuDeviceGetAttribute", driver.enum("CUdevice_attribute", number), device))

    name = driver.call("cuDeviceGetName", _LONGEST_NAME, device).split(b"\0")[0].decode(errors="replace")
    facts = DeviceFacts(
        name=name,
        compute_capability=(attribute(_MAJOR), attribute(_MINOR)),
        num_sms=attribute(_SM_COUNT),
        memory_bytes=int(driver.call("cuDeviceTotalMem", device)),
        l2_bytes=attribute(_L2_BYTES),
        driver_version=int(driver.call("cuDriverGetVersion")),
        bindings_version=driver.bindings_version,
        can_split_unequal=driver.has("cuDevSmResourceSplit"),
        mps=_is_shared_through_mps(driver, device),
        mig=" MIG " in f" {name} ",
    )
    if not driver.has("cuDevSmResourceSplitByCount") or (facts.driver_version or 0) < FIRST_DRIVER:
        return facts
    smallest, alignment = _granularity(driver, _all_sms(driver, device))
    return replace(facts, min_partition_sms=smallest, coscheduled_alignment=alignment)


def make_plan(driver: CudaDriver, facts: DeviceFacts, ordinal: int = 0) -> GreenPlan:
    """Asks the driver what splits it offers, and plans the slots.

    Raises ConfigError if the device is too small, CudaDriverError if the driver refuses.
    """
    device = driver.call("cuDeviceGet", ordinal)
    sms = _all_sms(driver, device)
    if facts.splits_unequal:
        groups, _ = _split_unequal(driver, sms, (0,))  # 0: as many as there are
        return plan_pairs(facts, int(groups[0].sm.smCount))
    return plan_groups(facts, choose_split([_probe(driver, sms, size) for size in candidate_group_sizes(facts)]))


def _is_shared_through_mps(driver: CudaDriver, device: Any) -> bool:
    try:
        attribute = driver.enum("CUdevice_attribute", _MPS)
    except ValueError:
        return False  # bindings from before the attribute: they cannot ask
    try:
        return bool(driver.call("cuDeviceGetAttribute", attribute, device))
    except CudaDriverError as error:
        if error.error != "CUDA_ERROR_INVALID_VALUE":
            raise
        return False  # a driver from before the attribute


def _granularity(driver: CudaDriver, sms: Any) -> tuple[int, int]:
    """Smallest partition and alignment. CUDA 12 has no fields for them, but a split shows them."""
    smallest, alignment = (int(getattr(sms.sm, name, 0)) for name in ("minSmPartitionSize", "smCoscheduledAlignment"))
    if smallest > 0 and alignment > 0:
        return smallest, alignment
    smallest = int(_split_by_count(driver, sms, 1, 1)[0][0].sm.smCount)
    return smallest, int(_split_by_count(driver, sms, 1, smallest + 1)[0][0].sm.smCount) - smallest


def _probe(driver: CudaDriver, sms: Any, group_sms: int) -> SplitFacts:
    """What becomes of a split into groups of a size. Splits are descriptions: nothing is reserved by them."""
    try:
        _, num_groups, _ = driver.call("cuDevSmResourceSplitByCount", 0, sms, 0, group_sms)  # 0: only counts
        groups, remainder = _split_by_count(driver, sms, int(num_groups), group_sms)
    except CudaDriverError as error:
        if error.error != _UNSUITABLE:
            raise
        return SplitFacts(group_sms, 0, 0, remainder_joins=False)
    remainder_sms = _count(remainder)
    return SplitFacts(
        group_sms=int(groups[0].sm.smCount) if groups else group_sms,
        num_groups=len(groups),
        remainder_sms=remainder_sms,
        remainder_joins=bool(groups and remainder_sms) and _may_be_combined(driver, [groups[-1], remainder]),
    )


def _may_be_combined(driver: CudaDriver, resources: list[Any]) -> bool:
    """The rule (the same split, the same alignment) has exceptions for remainders: the driver is asked instead."""
    try:
        driver.call("cuDevResourceGenerateDesc", resources, len(resources))
    except CudaDriverError as error:
        if error.error != _UNSUITABLE:
            raise
        return False
    return True


# ---- splits ----


def _all_sms(driver: CudaDriver, device: Any) -> Any:
    return driver.call("cuDeviceGetDevResource", device, driver.enum("CUdevResourceType", _SM_RESOURCE))


def _split_by_count(driver: CudaDriver, sms: Any, num_groups: int, min_sms: int) -> tuple[list[Any], Any]:
    """Equal groups, and what is left over."""
    groups, num_made, remainder = driver.call("cuDevSmResourceSplitByCount", num_groups, sms, 0, min_sms)
    return list(groups)[: int(num_made)], remainder


def _split_unequal(driver: CudaDriver, sms: Any, sizes: Sequence[int]) -> tuple[list[Any], Any]:
    """A group of each size. The last of several may have SMs from anywhere: it takes the rest of the device."""
    wanted = []
    for index, size in enumerate(sizes):
        group = driver.make("CU_DEV_SM_RESOURCE_GROUP_PARAMS")
        group.smCount = size
        if index == len(sizes) - 1 and len(sizes) > 1:
            group.flags = _BACKFILL
        wanted.append(group)
    groups, remainder = driver.call("cuDevSmResourceSplit", len(wanted), sms, 0, wanted)
    return list(groups), remainder


def _count(resource: Any) -> int:
    """SMs of a resource; a remainder that does not exist is of no valid type."""
    if resource is None or int(resource.type) != _SM_RESOURCE:
        return 0
    return int(resource.sm.smCount)


# ---- owners ----


class GreenContext:
    """A context and its stream. Not for several threads."""

    def __init__(self, driver: CudaDriver, device: Any, resources: list[Any], priority: int) -> None:
        """Takes the resources, whose SMs must come from one split.

        Args:
            driver: for all calls.
            device: handle of the device, whose primary context is retained and current.
            resources: SMs, and optionally one configuration of work queues.
            priority: of the stream; lower numbers go first.

        Raises CudaDriverError; nothing is left behind then.
        """
        self._driver = driver
        descriptor = driver.call("cuDevResourceGenerateDesc", resources, len(resources))
        with ExitStack() as undo:
            context = driver.call("cuGreenCtxCreate", descriptor, device, _DEFAULT_STREAM)
            undo.callback(driver.call, "cuGreenCtxDestroy", context)
            resource_type = driver.enum("CUdevResourceType", _SM_RESOURCE)
            self.num_sms = int(driver.call("cuGreenCtxGetDevResource", context, resource_type).sm.smCount)
            """As the driver reports them."""
            handle = self._make_stream(context, priority)
            undo.callback(driver.call, "cuStreamDestroy", handle)
            self._close = undo.pop_all()
        self._stream = handle

    @property
    def stream(self) -> int:
        """The CUstream, for `torch.cuda.ExternalStream`."""
        return int(self._stream)

    def close(self) -> None:
        """Waits for the stream and destroys it, then the context. May be called twice."""
        close, self._close = self._close, ExitStack()
        with close:
            if self._stream is not None:
                handle, self._stream = self._stream, None
                self._driver.call("cuStreamSynchronize", handle)

    def _make_stream(self, context: Any, priority: int) -> Any:
        driver = self._driver
        if driver.has("cuGreenCtxStreamCreate"):
            return driver.call("cuGreenCtxStreamCreate", context, _NON_BLOCKING, priority)
        # CUDA 12.4: a stream belongs to the context that is current when it is made.
        with _current(driver, driver.call("cuCtxFromGreenCtx", context)):
            return driver.call("cuStreamCreateWithPriority", _NON_BLOCKING, priority)


class GreenContextPool:
    """All slots of a device, from start-up until `close`."""

    def __init__(self, driver: CudaDriver, facts: DeviceFacts, plan: GreenPlan, ordinal: int = 0) -> None:
        """Makes every context of the plan. Decode streams have the highest priority of the device, prefill the lowest.

        Raises CudaDriverError, or EngineError if the driver made a slot of another size than planned, which would make
        the partition table a lie. Nothing is left behind then.
        """
        self.plan = plan
        self._driver = driver
        self._contexts: dict[tuple[Lane, int], GreenContext] = {}
        started_ns = time.perf_counter_ns()
        device = driver.call("cuDeviceGet", ordinal)
        with ExitStack() as undo:
            self._primary = driver.call("cuDevicePrimaryCtxRetain", device)
            undo.callback(driver.call, "cuDevicePrimaryCtxRelease", device)
            with _current(driver, self._primary), ExitStack() as made:
                free_bytes, _ = driver.call("cuMemGetInfo")
                lowest, highest = driver.call("cuCtxGetStreamPriorityRange")
                for spec, resources in self._resources(device, facts):
                    context = GreenContext(driver, device, resources, highest if spec.lane is Lane.DECODE else lowest)
                    made.callback(context.close)
                    self._contexts[spec.lane, spec.units] = context
                    _check(spec, context)
                free_after_bytes, _ = driver.call("cuMemGetInfo")
                self._made = made.pop_all()
            self._release = undo.pop_all()
        self.memory_bytes = int(free_bytes) - int(free_after_bytes)
        """Device memory that the contexts took; other processes that allocated meanwhile count, too."""
        self.creation_ns = time.perf_counter_ns() - started_ns
        """For all contexts together."""

    def stream(self, lane: Lane, units: int) -> int:
        """The CUstream of a slot. Raises KeyError if the plan has none of this size."""
        return self._contexts[lane, units].stream

    @property
    def realized(self) -> dict[tuple[Lane, int], int]:
        """SMs of each slot as the driver reports them."""
        return {key: context.num_sms for key, context in self._contexts.items()}

    def close(self) -> None:
        """Destroys everything, also what comes after an error. May be called twice.

        Raises CudaDriverError, the last one, if the driver refused anything.
        """
        if not self._contexts:
            return
        self._contexts.clear()
        with self._release:
            # Whoever closes may be a thread that has never used the GPU, and has no current context.
            try:
                self._driver.call("cuCtxPushCurrent", self._primary)
            except CudaDriverError:
                self._made.close()
                raise
            try:
                self._made.close()
            finally:
                self._driver.call("cuCtxPopCurrent")

    def _resources(self, device: Any, facts: DeviceFacts) -> Iterator[tuple[SlotSpec, list[Any]]]:
        """What each slot is made of."""
        driver = self._driver
        sms = _all_sms(driver, device)
        queues = [_balanced_queues(driver, device)] if facts.splits_unequal else []
        if self.plan.method is SplitMethod.GROUPS:
            groups, remainder = self._groups(sms)
            for spec in self.plan.slots:
                yield spec, [*(groups[i] for i in spec.groups), *([remainder] if spec.with_remainder else []), *queues]
            return
        splits: dict[tuple[int, ...], list[Any]] = {}
        for spec in self.plan.slots:
            if spec.pair not in splits:
                splits[spec.pair], _ = _split_unequal(driver, sms, spec.pair)
            yield spec, [splits[spec.pair][spec.side], *queues]

    def _groups(self, sms: Any) -> tuple[list[Any], Any]:
        split = self.plan.split
        assert split is not None
        groups, remainder = _split_by_count(self._driver, sms, split.num_groups, split.group_sms)
        made = (len(groups), [int(group.sm.smCount) for group in groups[:1]], _count(remainder))
        if made != (split.num_groups, [split.group_sms], split.remainder_sms):
            raise EngineError(f"the driver splits the device otherwise than a moment ago: {made} instead of {split}")
        return groups, remainder


@contextmanager
def _current(driver: CudaDriver, context: Any) -> Iterator[None]:
    driver.call("cuCtxPushCurrent", context)
    try:
        yield
    finally:
        driver.call("cuCtxPopCurrent")


def _balanced_queues(driver: CudaDriver, device: Any) -> Any:
    """Work queues of its own for each context: two lanes whose streams share one wait for each other without need."""
    resource = driver.call("cuDeviceGetDevResource", device, driver.enum("CUdevResourceType", _WORKQUEUE_CONFIG))
    resource.wqConfig.sharingScope = driver.enum("CUdevWorkqueueConfigScope", _BALANCED)
    resource.wqConfig.wqConcurrencyLimit = 1  # one stream
    return resource


def _check(spec: SlotSpec, context: GreenContext) -> None:
    if context.num_sms != spec.units:
        raise EngineError(
            f"the driver made a {spec.lane.value} slot of {context.num_sms} SMs where {spec.units} were planned"
        )
