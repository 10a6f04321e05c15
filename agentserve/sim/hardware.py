"""A device and a model on it: what an engine on simulated hardware is built from."""

from __future__ import annotations

from dataclasses import dataclass

from agentserve.config import EngineConfig
from agentserve.core.batch import Lane
from agentserve.core.costmodel import BatchShape, CostModel, DeviceProfile, ModelShape
from agentserve.core.slots import PartitionTable, build_partition_table
from agentserve.errors import ConfigError
from agentserve.runtime.recording import Header

_MEMORY_SHARE = 0.9
"""As the daemon takes it: the rest is for activations."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """A device with its timing, and the model that it serves."""

    profile: DeviceProfile
    shape: ModelShape
    model: str
    """Its name."""
    trained_window: int
    """Tokens that the model was made for."""

    @property
    def cost_model(self) -> CostModel:
        """A new one: it remembers what it has computed."""
        return CostModel(self.profile, self.shape)

    @property
    def table(self) -> PartitionTable:
        """The ways to share the device."""
        profile = self.profile
        return build_partition_table(profile.compute_units, profile.unit_granularity, profile.min_units)

    @property
    def conditions(self) -> str:
        """A line about what is simulated, with where the numbers come from: measured, fitted or estimated."""
        provenance = self.profile.provenance.partition(":")[0]
        return f"simulated timing, {self.profile.description} ({provenance}), {self.model}"

    def num_blocks(self, block_size: int, kv_cache_bytes: int | None = None) -> int:
        """KV blocks that fit: in so many bytes, or in what the weights leave of 90 % of the device's memory.

        Raises ConfigError if there is no room for one.
        """
        if kv_cache_bytes is None:
            kv_cache_bytes = int(self.profile.memory_bytes * _MEMORY_SHARE) - self.shape.weight_bytes
            if kv_cache_bytes <= 0:
                weights, memory = self.shape.weight_bytes / 2**30, self.profile.memory_bytes / 2**30
                raise ConfigError(
                    f"{self.model} does not fit a {self.profile.description}: {weights:.1f} GiB of weights, "
                    f"{memory:.0f} GiB of memory"
                )
        block_bytes = self.shape.kv_bytes_per_token * block_size
        if kv_cache_bytes < block_bytes:
            raise ConfigError(
                f"the KV cache of {self.model} needs at least {block_bytes} bytes for one block, not {kv_cache_bytes}"
            )
        return kv_cache_bytes // block_bytes

    def isolated_tpot_ns(self, num_context_tokens: int) -> int:
        """Time per token of a stream that has the device to itself."""
        alone = BatchShape(num_decodes=1, num_decode_context=num_context_tokens, num_samples=1)
        return self.cost_model.duration_ns(alone, Lane.DECODE, self.table.whole, False)

    def header(self, config: EngineConfig) -> Header:
        """What a core for this device is built with."""
        return Header(
            config=config,
            compute_units=self.profile.compute_units,
            unit_granularity=self.profile.unit_granularity,
            min_units=self.profile.min_units,
            model=self.model,
            executor="simulated",
            device=self.profile,
            model_shape=self.shape,
        )
