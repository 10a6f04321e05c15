"""On which SMs does a slot run? Asked of the SMs themselves.

The driver's count says how many SMs a Green Context has; only a kernel that reads %smid says which. That is the proof
that two slots are disjoint, and that a CUDA graph runs on the SMs of the slot in which it was captured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from agentserve.core.batch import Lane
from agentserve.core.slots import PartitionTable, SlotPartition
from agentserve.errors import EngineError
from agentserve.executors.pytorch.devices.interface import Device

_PROGRAMS_PER_SM = 64
"""More than fit on an SM at a time (32), so that every SM gets some."""
_HOLD_NS = 20_000
"""Long beside the time in which all SMs are given their first programs; a launch holds a slot for a few times this."""


@dataclass(frozen=True, slots=True)
class PartitionProof:
    """Which SMs the two slots of a partition were seen on."""

    partition: SlotPartition
    decode_sms: frozenset[int]
    prefill_sms: frozenset[int]

    @property
    def complete(self) -> bool:
        """Each slot has as many SMs as the partition says."""
        return (len(self.decode_sms), len(self.prefill_sms)) == (
            self.partition.decode_units,
            self.partition.prefill_units,
        )

    @property
    def disjoint(self) -> bool:
        return not self.decode_sms & self.prefill_sms


def probe(device: Device) -> tuple[Callable[[], None], Tensor]:
    """A piece of work for a slot or for a graph, and the tensor that holds the SM of each program after it ran.

    Raises EngineError where Triton is missing.
    """
    try:
        from agentserve.executors.pytorch.devices.smid_kernel import write_smid  # noqa: PLC0415 - see there
    except ImportError as error:
        raise EngineError(f"the SMs of a slot cannot be seen without Triton: {error}") from error
    num_programs = device.compute_units * _PROGRAMS_PER_SM
    out = torch.full((num_programs,), -1, dtype=torch.int32, device=device.torch_device)
    device.synchronize()  # the slots do not wait for the stream that filled it

    def work() -> None:
        write_smid[(num_programs,)](out, _HOLD_NS, num_warps=1)

    return work, out


def which_sms(device: Device, lane: Lane, units: int) -> frozenset[int]:
    """The SMs on which a slot runs. Call it when nothing else is on the device: others take places, not SMs."""
    work, out = probe(device)
    device.slot(lane, units).run(work)
    return seen(out)


def seen(out: Tensor) -> frozenset[int]:
    """The SMs that a probe has written down."""
    sms = frozenset(out.tolist())
    if min(sms) < 0:
        raise EngineError("the probe did not run to its end")
    return sms


def prove(device: Device, table: PartitionTable) -> tuple[PartitionProof, ...]:
    """Looks at both slots of every split of the table."""
    return tuple(
        PartitionProof(
            split,
            which_sms(device, Lane.DECODE, split.decode_units),
            which_sms(device, Lane.PREFILL, split.prefill_units),
        )
        for split in table.splits
    )
