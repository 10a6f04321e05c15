"""A CPU whose slots are sets of cores.

Each slot has a thread of its own, made once and confined to the slot's cores before its first parallel operation. That
is more than convenience. The worker threads of OpenMP inherit the affinity of the thread that starts them and keep it
for life; one thread that moved between slots would therefore leave workers behind on cores that belong to the other
lane, or drag them along to a slot that is meant to be the whole device. With a thread per slot no affinity ever
changes, and choosing another slot is choosing another thread.

Within a slot the scheduler may move the threads. One core for each was seen to be no faster on an idle machine and
usually slower beside another busy process, which a thread that may move gets out of the way of.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue

import torch
from torch import Tensor

from agentserve.core.batch import Lane
from agentserve.errors import EngineError
from agentserve.executors.pytorch.devices.interface import Fence, FinishedFence

logger = logging.getLogger(__name__)

_ELEMENTS_PER_THREAD = 1 << 16
"""An elementwise operation with so many elements for each thread is computed by all of them."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of `mallopt` in glibc."""
_KEPT_BYTES = 1 << 30
_LARGEST_KEPT_BYTES = 32 << 20
"""What glibc takes for a limit on 64 bits; larger pieces, such as pools, come from the operating system as before."""


class CpuDevice:
    """Implements `Device`. Decode takes cores from the low end, prefill from the high end."""

    name = "cpu"
    torch_device = torch.device("cpu")
    unit_granularity = 1
    min_units = 1
    unused_units = 0
    lookahead = 1

    def __init__(self, cores: Sequence[int] | None = None) -> None:
        """`cores`: numbers of the cores to use; by default all that this process may run on."""
        self._cores = tuple(sorted(set(_allowed_cores() if cores is None else cores)))
        if not self._cores:
            raise EngineError("a CPU device needs at least one core")
        self.compute_units = len(self._cores)
        self.description = f"CPU, {self.compute_units} {'core' if self.compute_units == 1 else 'cores'}"
        self._slots: dict[tuple[Lane, int], CpuSlot] = {}
        _keep_freed_memory()
        if not _can_pin():
            logger.warning("this system cannot pin threads to cores: slots limit only the number of threads")

    def slot(self, lane: Lane, units: int) -> CpuSlot:
        slot = self._slots.get((lane, units))
        if slot is None:
            slot = self._slots[lane, units] = CpuSlot(lane, self._cores_of(lane, units))
        return slot

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def host_empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def synchronize(self) -> None:
        """See `Device.synchronize`. Work on a CPU is finished when the call returns that does it."""

    def close(self) -> None:
        while self._slots:
            _, slot = self._slots.popitem()
            slot.close()

    def _cores_of(self, lane: Lane, units: int) -> tuple[int, ...]:
        if not 1 <= units <= self.compute_units:
            raise EngineError(f"there is no slot of {units} cores on a device with {self.compute_units}")
        return self._cores[:units] if lane is Lane.DECODE else self._cores[-units:]


class CpuSlot:
    """A thread and its team of workers, which stay on the slot's cores."""

    def __init__(self, lane: Lane, cores: tuple[int, ...]) -> None:
        self.units = len(cores)
        self._cores = cores
        self._inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._done = threading.Semaphore(0)
        self._error: BaseException | None = None
        self._thread = threading.Thread(
            target=self._main, name=f"agentserve-{lane.value}-{self.units}-cores", daemon=True
        )
        self._thread.start()

    def run(self, work: Callable[[], None]) -> None:
        """See `Slot.run`. For one caller at a time: the lane that owns the slot."""
        self._inbox.put(work)
        self._done.acquire()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def launch(self, work: Callable[[], None]) -> Fence:
        """See `Slot.launch`: runs it."""
        self.run(work)
        return FinishedFence()

    def wait_for(self, fence: Fence) -> None:
        """See `Slot.wait_for`."""
        fence.wait()

    def close(self) -> None:
        self._inbox.put(None)
        self._thread.join()

    def _main(self) -> None:
        setup_error = self._set_up()
        while (work := self._inbox.get()) is not None:
            self._error = setup_error
            if setup_error is None:
                try:
                    work()
                except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits in `run`
                    self._error = error
            # What `work` holds must not live until the next batch comes.
            del work
            self._done.release()

    def _set_up(self) -> Exception | None:
        try:
            if _can_pin():
                os.sched_setaffinity(0, self._cores)  # 0: this thread only
            # torch sets the size of a thread's team on its first parallel operation to the value that any thread
            # set last. Asking for it first makes that happen now, so that it cannot undo what is set here.
            torch.get_num_threads()
            torch.set_num_threads(self.units)
            with torch.inference_mode():
                torch.ones(self.units * _ELEMENTS_PER_THREAD).exp_()  # starts the team
        except (OSError, RuntimeError) as error:
            return error
        return None


def _keep_freed_memory() -> None:
    """Has the C library keep what is freed, for the whole process, instead of giving it back to the operating system.

    A forward pass frees and allocates results of a megabyte for every operation. With the defaults of glibc each is
    mapped, filled with zeros page by page and unmapped, until the library has learned the sizes: an RMSNorm of 512
    rows took 1.3 ms instead of 0.4 in a fresh process. A forward pass that had run before was hardly faster. Without
    glibc nothing is changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        set_both = mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES) and mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        logger.debug("freed memory is kept for the next operation: %s", "yes" if set_both else "refused")


def _can_pin() -> bool:
    return hasattr(os, "sched_setaffinity")


def _allowed_cores() -> Sequence[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return range(os.cpu_count() or 1)
