"""The LoRA adapters of an engine: read from files for the daemon, made up for a simulation. Needs no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from agentserve.config import AdapterConfig, LoraConfig, ServeConfig
from agentserve.errors import ConfigError
from agentserve.models.config import ModelConfig
from agentserve.models.lora import LoraAdapter, find_adapters, linear_shapes, read_adapter
from agentserve.models.registry import ModelSource
from agentserve.profiles.links import host_link


def read_adapters(config: ServeConfig, source: ModelSource) -> tuple[LoraAdapter, ...]:
    """The adapters that the options name, each of which fits the model.

    Raises ConfigError, ModelFormatError or UnsupportedModelError for the first one that cannot be used.
    """
    paths, model = find_adapters(config.lora, config.lora_dir), source.config
    if not paths:
        return ()
    if model is None:
        raise ConfigError(f"the shape of {source.name} is not known, so no adapter can be checked against it")
    return tuple(read_adapter(name, path, model, max_rank=config.max_lora_rank) for name, path in paths.items())


def lora_config(
    adapters: Collection[LoraAdapter], model: ModelConfig, max_loras: int, profile_name: str
) -> LoraConfig | None:
    """What the control plane must know of adapters; None if there are none. They come over the link to the host."""
    if not adapters:
        return None
    configs = tuple(adapter.config(model.num_layers) for adapter in adapters)
    link = host_link(profile_name)
    return LoraConfig(configs, min(max_loras, len(configs)), link.bytes_per_s, link.latency_ns)


def simulated_lora(
    names: Collection[str], model: ModelConfig, *, rank: int, max_loras: int, element_size: int, profile_name: str
) -> LoraConfig | None:
    """Adapters of all linear layers that exist in name and size only; None if there are no names."""
    if not names:
        return None
    num_elements = model.num_layers * rank * sum(sum(shape) for shape in linear_shapes(model).values())
    configs = tuple(AdapterConfig(name, num_elements * element_size, model.num_layers) for name in names)
    link = host_link(profile_name)
    return LoraConfig(configs, min(max_loras, len(configs)), link.bytes_per_s, link.latency_ns)


def recorded_lora(lora: LoraConfig, max_loras: int | None, profile_name: str | None) -> LoraConfig:
    """The adapters of a recording on a device that may be another one.

    Args:
        lora: as recorded.
        max_loras: how many fit the device; None: as recorded.
        profile_name: of the other device, whose link to the host they come over; None: it is the same one.
    """
    max_resident = lora.max_resident if max_loras is None else min(max_loras, len(lora.adapters))
    if profile_name is None:
        return dataclasses.replace(lora, max_resident=max_resident)
    link = host_link(profile_name)
    return dataclasses.replace(
        lora, max_resident=max_resident, read_bytes_per_s=link.bytes_per_s, latency_ns=link.latency_ns
    )


def slot_bytes(model: ModelConfig, rank: int, num_slots: int, element_size: int) -> int:
    """Memory of the device that so many slots for adapters of this rank take."""
    per_layer = sum(sum(shape) for shape in linear_shapes(model).values())
    return model.num_layers * rank * per_layer * num_slots * element_size
