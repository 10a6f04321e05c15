"""A CUDA driver of our own: strict where the real one is strict, or where a leak would go unseen.

`FakeDriver.module()` behaves like cuda.bindings.driver. It keeps SMs, splits, contexts and streams, refuses what the
driver refuses, and fails the test (AssertionError) for what the driver lets pass although it is wrong: a context
destroyed before its stream, a Green Context without its primary one, an unbalanced stack of current contexts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from itertools import count
from types import SimpleNamespace
from typing import Any

from agentserve.executors.pytorch.devices.cuda_driver import CudaDriver


class CUresult(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NOT_INITIALIZED = 3
    CUDA_ERROR_INVALID_DEVICE = 101
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_INVALID_HANDLE = 400
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_NOT_SUPPORTED = 801
    CUDA_ERROR_INVALID_RESOURCE_TYPE = 914
    CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION = 915


class CUdevResourceType(Enum):
    CU_DEV_RESOURCE_TYPE_INVALID = 0
    CU_DEV_RESOURCE_TYPE_SM = 1
    CU_DEV_RESOURCE_TYPE_WORKQUEUE_CONFIG = 1000

    def __int__(self) -> int:
        return int(self.value)


class CUdevWorkqueueConfigScope(Enum):
    CU_WORKQUEUE_SCOPE_DEVICE_CTX = 0
    CU_WORKQUEUE_SCOPE_GREEN_CTX_BALANCED = 1


class CUdevice_attribute(Enum):  # noqa: N801 - the driver's name
    CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16
    CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE = 38
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76
    CU_DEVICE_ATTRIBUTE_MPS_ENABLED = 133


@dataclass(frozen=True)
class Gpu:
    """A GPU. `gpcs`: SMs of each of its clusters; `alignment` SMs that are scheduled together never cross one."""

    name: str
    compute_capability: tuple[int, int]
    gpcs: tuple[int, ...]
    min_partition: int
    alignment: int
    memory_bytes: int = 24 << 30
    l2_bytes: int = 6 << 20

    @property
    def num_sms(self) -> int:
        return sum(self.gpcs)


A5000 = Gpu("NVIDIA RTX A5000", (8, 6), (10, 10, 10, 10, 12, 12), 4, 2)
A100 = Gpu("NVIDIA A100-SXM4-80GB", (8, 0), (14, 14, 16, 16, 16, 16, 16), 4, 2, 80 << 30, 40 << 20)
RTX4090 = Gpu("NVIDIA GeForce RTX 4090", (8, 9), (10, 10, 12) * 4, 4, 2, l2_bytes=72 << 20)
RTX5090 = Gpu("NVIDIA GeForce RTX 5090", (12, 0), (16,) * 10 + (10,), 8, 8, 32 << 30, 96 << 20)
H200 = Gpu("NVIDIA H200", (9, 0), (18, 18, 18, 16, 16, 16, 16, 14), 8, 8, 141 << 30, 50 << 20)
"""15 groups of 8 (7 * 2 + 1) and 12 SMs: what was seen on an H100 with as many SMs."""
GPUS = (A5000, A100, RTX4090, RTX5090, H200)


@dataclass(eq=False)
class Resource:
    """CUdevResource. `sms` and `split` are what the driver hides in it."""

    type: CUdevResourceType
    sm: Any = None
    sms: tuple[int, ...] = ()
    split: int | None = None  # which split call it came from; None: device or context
    wqConfig: Any = None  # noqa: N815 - the driver's name


@dataclass(eq=False)
class Handle:
    """A context or a stream, alive or not."""

    kind: str
    number: int
    sms: tuple[int, ...] = ()
    priority: int = 0
    context: Handle | None = None
    alive: bool = True
    balanced: bool = False
    refused: bool = False
    """It was to be destroyed, and a test made the driver refuse."""

    def __int__(self) -> int:
        return 0x7F00 + self.number


class RefusedError(Exception):
    """A call returns an error."""


class FakeDriver:
    """See the module."""

    def __init__(
        self,
        gpu: Gpu,
        *,
        driver_version: int = 13000,
        bindings_version: int = 13000,
        remainder_joins: bool = True,
        mps: bool = False,
    ) -> None:
        self.gpu = gpu
        self.driver_version = driver_version
        self.bindings_version = bindings_version
        self.remainder_joins = remainder_joins
        self.mps = mps
        self.calls: list[str] = []
        self.fails: dict[str, tuple[int, CUresult]] = {}
        """Name of a function -> (its how-manyth call fails, with what)."""
        self.num_retained = 0
        self.current: list[Handle] = []
        self.handles: list[Handle] = []
        self.initialized = False
        self._counts: Counter[str] = Counter()
        self._numbers = count(1)
        self._primary = Handle("primary", 0)

    # ---- what tests look at ----

    def _assert_primary(self, what: str) -> None:
        refused = "cuCtxPushCurrent" in self.fails  # then it is worth a try all the same
        assert refused or self.current == [self._primary], f"a thread without a context {what}"

    def streams(self) -> list[Handle]:
        return [handle for handle in self.handles if handle.kind == "stream" and handle.alive]

    def contexts(self) -> list[Handle]:
        return [handle for handle in self.handles if handle.kind == "green" and handle.alive]

    def sms_of(self, stream: int) -> set[int]:
        """Which SMs a stream runs on: %smid."""
        (handle,) = [handle for handle in self.streams() if int(handle) == stream]
        assert handle.context is not None
        return set(handle.context.sms)

    def assert_clean(self) -> None:
        assert not self.streams() and not self.contexts()
        assert self.num_retained == 0 and self.current == []

    def driver(self) -> CudaDriver:
        return CudaDriver(self.module())

    def module(self) -> Any:
        """What the bindings of this version have."""
        names = [name for name in dir(self) if name.startswith("cu") and name[2].isupper()]
        lacking = set()
        if self.bindings_version < 13010:
            lacking |= {"cuDevSmResourceSplit"}
        if self.bindings_version < 12050:
            lacking |= {"cuGreenCtxStreamCreate"}
        module = SimpleNamespace(**{name: self._checked(name) for name in names if name not in lacking})
        module.CUDA_VERSION = self.bindings_version
        module.CUdevResourceType = CUdevResourceType
        module.CUdevice_attribute = CUdevice_attribute
        if self.bindings_version >= 13010:
            module.CUdevWorkqueueConfigScope = CUdevWorkqueueConfigScope
            module.CU_DEV_SM_RESOURCE_GROUP_PARAMS = lambda: SimpleNamespace(
                smCount=0, coscheduledSmCount=0, preferredCoscheduledSmCount=0, flags=0
            )
        return module

    def _checked(self, name: str) -> Callable[..., tuple[Any, ...]]:
        function = getattr(self, name)

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append(name)
            self._counts[name] += 1
            nth, error = self.fails.get(name, (0, CUresult.CUDA_SUCCESS))
            if nth == self._counts[name]:
                if arguments and isinstance(arguments[0], Handle):
                    arguments[0].refused = True
                return (error, None)
            if not self.initialized and name not in ("cuInit", "cuGetErrorString", "cuDriverGetVersion"):
                return (CUresult.CUDA_ERROR_NOT_INITIALIZED, None)
            try:
                result = function(*arguments)
            except RefusedError as refused:
                return (refused.args[0], None)
            if result is None:
                return (CUresult.CUDA_SUCCESS,)
            return (CUresult.CUDA_SUCCESS, *(result if isinstance(result, tuple) else (result,)))

        return call

    # ---- the driver's functions, by their names ----

    def cuInit(self, flags: int) -> None:
        assert flags == 0
        self.initialized = True

    def cuDriverGetVersion(self) -> int:
        return self.driver_version

    def cuGetErrorString(self, code: CUresult) -> bytes:
        return code.name.lower().replace("_", " ").encode()

    def cuDeviceGet(self, ordinal: int) -> str:
        _refuse_unless(ordinal == 0, CUresult.CUDA_ERROR_INVALID_DEVICE)
        return "device"

    def cuDeviceGetName(self, length: int, device: str) -> bytes:
        return self.gpu.name.encode().ljust(length, b"\0")

    def cuDeviceTotalMem(self, device: str) -> int:
        return self.gpu.memory_bytes

    def cuDeviceGetAttribute(self, attribute: CUdevice_attribute, device: str) -> int:
        if not isinstance(attribute, CUdevice_attribute):
            raise TypeError("the bindings want their enumeration")
        return {
            16: self.gpu.num_sms,
            38: self.gpu.l2_bytes,
            75: self.gpu.compute_capability[0],
            76: self.gpu.compute_capability[1],
            133: int(self.mps),
        }[attribute.value]

    def cuDeviceGetDevResource(self, device: str, kind: CUdevResourceType) -> Resource:
        if not isinstance(kind, CUdevResourceType):
            raise TypeError("the bindings want their enumeration")
        _refuse_unless(self.driver_version >= 12040, CUresult.CUDA_ERROR_NOT_SUPPORTED)
        if kind.value == 1000:
            _refuse_unless(self.driver_version >= 13010, CUresult.CUDA_ERROR_INVALID_RESOURCE_TYPE)
            scope = CUdevWorkqueueConfigScope.CU_WORKQUEUE_SCOPE_DEVICE_CTX
            return Resource(kind, wqConfig=SimpleNamespace(sharingScope=scope, wqConcurrencyLimit=8))
        return self._resource(tuple(range(self.gpu.num_sms)), None)

    def cuDevSmResourceSplitByCount(self, num: int, given: Resource, flags: int, minimum: int) -> tuple[Any, ...]:
        gpu = self.gpu
        assert flags == 0 and isinstance(num, int)
        _refuse_unless(given.type.value == 1, CUresult.CUDA_ERROR_INVALID_RESOURCE_TYPE)
        # A result of a split is not split again before a context was made of it.
        _refuse_unless(given.split is None, CUresult.CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION)
        _refuse_unless(0 <= minimum <= len(given.sms), CUresult.CUDA_ERROR_INVALID_VALUE)
        size = -(-max(minimum, gpu.min_partition) // gpu.alignment) * gpu.alignment
        chunks = self._chunks()
        per_group = size // gpu.alignment
        possible = len(chunks) // per_group
        _refuse_unless(possible >= 1, CUresult.CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION)
        if num == 0:
            return [], possible, None
        made = min(num, possible)
        split = next(self._numbers)
        groups = [self._resource(sum(chunks[i * per_group : (i + 1) * per_group], ()), split) for i in range(made)]
        return groups, made, self._rest(groups, split)

    def cuDevSmResourceSplit(self, num: int, given: Resource, flags: int, wanted: Sequence[Any]) -> tuple[Any, ...]:
        _refuse_unless(self.driver_version >= 13010, CUresult.CUDA_ERROR_NOT_SUPPORTED)
        assert flags == 0 and num == len(wanted) and given.split is None
        free, split, groups = self._chunks(), next(self._numbers), []
        for group in wanted:
            taken: tuple[int, ...] = ()
            backfill = group.flags == 1
            size = group.smCount or len(free) * self.gpu.alignment
            usable = size % 2 == 0 and (backfill or size % self.gpu.alignment == 0)
            _refuse_unless(usable, CUresult.CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION)
            while free and len(taken) + self.gpu.alignment <= size:
                taken += free.pop(0)
            if backfill:
                used = {sm for other in groups for sm in other.sms} | set(taken) | set(sum(free, ()))
                taken += tuple(sm for sm in range(self.gpu.num_sms) if sm not in used)[: size - len(taken)]
            _refuse_unless(len(taken) == size, CUresult.CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION)
            groups.append(self._resource(taken, split))
        return groups, self._rest(groups, split)

    def cuDevResourceGenerateDesc(self, resources: list[Resource], num: int) -> tuple[Resource, ...]:
        assert num == len(resources) > 0
        sms = [resource for resource in resources if resource.type.value == 1]
        unsuitable = CUresult.CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION
        _refuse_unless(sms and len(resources) - len(sms) <= 1, unsuitable)
        _refuse_unless(len({resource.split for resource in sms}) == 1, unsuitable)
        _refuse_unless(len({id(resource) for resource in sms}) == len(sms), unsuitable)
        _refuse_unless(len({resource.sm.smCoscheduledAlignment for resource in sms}) == 1, unsuitable)
        return (tuple(resources),)  # one value

    def cuGreenCtxCreate(self, descriptor: tuple[Resource, ...], device: str, flags: int) -> Handle:
        _refuse_unless(flags == 1, CUresult.CUDA_ERROR_NOT_SUPPORTED)
        assert self.num_retained > 0 and self.current == [self._primary], "the primary context is to be active"
        sms = sum((resource.sms for resource in descriptor), ())
        queues = [resource.wqConfig for resource in descriptor if resource.type.value == 1000]
        return self._handle("green", sms=sms, balanced=any(q.sharingScope.value == 1 for q in queues))

    def cuGreenCtxDestroy(self, context: Handle) -> None:
        self._assert_primary("destroys a context")
        self._end(context, "green")
        assert not [s for s in self.streams() if s.context is context and not s.refused], (
            "a stream outlives its context"
        )

    def cuGreenCtxGetDevResource(self, context: Handle, kind: CUdevResourceType) -> Resource:
        _refuse_unless(context.alive and kind.value == 1, CUresult.CUDA_ERROR_INVALID_CONTEXT)
        return self._resource(context.sms, None)

    def cuGreenCtxStreamCreate(self, context: Handle, flags: int, priority: int) -> Handle:
        _refuse_unless(self.driver_version >= 12050, CUresult.CUDA_ERROR_NOT_SUPPORTED)
        _refuse_unless(flags == 1, CUresult.CUDA_ERROR_INVALID_VALUE)
        _refuse_unless(context.alive, CUresult.CUDA_ERROR_INVALID_CONTEXT)
        return self._handle("stream", context=context, priority=priority)

    def cuCtxFromGreenCtx(self, context: Handle) -> Handle:
        return context

    def cuStreamCreateWithPriority(self, flags: int, priority: int) -> Handle:
        _refuse_unless(self.current, CUresult.CUDA_ERROR_INVALID_CONTEXT)
        return self._handle("stream", context=self.current[-1], priority=priority)

    def cuStreamSynchronize(self, stream: Handle) -> None:
        _refuse_unless(stream.alive, CUresult.CUDA_ERROR_INVALID_HANDLE)

    def cuStreamDestroy(self, stream: Handle) -> None:
        self._assert_primary("destroys a stream")
        self._end(stream, "stream")

    def cuDevicePrimaryCtxRetain(self, device: str) -> Handle:
        self.num_retained += 1
        return self._primary

    def cuDevicePrimaryCtxRelease(self, device: str) -> None:
        _refuse_unless(self.num_retained > 0, CUresult.CUDA_ERROR_INVALID_CONTEXT)
        self.num_retained -= 1
        left = [context for context in self.contexts() if not context.refused]
        assert self.num_retained > 0 or not left, "Green Contexts outlive the primary one"

    def cuCtxPushCurrent(self, context: Handle) -> None:
        self.current.append(context)

    def cuCtxPopCurrent(self) -> Handle:
        _refuse_unless(self.current, CUresult.CUDA_ERROR_INVALID_CONTEXT)
        return self.current.pop()

    def cuCtxGetStreamPriorityRange(self) -> tuple[int, int]:
        _refuse_unless(self.current, CUresult.CUDA_ERROR_INVALID_CONTEXT)
        return 0, -5

    def cuMemGetInfo(self) -> tuple[int, int]:
        _refuse_unless(self.current, CUresult.CUDA_ERROR_INVALID_CONTEXT)
        return self.gpu.memory_bytes - (len(self.contexts()) << 20), self.gpu.memory_bytes

    # ---- behind them ----

    def _chunks(self) -> list[tuple[int, ...]]:
        """SMs that are scheduled together, `alignment` each, within a GPC."""
        chunks, first = [], 0
        for size in self.gpu.gpcs:
            for start in range(0, size - self.gpu.alignment + 1, self.gpu.alignment):
                chunks.append(tuple(range(first + start, first + start + self.gpu.alignment)))
            first += size
        return chunks

    def _resource(self, sms: tuple[int, ...], split: int | None, alignment: int | None = None) -> Resource:
        fields = {"smCount": len(sms)}
        if self.bindings_version >= 13000:
            fields["minSmPartitionSize"] = self.gpu.min_partition
        resource = Resource(CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM, SimpleNamespace(**fields), sms, split)
        resource.sm.smCoscheduledAlignment = self.gpu.alignment if alignment is None else alignment
        if self.bindings_version < 13000 and split is None:
            del resource.sm.smCoscheduledAlignment  # the bindings do not show it
        return resource

    def _rest(self, groups: list[Resource], split: int) -> Resource:
        used = {sm for group in groups for sm in group.sms}
        sms = tuple(sm for sm in range(self.gpu.num_sms) if sm not in used)
        if not sms:
            return Resource(CUdevResourceType.CU_DEV_RESOURCE_TYPE_INVALID)
        return self._resource(sms, split, None if self.remainder_joins else 1)

    def _handle(self, kind: str, **values: Any) -> Handle:
        handle = Handle(kind, next(self._numbers), **values)
        self.handles.append(handle)
        return handle

    def _end(self, handle: Handle, kind: str) -> None:
        _refuse_unless(handle.kind == kind and handle.alive, CUresult.CUDA_ERROR_INVALID_HANDLE)
        handle.alive = False


def _refuse_unless(condition: object, error: CUresult) -> None:
    if not condition:
        raise RefusedError(error)
