"""Traffic: calls with their times, recorded from a run and replayed under any policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from agentserve.build.simulation import build_instance
from agentserve.core.agents.factory import POLICIES
from agentserve.core.events import Command, RequestFinished, SubmitRequest
from agentserve.runtime.recording import Header, Recording
from agentserve.runtime.replay import build_core
from agentserve.runtime.virtual import VirtualDriver
from agentserve.sim.orchestrator import simulate
from agentserve.sim.programs import Workload
from bench.cachesage.losses import LossMeter
from bench.cachesage.oracle import ReplayOracle

POLICY_CHANGES: Mapping[str, Mapping[str, object]] = {
    "lru": {"policy": "lru"},
    "anchor": {"policy": "anchor"},
    "transition, no prediction": {"policy": "transition", "prediction": False},
    "transition": {"policy": "transition"},
    "oracle": {"policy": "belady", "protect_anchors": False},
}
"""What is compared: changes of the engine's configuration."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """What was asked, and when."""

    name: str
    header: Header
    calls: tuple[tuple[int, SubmitRequest], ...]
    """Nanoseconds from the start, in order."""


@dataclass(frozen=True, slots=True)
class Replayed:
    """What came of a traffic under one policy."""

    policy: str
    num_blocks: int
    num_calls: int
    hit_rate: float
    """Of the prompt tokens."""
    mean_ttft_ms: float
    p50_ttft_ms: float
    p99_ttft_ms: float
    num_preemptions: int
    num_evictions_unlike_lru: int


class _Listening(VirtualDriver):
    """A driver that keeps what it is asked to run."""

    def __init__(self, header: Header) -> None:
        super().__init__(*build_instance(header))
        self.calls: list[tuple[int, SubmitRequest]] = []

    def at(self, at_ns: int, command: Command) -> None:
        if isinstance(command, SubmitRequest):
            self.calls.append((at_ns, command))
        super().at(at_ns, command)


def record(workload: Workload, header: Header) -> Traffic:
    """Runs a workload, whose clients wait for answers, and keeps the calls that they made."""
    driver = _Listening(header)
    simulate(workload, driver)
    return Traffic(workload.name, header, tuple(sorted(driver.calls, key=lambda call: call[0])))


def read(path: Path) -> Traffic:
    """The calls in a recording of a daemon. Raises RecordingError if it cannot be read."""
    recording = Recording(path)
    calls = [
        (step.now_ns, command)
        for step in recording.steps()
        for command in step.commands
        if isinstance(command, SubmitRequest)
    ]
    start_ns = calls[0][0] if calls else 0
    return Traffic(path.name, recording.header, tuple((at_ns - start_ns, command) for at_ns, command in calls))


def replay(traffic: Traffic, policy: str, num_blocks: int, meter: LossMeter | None = None) -> Replayed:
    """The same calls at the same times under a policy of `POLICY_CHANGES`, on simulated hardware as recorded.

    `meter` looks at each step. Raises AssertionError if a policy raises or a call fails.
    """
    config = dataclasses.replace(
        traffic.header.config,
        num_blocks=num_blocks,
        max_model_len=min(traffic.header.config.max_model_len, num_blocks * traffic.header.config.block_size),
        **POLICY_CHANGES[policy],  # type: ignore[arg-type]
    )
    header = dataclasses.replace(traffic.header, config=config)
    commands = [command for _, command in traffic.calls]
    core = build_core(header, {**POLICIES, "belady": lambda _: ReplayOracle(commands, config.block_size)})
    driver = VirtualDriver(core, build_instance(dataclasses.replace(traffic.header, config=config)).executor)
    for at_ns, command in traffic.calls:
        driver.at(at_ns, command)
    finished: list[RequestFinished] = []
    while (result := driver.advance()) is not None:
        finished += [event for event in result.events if isinstance(event, RequestFinished)]
        if meter is not None:
            meter.saw(result, core.memory)
    return _summary(policy, num_blocks, finished, core.stats().num_preemptions, driver)


def _summary(
    policy: str, num_blocks: int, finished: Sequence[RequestFinished], num_preemptions: int, driver: VirtualDriver
) -> Replayed:
    stats = driver.core.stats().policies
    assert stats is None or not stats.failures, f"{policy}: {stats.failures}"
    assert all(event.error is None for event in finished), "a call failed"
    waits = [
        event.stats.first_token_ns - event.stats.arrival_ns
        for event in finished
        if event.stats.first_token_ns is not None
    ]
    ttft_ms = np.array(waits) / 1e6
    return Replayed(
        policy=policy,
        num_blocks=num_blocks,
        num_calls=len(finished),
        hit_rate=sum(e.stats.num_cached_tokens for e in finished) / sum(e.stats.num_prompt_tokens for e in finished),
        mean_ttft_ms=float(ttft_ms.mean()),
        p50_ttft_ms=float(np.percentile(ttft_ms, 50)),
        p99_ttft_ms=float(np.percentile(ttft_ms, 99)),
        num_preemptions=num_preemptions,
        num_evictions_unlike_lru=0 if stats is None else stats.counts["evictions_unlike_lru"],
    )
