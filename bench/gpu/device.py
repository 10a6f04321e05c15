"""Part `device`: what the GPU is, which slots the driver makes of it, and whether they are what they claim to be."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

from agentserve.core.batch import Lane
from agentserve.core.slots import PartitionTable, build_partition_table
from agentserve.executors.pytorch.devices.green_plan import (
    DeviceFacts,
    SplitFacts,
    candidate_group_sizes,
    choose_split,
    decide_mode,
    plan_groups,
    plan_pairs,
)
from agentserve.executors.pytorch.devices.green_plan import SlotMode as Mode
from bench.gpu.record import PartRun, spread
from bench.gpu.smi import smi

_GIB = 1 << 30
_CHAIN, _NUM_CHAINS = 200, 7
KNOWN_CARDS = (
    DeviceFacts("RTX A5000", (8, 6), 64, 24 * _GIB, 6 << 20, 13000, 13000, False, 4, 2),
    DeviceFacts("RTX 4090", (8, 9), 128, 24 * _GIB, 72 << 20, 13000, 13000, False, 4, 2),
    DeviceFacts("RTX 5090", (12, 0), 170, 32 * _GIB, 96 << 20, 13010, 13010, True, 8, 8),
    DeviceFacts("H200", (9, 0), 132, 141 * _GIB, 60 << 20, 13000, 13000, False, 8, 8),
)
"""From data sheets and NVIDIA's table of partition sizes, with a driver of today: what planning is shown on."""


def run(part: PartRun) -> None:
    part.put("planned", {facts.name: plan_of(facts) for facts in KNOWN_CARDS})
    part.put("versions", _versions())
    part.put("nvidia_smi", smi())
    if part.dry_run:
        from agentserve.executors.pytorch.devices.cpu import CpuDevice  # noqa: PLC0415

        device: Any = CpuDevice()
    else:
        from agentserve.executors.pytorch.devices.cuda import CudaDevice  # noqa: PLC0415

        started_ns = time.perf_counter_ns()
        device = CudaDevice()
        part.put("device_ready_ms", (time.perf_counter_ns() - started_ns) / 1e6)
        part.put("device", _report(device))
    table = build_partition_table(
        device.compute_units, device.unit_granularity, device.min_units, unused_units=device.unused_units
    )
    part.say(f"{device.description}: {len(table.splits)} splits, {len(table.caps)} caps")
    part.put("table", [entry.label for entry in table.entries])
    part.put("switch_us", switch_cost(device, table))
    if not part.dry_run:
        part.put("slots", _proofs(device, table))
        part.put("graph_affinity", _graph_affinity(device, table))
    device.close()


