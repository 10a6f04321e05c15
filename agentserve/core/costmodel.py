"""How long a batch takes: a roofline over its shape, the share of the device and the other lane.

    duration = max(bytes / bandwidth(units), flops / rate(units)) * contention + overhead

Bytes are the weights, read once a batch, and the KV of every sequence; flops are the linear layers and the attention
(Williams et al. 2009 for the roofline; the terms follow Vidur, section 4). Bandwidth saturates before the compute
units do: that is why decode needs only a part of a GPU (AgentServe, Fig. 3).
"""

from __future__ import annotations

from dataclasses import dataclass

from agentserve.core.batch import Batch, Lane
from agentserve.core.request import WorkClass
from agentserve.core.slots import SlotPartition
from agentserve.errors import ConfigError


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """What a device can do."""

    name: str
    description: str
    compute_units: int
    unit_granularity: int
    min_units: int
    memory_bytes: int
    bandwidth_bytes_per_s: float
    flops_per_s: float
    """Dense matrix rate in the data type that is served."""
    bandwidth_knee: float
    """Share of the units that reaches half of what the whole device would add: small means early saturation."""
    contention: float
    """Factor on a batch's time while the other lane is busy on disjoint units."""
    overhead_ns: int
    """Per batch, independent of its size."""
    provenance: str
    """`measured`, `fitted` or `estimated`, and from what."""

    def __post_init__(self) -> None:
        if min(self.compute_units, self.unit_granularity, self.min_units, self.memory_bytes) < 1:
            raise ConfigError(f"profile {self.name}: sizes must be positive")
        if min(self.bandwidth_bytes_per_s, self.flops_per_s, self.bandwidth_knee) <= 0:
            raise ConfigError(f"profile {self.name}: rates must be positive")
        if self.contention < 1.0 or self.overhead_ns < 0:
            raise ConfigError(f"profile {self.name}: contention below 1 or negative overhead")

    def bandwidth(self, units: int) -> float:
        """Bytes per second that `units` compute units can draw: rises steeply, then saturates."""
        share = min(1.0, units / self.compute_units)
        return self.bandwidth_bytes_per_s * share * (1.0 + self.bandwidth_knee) / (share + self.bandwidth_knee)

    def rate(self, units: int) -> float:
        """Flops per second of `units` compute units: proportional."""
        return self.flops_per_s * min(1.0, units / self.compute_units)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the cost of a model depends on."""

    num_linear_parameters: int
    """Weights that every token is multiplied with: all but the embedding table."""
    num_head_parameters: int
    """Weights of the output head: only tokens that are sampled pass through it."""
    weight_bytes: int
    kv_bytes_per_token: int
    attention_flops_per_pair: int
    """For one query token and one key token, over all layers and heads."""


@dataclass(frozen=True, slots=True)
class BatchShape:
    """What the cost of a batch depends on."""

    num_decodes: int = 0
    """Sequences of which one token is decoded."""
    num_decode_context: int = 0
    """Sum over the decodes of the tokens that they attend to, themselves included."""
    num_prefill_chunks: int = 0
    num_prefill_tokens: int = 0
    num_prefill_context: int = 0
    """Sum over the prefill chunks of the tokens whose KV is read or written: the end of the chunk."""
    num_prefill_pairs: int = 0
    """Sum over the prefill chunks of n * start + n * (n + 1) / 2: each token looks at what is before it and at itself."""
    num_samples: int = 0
    """Tokens that pass through the output head: all decodes, and the last token of each prompt that is finished."""

    @property
    def num_tokens(self) -> int:
        return self.num_decodes + self.num_prefill_tokens

    @classmethod
    def of(cls, batch: Batch) -> BatchShape:
        num_decodes = decode_context = num_chunks = num_tokens = prefill_context = num_pairs = num_samples = 0
        for chunk in batch.chunks:
            num_samples += chunk.sample is not None
            if chunk.work_class is WorkClass.DECODE:
                num_decodes += 1
                decode_context += chunk.end
                continue
            n = chunk.num_tokens
            num_chunks += 1
            num_tokens += n
            prefill_context += chunk.end
            num_pairs += n * chunk.start + n * (n + 1) // 2
        return cls(num_decodes, decode_context, num_chunks, num_tokens, prefill_context, num_pairs, num_samples)

    def with_prefill(self, num_tokens: int, start: int = 0) -> BatchShape:
        """This shape and one more prefill chunk, of a prompt that is not finished by it."""
        return BatchShape(
            self.num_decodes,
            self.num_decode_context,
            self.num_prefill_chunks + 1,
            self.num_prefill_tokens + num_tokens,
            self.num_prefill_context + start + num_tokens,
            self.num_prefill_pairs + num_tokens * start + num_tokens * (num_tokens + 1) // 2,
            self.num_samples,
        )


@dataclass(frozen=True, slots=True)
class Sample:
    """One measured (or simulated) batch: what a profile is fitted to."""

    shape: BatchShape
    lane: Lane
    partition: SlotPartition
    co_running: bool
    """The other lane was busy all the time."""
    duration_ns: int


class CostModel:
    """Predicts the duration of batches of one model on one device."""

    def __init__(self, device: DeviceProfile, model: ModelShape) -> None:
        self.device = device
        self.model = model

    def duration_ns(self, shape: BatchShape, lane: Lane, partition: SlotPartition, co_running: bool) -> int:
        """Predicted duration in a lane of a partition; `co_running`: the other lane is busy meanwhile."""
        model, units = self.model, partition.units(lane)
        num_context = shape.num_decode_context + shape.num_prefill_context
        num_bytes = model.weight_bytes + num_context * model.kv_bytes_per_token
        flops = (
            2 * shape.num_tokens * model.num_linear_parameters
            + 2 * shape.num_samples * model.num_head_parameters
            + (shape.num_prefill_pairs + shape.num_decode_context) * model.attention_flops_per_pair
        )
        seconds = max(num_bytes / self.device.bandwidth(units), flops / self.device.rate(units))
        factor = self.device.contention if co_running else 1.0
        return self.device.overhead_ns + round(seconds * factor * 1e9)
