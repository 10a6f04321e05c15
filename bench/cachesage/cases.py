"""What is run: one traffic in one size of memory, under each policy. In a module that other processes can import."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from agentserve.build.simulation import make_plans
from agentserve.sim.cells import expand
from bench.cachesage.traffic import POLICY_CHANGES, Replayed, Traffic, read, record, replay


@dataclass(frozen=True, slots=True)
class Case:
    """One traffic in one size of memory."""

    workload: str
    num_blocks: int
    seed: int
    num_agents: int
    num_tasks: int
    max_num_seqs: int
    gpu: str
    recording: Path | None = None


def traffic_of(case: Case) -> Traffic:
    """Records it, or reads the recording of a daemon. Raises AgentServeError."""
    if case.recording is not None:
        return read(case.recording)
    options = {
        "workload": case.workload,
        "agents": str(case.num_agents),
        "programs": str(case.num_tasks),
        "gpu": case.gpu,
        "max_num_seqs": str(case.max_num_seqs),
        "seed": str(case.seed),
    }
    (plan,) = make_plans(expand(options))
    config = plan.header.config
    num_tokens = case.num_blocks * config.block_size
    window = min(num_tokens, plan.workload.num_context_tokens + 1)
    config = dataclasses.replace(config, num_blocks=case.num_blocks, max_model_len=window)
    return record(plan.workload, dataclasses.replace(plan.header, config=config))


def run_case(case: Case) -> list[Replayed]:
    """Under each policy, lru first."""
    traffic = traffic_of(case)
    return [replay(traffic, policy, case.num_blocks) for policy in POLICY_CHANGES]
