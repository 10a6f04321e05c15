"""Builders with defaults: a test names only what it is about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agentserve.config import ControlConfig, EngineConfig, LoraConfig, TieringConfig
from agentserve.core.batch import Batch, BatchOutput, TokenSample
from agentserve.core.costmodel import Contention, CostModel, DeviceProfile, ModelShape
from agentserve.core.engine import EngineCore
from agentserve.core.events import RequestFinished, SubmitRequest
from agentserve.core.request import SamplingParams
from agentserve.executors.simulated.constrained import ConstrainedTokens
from agentserve.executors.simulated.executor import SimulatedExecutor
from agentserve.runtime.recording import Header
from agentserve.runtime.replay import build_core
from agentserve.runtime.virtual import VirtualDriver

MS = 1_000_000


def config(**values: Any) -> EngineConfig:
    defaults: dict[str, Any] = {
        "num_blocks": 64,
        "max_model_len": 256,
        "block_size": 4,
        "max_num_seqs": 8,
        "prefill_chunk": 16,
        "resume_budget": 8,
        "resume_max_steps": 2,
        "resume_min_cached_tokens": 8,
        "prefill_order": "fcfs",
        "control": ControlConfig(controller="static"),
    }
    return EngineConfig(**{**defaults, **values})


def header(compute_units: int = 8, **values: Any) -> Header:
    return Header(
        config=config(**values),
        compute_units=compute_units,
        unit_granularity=1,
        min_units=1,
        model="test",
        executor="simulated",
        device=device_profile(),
        model_shape=model_shape(),
    )


def core(**values: Any) -> EngineCore:
    return build_core(header(**values))


def device_profile(**values: Any) -> DeviceProfile:
    """A device on which a batch of weights takes 8 ms and a token of prefill on all units 1 ms."""
    defaults: dict[str, Any] = {
        "name": "test",
        "description": "a test device",
        "compute_units": 8,
        "unit_granularity": 1,
        "min_units": 1,
        "memory_bytes": 1 << 30,
        "bandwidth_bytes_per_s": 1e9,
        "flops_per_s": 2e9,
        "rows": ((1.0, 1.0),),
        "streaming_slowdown": 0.0,
        "bandwidth_saturation": 0.8,
        "rate_saturation": 0.0,
        "kv_bandwidth_bytes_per_s": 1e9,
        "attention_flops_per_s": 1e15,
        "attention_tile_rows": 16,
        "attention_tile_keys": 0.0,
        "attention_tail": 0.0,
        "fused_attention": False,
        "cache_bytes": 1,
        "cache_misalignment": 0.0,
        "overhead_ns": 0,
        "layer_overhead_ns": 0.0,
        "sequence_overhead_ns": 0.0,
        "sample_overhead_ns": 0.0,
        "contention": Contention.uniform(1.25),
        "provenance": "made up",
    }
    return DeviceProfile(**{**defaults, **values})


def model_shape() -> ModelShape:
    return ModelShape(
        num_linear_parameters=1_000_000,
        num_head_parameters=0,
        weight_bytes=8_000_000,
        kv_bytes_per_token=1000,
        attention_flops_per_pair=0,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
    )


def cost_model(**values: Any) -> CostModel:
    return CostModel(device_profile(**values), model_shape())


def simulated(
    num_blocks: int = 64,
    block_size: int = 4,
    lookahead: int = 1,
    tiering: TieringConfig | None = None,
    constrained: ConstrainedTokens | None = None,
    lora: LoraConfig | None = None,
) -> SimulatedExecutor:
    return SimulatedExecutor(
        cost_model(),
        num_blocks=num_blocks,
        block_size=block_size,
        vocabulary=range(100, 120),
        lookahead=lookahead,
        tiering=tiering,
        constrained=constrained,
        lora=lora,
    )


def virtual(**values: Any) -> VirtualDriver:
    engine = core(**values)
    values_of = engine.config
    return VirtualDriver(
        engine,
        simulated(
            values_of.num_blocks,
            values_of.block_size,
            values_of.decode_lookahead,
            values_of.tiering,
            lora=values_of.lora,
        ),
    )


def submit(
    request_id: str, prompt: Sequence[int] | int, *, max_tokens: int = 3, seed: int = 0, **values: Any
) -> SubmitRequest:
    """`prompt`: token ids, or how many there are; then they are unlike those of other request ids."""
    if isinstance(prompt, int):
        base = 1000 * (1 + sum(request_id.encode()))
        prompt = range(base, base + prompt)
    return SubmitRequest(
        request_id, tuple(prompt), SamplingParams(max_tokens=max_tokens, temperature=0.0, seed=seed), **values
    )


def output(batch: Batch, *, error: str | None = None, token_id: int = 7, at_ns: int = 0) -> BatchOutput:
    """What an executor would answer: the same token for every chunk that samples."""
    samples = tuple(TokenSample(chunk.request_id, token_id) for chunk in batch.chunks if chunk.sample)
    return BatchOutput(batch.batch_id, batch.lane, at_ns, at_ns, () if error else samples, error)


def finished(results: Sequence[Any]) -> dict[str, RequestFinished]:
    """Terminal events by request; fails if a request has two."""
    found: dict[str, RequestFinished] = {}
    for result in results:
        for event in result.events:
            if isinstance(event, RequestFinished):
                assert event.request_id not in found, f"two terminal events for {event.request_id}"
                found[event.request_id] = event
    return found
