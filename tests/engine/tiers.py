"""Engines with tiers and a real executor, for tests."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from agentserve.config import ControlConfig, EngineConfig, TierConfig, TieringConfig
from agentserve.core.engine import EngineCore, StepResult
from agentserve.core.events import Command, FlushTiers, RequestFinished, SubmitRequest, TokenGenerated
from agentserve.core.request import FinishReason, SamplingParams
from agentserve.core.stats import TierStats
from agentserve.executors.pytorch.devices.cpu import CpuDevice
from agentserve.executors.pytorch.executor import TorchExecutor, kv_bytes_per_block
from agentserve.executors.pytorch.tiers.disk import DiskOptions
from agentserve.models.interface import DecoderModel
from agentserve.runtime.live import MonotonicClock
from agentserve.runtime.recording import Header
from agentserve.runtime.replay import build_core
from tests.engine.harness import Run

BLOCK_SIZE = 16
_TIMEOUT_S = 60


def tiering(model: DecoderModel, *, host: int = 0, disk: int = 0, **values: Any) -> TieringConfig | None:
    """Tiers of so many blocks, with links that are always worth it."""
    tiers = tuple(TierConfig(name, size, 1e12, 1e12) for name, size in (("host", host), ("disk", disk)) if size)
    return TieringConfig(kv_bytes_per_block(model.config, model.dtype, BLOCK_SIZE), tiers, **values) if tiers else None


@dataclass
class TieredEngine:
    """A core and its executor."""

    core: EngineCore
    executor: TorchExecutor

    def __post_init__(self) -> None:
        self._woken = threading.Event()
        self.executor.on_completion(self._woken.set)

    def step(self, commands: Sequence[Command] = ()) -> StepResult:
        """One step with what has finished, and its batches and copies begun."""
        result = self.core.step(time.monotonic_ns(), self.executor.poll(time.monotonic_ns()), commands)
        self.core.check_invariants()
        for batch in result.batches:
            self.executor.submit(batch, time.monotonic_ns())
        for transfer in result.transfers:
            self.executor.submit_transfer(transfer, time.monotonic_ns())
        return result

    def run(
        self,
        requests: Sequence[SubmitRequest],
        *,
        apart: bool = False,
        on_end: Mapping[str, Callable[[], None]] = MappingProxyType({}),
    ) -> Run:
        """Runs requests to their ends, all at once or each after the one before; `on_end` is called with its end."""
        run = Run()
        for group in [[request] for request in requests] if apart else [list(requests)]:
            commands = group
            while commands or self.core.has_unfinished:
                result = self.step(commands)
                commands = []
                for event in result.events:
                    if isinstance(event, TokenGenerated):
                        run.tokens.setdefault(event.request_id, []).append(event.sample.token_id)
                        run.logprobs.setdefault(event.request_id, []).append(event.sample.logprob)
                    elif isinstance(event, RequestFinished):
                        assert event.reason is not FinishReason.ERROR, event.error
                        run.ends[event.request_id] = event
                        on_end.get(event.request_id, lambda: None)()
                if self.core.has_unfinished:
                    self._wait()
        return run

    def settle(self) -> None:
        """Waits for the copies that nobody waits for."""
        residency = self.core.memory.residency
        assert residency is not None
        while residency.is_busy:
            self._wait()
            self.step()

    def flush(self) -> None:
        """What a driver does before it stops."""
        self.settle()
        self.step([FlushTiers()])
        self.settle()

    def _wait(self) -> None:
        assert self._woken.wait(_TIMEOUT_S), "the executor is silent"
        self._woken.clear()

    def stats(self, tier: str) -> TierStats:
        return next(stats for stats in self.core.stats().tiers if stats.tier == tier)

    def close(self) -> None:
        """Checks that nothing is left behind, and ends the executor."""
        if self.core.memory.residency is not None:
            self.settle()
        assert not self.core.has_unfinished
        assert self.core.memory.num_available_blocks == self.core.memory.num_blocks
        self.executor.close()


def start(
    model: DecoderModel,
    *,
    num_blocks: int,
    attention: str = "mirror",
    tiers: TieringConfig | None = None,
    directory: Path | None = None,
    max_model_len: int = 208,
    identity: str = "weights",
) -> TieredEngine:
    """An engine that knows what its disk tier held before."""
    executor = TorchExecutor(
        model,
        CpuDevice(),
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        max_num_seqs=8,
        clock=MonotonicClock(),
        attention=attention,
        tiering=tiers,
        disk=None if directory is None else DiskOptions(directory, identity),
    )
    capabilities = executor.capabilities()
    config = EngineConfig(
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        max_model_len=max_model_len,
        max_num_seqs=8,
        control=ControlConfig(controller="static"),
        tiering=tiers,
    )
    units = capabilities.compute_units
    core = build_core(Header(config, units, capabilities.unit_granularity, capabilities.min_units, "m", "cpu"))
    core.step(time.monotonic_ns(), executor.tier_contents, [])
    return TieredEngine(core, executor)


def greedy(name: str, prompt: Sequence[int], num_tokens: int = 8) -> SubmitRequest:
    return SubmitRequest(name, tuple(prompt), SamplingParams(max_tokens=num_tokens, temperature=0.0, logprobs=0))