def plan_of(facts: DeviceFacts) -> dict[str, Any]:
    """What would be made of a card, if splits went as its granularity says and what is left over joins the groups."""
    decision = decide_mode(Mode.AUTO, facts)
    if facts.splits_unequal:
        assert facts.coscheduled_alignment is not None
        plan = plan_pairs(facts, facts.num_sms // facts.coscheduled_alignment * facts.coscheduled_alignment)
    else:
        sizes = candidate_group_sizes(facts)
        splits = [SplitFacts(size, facts.num_sms // size, facts.num_sms % size, True) for size in sizes]
        plan = plan_groups(facts, choose_split(splits))
    return {"mode": decision.mode.value, "why": decision.reason, "plan": plan.describe(), "min_units": plan.min_units}


def _versions() -> dict[str, Any]:
    from agentserve.build.probe import SystemProbe  # noqa: PLC0415 - the doctor's; it imports what a part may lack

    probe, torch = SystemProbe(), SystemProbe().torch(try_gpu=False)
    names = ("triton", "transformers", "cuda-bindings", "flashinfer-python", "apache-tvm-ffi", "numpy", "safetensors")
    return {
        "python": ".".join(map(str, probe.python())),
        "torch": dataclasses.asdict(torch) if torch else None,
        "packages": dict(probe.versions(names)),
        "nvcc": probe.nvcc(),
        "driver": dataclasses.asdict(probe.driver()),
    }


def _report(device: Any) -> dict[str, Any]:
    report = device.report()
    num_slots = len(report.slots)
    return {
        "facts": dataclasses.asdict(report.facts),
        "mode": report.decision.mode.value,
        "why": report.decision.reason,
        "plan": report.plan.describe() if report.plan else None,
        "slots": [dataclasses.asdict(slot) for slot in report.slots],
        "num_slots": num_slots,
        "creation_ms": report.creation_ns / 1e6,
        "creation_ms_per_slot": report.creation_ns / 1e6 / num_slots if num_slots else None,
        "memory_mib": report.memory_bytes / 2**20,
        "memory_mib_per_slot": report.memory_bytes / 2**20 / num_slots if num_slots else None,
    }


# ---- the cost of another partition ----


def switch_cost(device: Any, table: PartitionTable) -> dict[str, Any]:
    """Microseconds that a launch takes longer when the decode lane changes its slot each time.

    A chain of small launches in one slot against one that alternates between two, from the first launch until all of
    it is finished: so it has the wait of one stream for the other, and the calls for it. `host` is until the last
    launch returns.
    """
    sizes = sorted({table.whole.decode_units, *(split.decode_units for split in table.splits)})
    first, other = device.slot(Lane.DECODE, sizes[-1]), device.slot(Lane.DECODE, sizes[0])
    work = _small_work(device)
    found: dict[str, list[float]] = {"same_host": [], "same_total": [], "switch_host": [], "switch_total": []}
    for _ in range(_NUM_CHAINS):
        for name, slots in (("same", (first, first)), ("switch", (first, other))):
            host, total = _chain(slots, work)
            found[f"{name}_host"].append(host)
            found[f"{name}_total"].append(total)
    medians = {name: statistics.median(values) for name, values in found.items()}
    return {
        "slots": [sizes[-1], sizes[0]],
        "host": round(medians["switch_host"] - medians["same_host"], 3),
        "total": round(medians["switch_total"] - medians["same_total"], 3),
        **{name: spread(values) for name, values in found.items()},
    }


def _chain(slots: tuple[Any, Any], work: Callable[[], None]) -> tuple[float, float]:
    """Microseconds a launch: until the last one returned, and until everything was finished."""
    slots[0].run(work)
    slots[1].run(work)
    started_ns = time.perf_counter_ns()
    for index in range(_CHAIN):
        fence = slots[index % 2].launch(work)
    launched_ns = time.perf_counter_ns()
    fence.wait()
    finished_ns = time.perf_counter_ns()
    return (launched_ns - started_ns) / _CHAIN / 1e3, (finished_ns - started_ns) / _CHAIN / 1e3


def _small_work(device: Any) -> Callable[[], None]:
    import torch  # noqa: PLC0415

    value = torch.zeros(1024, device=device.torch_device)
    device.synchronize()

    def work() -> None:
        value.add_(1.0)

    return work


# ---- which SMs ----


def _proofs(device: Any, table: PartitionTable) -> dict[str, Any]:
    from agentserve.executors.pytorch.devices import smid  # noqa: PLC0415

    proofs = smid.prove(device, table)
    whole = smid.which_sms(device, Lane.DECODE, device.compute_units)
    caps = {cap.prefill_units: len(smid.which_sms(device, Lane.PREFILL, cap.prefill_units)) for cap in table.caps}
    return {
        "num_splits": len(proofs),
        "all_disjoint": all(proof.disjoint for proof in proofs),
        "all_complete": all(proof.complete for proof in proofs),
        "whole": len(whole),
        "caps": caps,
        "splits": [
            {
                "partition": proof.partition.label,
                "decode": sorted(proof.decode_sms),
                "prefill": sorted(proof.prefill_sms),
                "disjoint": proof.disjoint,
                "complete": proof.complete,
            }
            for proof in proofs
        ],
    }


def _graph_affinity(device: Any, table: PartitionTable) -> dict[str, Any] | None:
    """A graph that was captured in a small slot, launched from the stream of the whole device: where does it run?"""
    if not table.splits:
        return None
    import torch  # noqa: PLC0415

    from agentserve.executors.pytorch.devices import smid  # noqa: PLC0415

    split = table.splits[0]
    slot = device.slot(Lane.DECODE, split.decode_units)
    work, out = smid.probe(device)
    slot.run(work)  # compiled before it is captured
    expected = smid.seen(out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=slot.stream):
        work()
    out.fill_(-1)
    device.synchronize()
    device.slot(Lane.DECODE, device.compute_units).run(graph.replay)
    found = smid.seen(out)
    device.synchronize()
    del graph
    return {
        "captured_in": split.decode_units,
        "launched_from": device.compute_units,
        "sms": sorted(found),
        "keeps_the_slot_of_its_capture": found == expected,
    }
