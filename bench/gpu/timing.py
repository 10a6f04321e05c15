"""Time of work on a device: events on a GPU, the clock on a CPU."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence

import torch


def time_work(
    work: Callable[[], object],
    device: torch.device,
    *,
    min_runs: int = 10,
    max_runs: int = 100,
    limit_s: float = 1.0,
    warm_up: int = 3,
) -> list[float]:
    """Milliseconds of each run, on the current stream; at least `min_runs`, then until the time is spent."""
    for _ in range(warm_up):
        work()
    synchronize(device)
    started_s, times = time.monotonic(), []
    while len(times) < max_runs and (len(times) < min_runs or time.monotonic() - started_s < limit_s):
        times += _some(work, device, min(10, max_runs - len(times)))
    return times


def _some(work: Callable[[], object], device: torch.device, num_runs: int) -> list[float]:
    if device.type != "cuda":
        stamps = [time.perf_counter_ns()]
        for _ in range(num_runs):
            work()
            stamps.append(time.perf_counter_ns())
        return [(after - before) / 1e6 for before, after in itertools.pairwise(stamps)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(num_runs + 1)]
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    events[-1].synchronize()
    return [before.elapsed_time(after) for before, after in itertools.pairwise(events)]


def rotate(works: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """The works one after the other, one a call: so that no call finds its data in the cache."""
    position = -1

    def work() -> object:
        nonlocal position
        position = (position + 1) % len(works)
        return works[position]()

    return work


def synchronize(device: torch.device) -> None:
    """Waits until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
