"""Slots of a CPU: which cores a lane's threads may use, and which they do use."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from agentserve.core.batch import Lane
from agentserve.errors import EngineError
from agentserve.executors.pytorch.devices.cpu import CpuDevice, CpuSlot

needs_affinity = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot pin threads")
needs_proc = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="there is no /proc")
needs_two_cores = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="one core only"
)


@pytest.fixture
def device() -> Iterator[CpuDevice]:
    made = CpuDevice()
    yield made
    made.close()


def call(slot: CpuSlot, function: Callable[[], object]) -> object:
    results: list[object] = []
    slot.run(lambda: results.append(function()))
    return results[0]


def multiply() -> None:
    """Enough work for all threads of a team: 2 * 600**3 = 0.4 GFLOP."""
    with torch.inference_mode():
        torch.mm(torch.ones(600, 600), torch.ones(600, 600))


def elementwise() -> None:
    with torch.inference_mode():
        torch.ones(1_000_000).exp_()


def thread_ids() -> set[int]:
    return {int(path.name) for path in Path("/proc/self/task").iterdir()}


def cpu_ticks() -> dict[int, int]:
    """User and system time of each thread."""
    ticks = {}
    for thread_id in thread_ids():
        fields = Path(f"/proc/self/task/{thread_id}/stat").read_text().rpartition(")")[2].split()
        ticks[thread_id] = int(fields[11]) + int(fields[12])
    return ticks


def team_of(slot: CpuSlot, work: Callable[[], None] = multiply) -> set[int]:
    """The threads that used the processor while the slot worked for about fifteen clock ticks."""
    own = call(slot, threading.get_native_id)
    before = cpu_ticks()
    while cpu_ticks()[own] - before[own] < 15:
        slot.run(lambda: [work() for _ in range(10)])
    # A clock tick may hit a thread that does next to nothing, and reading the ticks of many threads is work, too.
    used = {thread for thread, ticks in cpu_ticks().items() if ticks - before.get(thread, 0) > 3}
    return used - {threading.get_native_id()}


@needs_affinity
@needs_proc
def test_decode_takes_the_low_cores_and_prefill_the_high_ones():
    cores = sorted(os.sched_getaffinity(0))
    device = CpuDevice()
    assert device.compute_units == len(cores)
    for units in range(1, len(cores) + 1):
        for lane, own in ((Lane.DECODE, cores[:units]), (Lane.PREFILL, cores[-units:])):
            before = thread_ids()
            device.slot(lane, units).run(multiply)
            # The slot's thread and all that came with it.
            masks = [os.sched_getaffinity(thread) for thread in thread_ids() - before]
            assert len(masks) >= units
            assert all(mask == set(own) for mask in masks)
    # The calling thread was left alone.
    assert sorted(os.sched_getaffinity(0)) == cores
    device.close()


@needs_affinity
def test_respects_the_cores_that_the_process_may_use():
    cores = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(cores)})
        device = CpuDevice()
    finally:
        os.sched_setaffinity(0, cores)
    assert device.compute_units == 1
    assert call(device.slot(Lane.PREFILL, 1), lambda: os.sched_getaffinity(0)) == {min(cores)}
    with pytest.raises(EngineError, match="no slot of 2 cores"):
        device.slot(Lane.PREFILL, 2)
    device.close()


def test_a_slot_is_made_once(device):
    slot = device.slot(Lane.DECODE, 1)
    assert device.slot(Lane.DECODE, 1) is slot
    assert device.slot(Lane.PREFILL, 1) is not slot


@pytest.mark.parametrize("units", [0, -1, 100_000])
def test_there_is_no_slot_of_another_size(device, units):
    with pytest.raises(EngineError, match="no slot"):
        device.slot(Lane.DECODE, units)


def test_no_cores_no_device():
    with pytest.raises(EngineError, match="at least one core"):
        CpuDevice([])


def test_the_number_of_threads_is_that_of_the_slot_whatever_others_set(device):
    """torch sets a thread's team to the value that any thread set last, at the thread's first parallel operation."""
    total = device.compute_units
    whole = device.slot(Lane.DECODE, total)
    single = device.slot(Lane.PREFILL, 1)
    for _ in range(2):
        assert call(single, torch.get_num_threads) == 1
        assert call(whole, torch.get_num_threads) == total
        single.run(elementwise)
        whole.run(elementwise)


@needs_affinity
@needs_proc
@needs_two_cores
@pytest.mark.parametrize("work", [multiply, elementwise])
def test_a_lone_lane_uses_all_cores_again_after_it_was_split(device, work):
    cores = set(os.sched_getaffinity(0))
    whole, split = device.slot(Lane.DECODE, len(cores)), device.slot(Lane.DECODE, 1)
    assert len(team_of(whole, work)) == len(cores)
    assert len(team_of(split, work)) == 1
    team = team_of(whole, work)
    assert len(team) == len(cores)
    assert all(os.sched_getaffinity(thread) == cores for thread in team)


@needs_affinity
@needs_proc
@needs_two_cores
def test_the_team_stays_the_same_threads(device):
    """Whatever the size of an operation: starting threads in the middle of a batch would be slow."""
    slot = device.slot(Lane.DECODE, device.compute_units)
    slot.run(multiply)
    before = thread_ids()

    def mixed_sizes() -> None:
        with torch.inference_mode():
            for size in (4, 64, 300):
                square = torch.ones(size, size)
                packed = torch.ops.mkldnn._reorder_linear_weight(square, None)
                torch.mm(square, square)
                torch.ops.mkldnn._linear_pointwise(square[:3], packed, None, "none", [], "")
                heads = square.view(1, 2, -1, 4)
                torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)
                torch.ones(8, size * 100).topk(10)

    slot.run(mixed_sizes)
    # Threads of former slots may end meanwhile.
    assert thread_ids() <= before


def test_errors_come_out_where_the_work_was_given_in(device):
    slot = device.slot(Lane.DECODE, 1)

    def fail() -> None:
        raise ValueError("from inside")

    with pytest.raises(ValueError, match="from inside"):
        slot.run(fail)
    assert call(slot, lambda: "well again") == "well again"


def test_close_ends_the_threads():
    before = set(threading.enumerate())
    device = CpuDevice()
    device.slot(Lane.DECODE, 1).run(elementwise)
    device.close()
    device.close()
    assert set(threading.enumerate()) == before


def test_says_once_that_it_cannot_pin(monkeypatch, caplog):
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    device = CpuDevice()
    assert device.compute_units == os.cpu_count()
    assert call(device.slot(Lane.DECODE, 1), torch.get_num_threads) == 1
    device.close()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "cannot pin" in caplog.text


@pytest.mark.skipif(sys.platform != "linux", reason="the error is Linux's")
@needs_affinity
def test_a_core_that_is_gone_is_an_error_of_the_batch_not_of_the_thread():
    device = CpuDevice([9999])
    slot = device.slot(Lane.DECODE, 1)
    for _ in range(2):
        with pytest.raises(OSError, match="Invalid argument"):
            slot.run(multiply)
    device.close()


def test_a_launch_is_finished_when_it_returns(device):
    slot = device.slot(Lane.DECODE, 1)
    done: list[int] = []
    fence = slot.launch(lambda: done.append(1))
    assert done == [1] and fence.done()
    fence.wait()
    device.slot(Lane.PREFILL, 1).wait_for(fence)
    device.synchronize()

    def fail() -> None:
        raise ValueError("from inside")

    with pytest.raises(ValueError, match="from inside"):
        slot.launch(fail)


def test_memory_of_the_host_is_ordinary_memory(device):
    assert device.host_empty((2, 3), torch.bfloat16).shape == (2, 3)
    assert device.unused_units == 0
