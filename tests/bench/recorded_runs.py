"""Recordings as a daemon writes them, of simulated runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agentserve.core.batch import BatchOutput
from agentserve.core.costmodel import CostModel, DeviceProfile
from agentserve.core.decode_run import DecodePlan
from agentserve.core.engine import StepResult
from agentserve.core.events import Command, SubmitRequest
from agentserve.executors.simulated.executor import SimulatedExecutor
from agentserve.runtime.recording import Header, Recorder
from agentserve.runtime.replay import build_core
from agentserve.runtime.virtual import VirtualDriver
from agentserve.sim.orchestrator import simulate
from agentserve.sim.programs import Workload
from bench.fidelity.predict import slowed
from tests.core import builders


class Stepwise(SimulatedExecutor):
    """Makes every step by itself, as a daemon does: a recording has them one by one."""

    def decode_ends(self, plan: DecodePlan, before_ns: int | None) -> tuple[int, list[int]]:
        del plan, before_ns
        return 0, []


def record_run(
    path: Path,
    workload: Workload,
    *,
    slowdown: float = 1.0,
    header: Header | None = None,
    device: DeviceProfile | None = None,
) -> Any:
    """Simulates a workload and writes it down as a daemon does, with sessions as the load driver calls them.

    `device`: what it really runs on; by default what the control plane believes, `slowdown` times slower.
    """
    header = header or builders.header(num_blocks=256, max_model_len=512)
    assert header.model_shape is not None
    device = device or slowed(header.device or builders.device_profile(), slowdown)
    executor = Stepwise(
        CostModel(device, header.model_shape),
        num_blocks=header.config.num_blocks,
        block_size=header.config.block_size,
        vocabulary=range(100, 120),
        lookahead=header.config.decode_lookahead,
    )
    driver = VirtualDriver(build_core(header), executor)
    recorder = Recorder(path, header)
    step = driver.core.step

    def recorded(now_ns: int, completions: Sequence[BatchOutput], commands: Sequence[Command]) -> StepResult:
        named = [
            dataclasses.replace(c, session_id=f"S/{c.session_id}") for c in commands if isinstance(c, SubmitRequest)
        ]
        result = step(now_ns, completions, named)
        recorder.write(now_ns, completions, named, result)
        return result

    driver.core.step = recorded  # type: ignore[method-assign]
    run = simulate(workload, driver)
    recorder.close()
    return run.records
