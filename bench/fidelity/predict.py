"""What the simulator says of an observed run: the recorded daemon's engine, its programs, a profile of its device."""

from __future__ import annotations

import dataclasses

from agentserve.build.simulation import build_instance
from agentserve.core.costmodel import DeviceProfile
from agentserve.errors import ConfigError
from agentserve.runtime.replay import build_core
from agentserve.runtime.virtual import VirtualDriver
from agentserve.sim.metrics import TurnRecord
from agentserve.sim.orchestrator import simulate
from agentserve.sim.programs import Program, Workload
from bench.fidelity.observed import Observation, Outside

_NS_PER_MS = 1e6


def predict(observation: Observation, outside: Outside, *, slowdown: float = 1.0) -> tuple[TurnRecord, ...]:
    """Simulates the programs of a run on the engine that its recording describes.

    Args:
        observation: what was run.
        outside: added to every call: to the gap behind it, and to the times that a client would see.
        slowdown: the device takes so many times longer for every batch than its profile says. The control plane plans
            with the profile as it is, as the daemon did.

    Raises ConfigError if the recording has no profile, EngineError if the engine stops.
    """
    run = simulate(_with_turnaround(observation.workload, outside), _driver(observation, slowdown))
    return tuple(_as_seen(record, outside) for record in run.records)


def _driver(observation: Observation, slowdown: float) -> VirtualDriver:
    header = observation.header
    slower = dataclasses.replace(header, device=slowed(observation.device, slowdown))
    return VirtualDriver(build_core(header), build_instance(slower).executor)


def slowed(device: DeviceProfile, slowdown: float) -> DeviceProfile:
    """The same device with all rates divided and all overheads multiplied. Raises ConfigError unless it is positive."""
    if not 0.0 < slowdown < float("inf"):
        raise ConfigError(f"a slowdown must be a positive number, not {slowdown}")
    return dataclasses.replace(
        device,
        bandwidth_bytes_per_s=device.bandwidth_bytes_per_s / slowdown,
        flops_per_s=device.flops_per_s / slowdown,
        kv_bandwidth_bytes_per_s=device.kv_bandwidth_bytes_per_s / slowdown,
        attention_flops_per_s=device.attention_flops_per_s / slowdown,
        overhead_ns=round(device.overhead_ns * slowdown),
        layer_overhead_ns=device.layer_overhead_ns * slowdown,
        sequence_overhead_ns=device.sequence_overhead_ns * slowdown,
        sample_overhead_ns=device.sample_overhead_ns * slowdown,
        turnaround_ns=round(device.turnaround_ns * slowdown),
        wake_ns=round(device.wake_ns * slowdown),
    )


def _with_turnaround(workload: Workload, outside: Outside) -> Workload:
    """The gaps as the engine sees them, from its last token to the next call."""
    extra_ms = (outside.turnaround_ns or 0) / _NS_PER_MS
    return dataclasses.replace(workload, programs=tuple(_with_gaps(program, extra_ms) for program in workload.programs))


def _with_gaps(program: Program, extra_ms: float) -> Program:
    turns = tuple(
        dataclasses.replace(turn, tool_gap_ms=max(0.0, turn.tool_gap_ms + extra_ms)) for turn in program.turns
    )
    return dataclasses.replace(program, turns=turns, dependency_gaps_ms=(extra_ms,) * len(program.depends_on))


def _as_seen(record: TurnRecord, outside: Outside) -> TurnRecord:
    """A simulated call as a client would have seen it."""
    return dataclasses.replace(
        record,
        sent_ns=record.sent_ns - outside.send_ns,
        token_ns=tuple(at_ns + outside.receive_ns for at_ns in record.token_ns),
        finished_ns=record.finished_ns + outside.tail_ns,
    )
