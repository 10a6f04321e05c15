"""A CPU whose slots are sets of cores.

Each slot has a thread of its own, made once and confined to the slot's cores before its first parallel operation. That
is more than convenience. The worker threads of OpenMP inherit the affinity of the thread that starts them and keep it
for life; one thread that moved between slots would therefore leave workers behind on cores that belong to the other
lane, or drag them along to a slot that is meant to be the whole device. With a thread per slot no affinity ever
changes, and choosing another slot is choosing another thread.

Within a slot each thread of the team gets one core. Left to the scheduler, two of them were seen to share a core for
seconds while another was idle, and a team is as slow as its slowest member.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import SimpleQueue

import torch
from torch import Tensor

from agentserve.core.batch import Lane
from agentserve.errors import EngineError

logger = logging.getLogger(__name__)

_ELEMENTS_PER_THREAD = 1 << 16
"""An elementwise operation with so many elements for each thread is computed by all of them."""
_TASKS = Path("/proc/self/task")


class CpuDevice:
    """Implements `Device`. Decode takes cores from the low end, prefill from the high end."""

    name = "cpu"
    torch_device = torch.device("cpu")
    unit_granularity = 1
    min_units = 1
    lookahead = 1

    def __init__(self, cores: Sequence[int] | None = None) -> None:
        """`cores`: numbers of the cores to use; by default all that this process may run on."""
        self._cores = tuple(sorted(set(_allowed_cores() if cores is None else cores)))
        if not self._cores:
            raise EngineError("a CPU device needs at least one core")
        self.compute_units = len(self._cores)
        self.description = f"CPU, {self.compute_units} {'core' if self.compute_units == 1 else 'cores'}"
        self._slots: dict[tuple[Lane, int], CpuSlot] = {}
        if not _can_pin():
            logger.warning("this system cannot pin threads to cores: slots limit only the number of threads")

    def slot(self, lane: Lane, units: int) -> CpuSlot:
        slot = self._slots.get((lane, units))
        if slot is None:
            slot = self._slots[lane, units] = CpuSlot(lane, self._cores_of(lane, units))
        return slot

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def close(self) -> None:
        while self._slots:
            _, slot = self._slots.popitem()
            slot.close()

    def _cores_of(self, lane: Lane, units: int) -> tuple[int, ...]:
        """From the outer end inwards: where slots overlap, the threads that lead the two teams are apart."""
        if not 1 <= units <= self.compute_units:
            raise EngineError(f"there is no slot of {units} cores on a device with {self.compute_units}")
        return self._cores[:units] if lane is Lane.DECODE else self._cores[::-1][:units]


_NUMBERS = itertools.count()


class CpuSlot:
    """A thread and its team of workers, one on each of the slot's cores."""

    def __init__(self, lane: Lane, cores: tuple[int, ...]) -> None:
        self.units = len(cores)
        self._cores = cores
        self._inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._done = threading.Semaphore(0)
        self._error: BaseException | None = None
        # The system truncates names of threads to 15 characters. The number tells this slot from former ones, whose
        # workers may still be about to end.
        self._name = f"as-{lane.value[:3]}-{self.units}-{next(_NUMBERS)}"
        self._thread = threading.Thread(target=self._main, name=self._name, daemon=True)
        self._thread.start()

    def run(self, work: Callable[[], None]) -> None:
        """See `Slot.run`. For one caller at a time: the lane that owns the slot."""
        self._inbox.put(work)
        self._done.acquire()
        error, self._error = self._error, None
        if error is not None:
            raise error

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
                _name_this_thread(self._name)
            # torch sets the size of a thread's team on its first parallel operation to the value that any thread
            # set last. Asking for it first makes that happen now, so that it cannot undo what is set here.
            torch.get_num_threads()
            torch.set_num_threads(self.units)
            before = _threads_named(self._name)
            with torch.inference_mode():
                torch.ones(self.units * _ELEMENTS_PER_THREAD).exp_()
            workers = sorted(_threads_named(self._name) - before)
            if _can_pin() and len(workers) == self.units - 1:
                for thread_id, core in zip((0, *workers), self._cores, strict=True):
                    os.sched_setaffinity(thread_id, {core})
            elif _can_pin():
                # Another OpenMP than the one we know: its threads stay within the slot, but may share a core.
                logger.info("cannot tell the threads of %s apart; they move freely on its cores", self._name)
        except (OSError, RuntimeError) as error:
            return error
        return None


def _can_pin() -> bool:
    return hasattr(os, "sched_setaffinity")


def _allowed_cores() -> Sequence[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return range(os.cpu_count() or 1)


def _name_this_thread(name: str) -> None:
    """Names the thread for the system, too. Threads that it starts inherit the name."""
    path = _TASKS / str(threading.get_native_id()) / "comm"
    if path.exists():
        path.write_text(name)


def _threads_named(name: str) -> set[int]:
    """Ids of the threads of this process that have a name; empty where the system does not tell."""
    found = set()
    for path in _TASKS.glob("*/comm"):
        try:
            if path.read_text().strip() == name:
                found.add(int(path.parent.name))
        except FileNotFoundError:
            continue  # it ended meanwhile
    return found
