"""A GPU whose slots are Green Contexts, or streams on the whole of it.

A slot is a stream. A lane's thread makes it current and launches there; kernels find the SMs of the slot because the
stream belongs to its Green Context, while memory is that of the primary context, the same for all. Choosing another
partition is therefore choosing another stream, and one wait for an event on the device, which keeps the batches of a
lane in order. No thread blocks for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agentserve.core.batch import Lane
from agentserve.errors import ConfigError, EngineError
from agentserve.executors.pytorch.devices.cuda_driver import CudaDriver, CudaUnavailableError
from agentserve.executors.pytorch.devices.cuda_runtime import CudaRuntime, TorchRuntime
from agentserve.executors.pytorch.devices.green_contexts import GreenContextPool, make_plan, read_facts
from agentserve.executors.pytorch.devices.green_plan import (
    DeviceFacts,
    GreenPlan,
    SlotDecision,
    SlotMode,
    cuda_version,
    decide_mode,
)
from agentserve.executors.pytorch.devices.interface import Fence
from agentserve.executors.pytorch.devices.memory import MemoryReading

logger = logging.getLogger(__name__)

_LOOKAHEAD = 2
"""One batch on the device and one behind it: while the host deals with the first the second computes."""


@dataclass(frozen=True, slots=True)
class SlotReport:
    """A slot as it came to be."""

    lane: Lane
    units: int
    """SMs that were planned."""
    realized_units: int
    """SMs that the driver reports."""


@dataclass(frozen=True, slots=True)
class DeviceReport:
    """What `doctor` and the measurements say about a device."""

    facts: DeviceFacts
    decision: SlotDecision
    plan: GreenPlan | None
    """None: the slots are streams on the whole device."""
    slots: tuple[SlotReport, ...]
    """Green Contexts only."""
    creation_ns: int
    """For all Green Contexts together."""
    memory_bytes: int
    """Device memory that they take together."""


class CudaFence:
    """An event behind what was launched in a slot.

    `wait` looks once, then sleeps until the device's interrupt. Spinning would answer some ten microseconds earlier,
    but there is a lane thread for each of two lanes, and two cores that spin are two that tokenize and stream nothing;
    a spin in Python would moreover take the interpreter from the other lane for each look. With a batch behind it on
    the device the delay hides entirely, and a fence that is reached late, which is the usual case then, costs no sleep.
    """

    __slots__ = ("event",)

    def __init__(self, event: Any) -> None:
        self.event = event

    def done(self) -> bool:
        return bool(self.event.query())

    def wait(self) -> None:
        if not self.event.query():
            self.event.synchronize()


class _LaneOrder:
    """Keeps the batches of a lane in order when it changes its slot."""

    __slots__ = ("fence", "slot")

    def __init__(self) -> None:
        self.slot: CudaSlot | None = None
        """Where the lane launched last."""
        self.fence: CudaFence | None = None
        """After its last launch."""


class CudaSlot:
    """Implements `Slot`."""

    def __init__(self, lane: Lane, units: int, stream: Any, runtime: CudaRuntime, order: _LaneOrder) -> None:
        self.lane = lane
        self.units = units
        self.stream = stream
        """The torch.cuda.Stream. Capture graphs for this slot on it: a captured kernel keeps the SMs of its stream."""
        self._runtime = runtime
        self._order = order

    def run(self, work: Callable[[], None]) -> None:
        self.launch(work).wait()

    def launch(self, work: Callable[[], None]) -> CudaFence:
        order = self._order
        if order.slot is not self and order.fence is not None:
            self._runtime.wait_event(self.stream, order.fence.event)
        try:
            with self._runtime.use(self.stream):
                work()
        except BaseException:
            # The caller will give memory back that the half of the batch which was launched still writes.
            self._runtime.synchronize_stream(self.stream)
            raise
        order.slot = self
        order.fence = CudaFence(self._runtime.record(self.stream))
        return order.fence

    def wait_for(self, fence: Fence) -> None:
        if isinstance(fence, CudaFence):
            self._runtime.wait_event(self.stream, fence.event)
        else:
            fence.wait()


class CudaDevice:
    """Implements `Device`. Decode takes SMs from one end, prefill from the other."""

    name = "cuda"

    def __init__(
        self,
        index: int = 0,
        *,
        slots: str = "auto",
        lookahead: int = _LOOKAHEAD,
        runtime: CudaRuntime | None = None,
        driver: CudaDriver | None = None,
    ) -> None:
        """Makes every slot; the device is initialized by this.

        Args:
            index: of the device, among those that CUDA_VISIBLE_DEVICES leaves.
            slots: a `SlotMode`. With `auto`, and only then, Green Contexts that the driver refuses are replaced by
                streams on the whole device; `decision` says so, and the log.
            lookahead: batches that may be in flight in one lane.
            runtime: torch.cuda, unless a test brings its own.
            driver: cuda-python, unless a test brings its own.

        Raises ConfigError if this machine or torch has no such GPU or cannot do what was asked for, CudaDriverError if
        the driver refuses.
        """
        if slots not in list(SlotMode):
            raise ConfigError(f"slots must be one of {', '.join(SlotMode)}, not {slots!r}")
        if lookahead < 1:
            raise ConfigError(f"lookahead must be positive, not {lookahead}")
        self.lookahead = lookahead
        self.torch_device = torch.device("cuda", index)
        self._index = index
        self._runtime = runtime or TorchRuntime()
        self._runtime.initialize(index)
        self._pool: GreenContextPool | None = None
        self.facts = self._read_facts(driver)
        self._slots: dict[tuple[Lane, int], CudaSlot] = {}
        try:
            self._make_slots(SlotMode(slots))
        except BaseException:
            if self._pool is not None:
                self._pool.close()
            raise
        logger.info("%s: %s", self.description, self.decision.reason)

    @property
    def description(self) -> str:
        facts = self.facts
        return f"{facts.name}, {facts.num_sms} SMs, {facts.memory_bytes / 2**30:.0f} GiB"

    @property
    def plan(self) -> GreenPlan | None:
        """The plan of the Green Contexts, if there are any."""
        return None if self._pool is None else self._pool.plan

    def slot(self, lane: Lane, units: int) -> CudaSlot:
        slot = self._slots.get((lane, units))
        if slot is None:
            sizes = sorted(size for other, size in self._slots if other is lane)
            raise EngineError(f"there is no {lane.value} slot of {units} SMs, only of {', '.join(map(str, sizes))}")
        return slot

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.torch_device)

    def host_empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """See `Device.host_empty`: page-locked memory. Take it at start-up, it is slow to get."""
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def synchronize(self) -> None:
        self._runtime.synchronize(self._index)

    def memory(self) -> MemoryReading:
        """Memory of the device now, as the driver reports it."""
        free_bytes, total_bytes = self._runtime.memory(self._index)
        return MemoryReading(total_bytes, free_bytes)

    def report(self) -> DeviceReport:
        """What came to be."""
        pool = self._pool
        if pool is None:
            return DeviceReport(self.facts, self.decision, None, (), 0, 0)
        slots = tuple(SlotReport(lane, units, realized) for (lane, units), realized in pool.realized.items())
        return DeviceReport(self.facts, self.decision, pool.plan, slots, pool.creation_ns, pool.memory_bytes)

    def close(self) -> None:
        """See `Device.close`. Graphs captured in the slots must be gone."""
        if not self._slots:
            return
        self._slots.clear()
        try:
            self.synchronize()
        finally:
            if self._pool is not None:
                self._pool.close()

    # ---- at start-up ----

    def _read_facts(self, driver: CudaDriver | None) -> DeviceFacts:
        """What the driver says, or torch where there is no way to ask the driver; `_driver` is set accordingly."""
        self._driver: CudaDriver | None
        try:
            self._driver = driver or self._runtime.load_driver()
            return read_facts(self._driver, self._index)
        except CudaUnavailableError as error:
            logger.info("%s", error)
            self._driver = None
            return self._runtime.facts(self._index)

    def _make_slots(self, wanted: SlotMode) -> None:
        decision = decide_mode(wanted, self.facts)
        if decision.mode is SlotMode.GREEN:
            try:
                decision = self._make_green()
            except (ConfigError, EngineError) as error:
                if wanted is not SlotMode.AUTO:
                    raise
                logger.warning("no Green Contexts: %s", error)
                decision = SlotDecision(SlotMode.STREAM, f"both lanes use the whole device because {error}")
        self.decision = decision
        plan = self.plan
        self.compute_units = self.facts.num_sms
        # Without Green Contexts the whole device is the only slot there is.
        self.unit_granularity = plan.unit_granularity if plan else self.compute_units
        self.min_units = plan.min_units if plan else self.compute_units
        self.unused_units = plan.unused_units if plan else 0
        for lane in Lane:
            order = _LaneOrder()
            streams = {self.compute_units: self._runtime.stream(self._index, urgent=lane is Lane.DECODE)}
            if self._pool is not None:
                for other, units in self._pool.realized:
                    if other is lane:
                        streams[units] = self._runtime.external_stream(self._index, self._pool.stream(lane, units))
            for units, stream in streams.items():
                self._slots[lane, units] = CudaSlot(lane, units, stream, self._runtime, order)

    def _make_green(self) -> SlotDecision:
        assert self._driver is not None
        plan = make_plan(self._driver, self.facts, self._index)
        self._pool = GreenContextPool(self._driver, self.facts, plan, self._index)
        made_ms = self._pool.creation_ns / 1e6
        return SlotDecision(SlotMode.GREEN, f"Green Contexts, {plan.describe()}; made in {made_ms:.0f} ms")


def describe_versions(facts: DeviceFacts) -> str:
    """`sm_90, driver of CUDA 13.0, cuda-python of CUDA 13.0`, for `doctor`."""
    parts = [facts.compute_capability_label]
    if facts.driver_version is not None:
        parts.append(f"driver of {cuda_version(facts.driver_version)}")
    if facts.bindings_version is not None:
        parts.append(f"cuda-python of {cuda_version(facts.bindings_version)}")
    return ", ".join(parts)
