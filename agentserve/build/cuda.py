"""The torch executor on a GPU: slots, weights, memory and graphs, in the order in which they need each other.

Imports torch, so it is imported only where there is one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from agentserve.build.tiers import disk_options, measured_tiering
from agentserve.config import ServeConfig
from agentserve.core.batch import Lane
from agentserve.core.costmodel import DeviceProfile
from agentserve.core.masks import TokenMasks
from agentserve.core.slots import PartitionTable, build_partition_table
from agentserve.errors import ConfigError
from agentserve.executors.pytorch.devices.cuda import CudaDevice, CudaSlot
from agentserve.executors.pytorch.devices.cuda_runtime import cuda_obstacle
from agentserve.executors.pytorch.devices.graphs import DecodeGraphs
from agentserve.executors.pytorch.devices.memory import kv_pool_bytes
from agentserve.executors.pytorch.executor import TorchExecutor, kv_bytes_per_block
from agentserve.executors.pytorch.lora import make_store
from agentserve.executors.pytorch.warmup import compile_prefill, hold_activations, measure_rates
from agentserve.models.interface import DecoderModel
from agentserve.models.loader import load_model
from agentserve.models.lora import LoraAdapter
from agentserve.models.registry import ModelSource
from agentserve.profiles.sheets import from_data_sheet
from agentserve.runtime.live import MonotonicClock

logger = logging.getLogger(__name__)

_MAX_GRAPHS = 128
_GRAPH_SHARE = 0.03
"""Of the device's memory, for decode graphs: a gigabyte of 32."""


def gpu_obstacle(config: ServeConfig, source: ModelSource) -> str | None:
    """Why the GPU cannot serve this model, as half a sentence, or None if it seems that it can."""
    obstacle = cuda_obstacle()
    if obstacle is not None:
        return obstacle
    if config.load_format != "dummy" and source.path is None:
        return f"no weights of {source.name} were found on this machine"
    if source.config is None:
        return None  # the loader says what is wrong with the files
    weight_bytes = source.config.num_parameters * (4 if config.dtype == "float32" else 2)
    free_bytes, total_bytes = torch.cuda.mem_get_info(0)
    if weight_bytes > min(free_bytes, total_bytes * config.gpu_memory_utilization):
        return (
            f"{source.name} needs {weight_bytes / 2**30:.1f} GiB for its weights, and {free_bytes / 2**30:.1f} of the "
            f"GPU's {total_bytes / 2**30:.1f} GiB are free"
        )
    return None


def build_cuda_executor(
    config: ServeConfig,
    source: ModelSource,
    report: Callable[[str], None],
    masks: TokenMasks | None = None,
    adapters: Sequence[LoraAdapter] = (),
) -> tuple[TorchExecutor, DecoderModel, DeviceProfile]:
    """The executor, its model, and where a fit of the device starts. `masks` are for requests with a grammar.

    Raises ConfigError or ModelError, each with one clear sentence, and gives back what was taken by then.
    """
    device = CudaDevice(slots=slot_mode(config))
    try:
        return _build(device, config, source, report, masks=masks, adapters=adapters)
    except torch.OutOfMemoryError as error:
        device.close()
        raise ConfigError(f"{source.name} does not fit the GPU: {str(error).splitlines()[0]}") from error
    except BaseException:
        device.close()
        raise


def slot_mode(config: ServeConfig) -> str:
    """What `--slots` asks of the device: Green Contexts only where somebody may use them."""
    if config.slots in {"stream", "off"} or config.scheduler != "lanes":
        return "stream"
    return "green" if config.slots == "green" else "auto"


def _build(
    device: CudaDevice,
    config: ServeConfig,
    source: ModelSource,
    report: Callable[[str], None],
    *,
    masks: TokenMasks | None,
    adapters: Sequence[LoraAdapter],
) -> tuple[TorchExecutor, DecoderModel, DeviceProfile]:
    report(f"{device.description}: {device.decision.reason}")
    model = load_model(
        source,
        dtype=config.dtype,
        device=str(device.torch_device),
        load_format=config.load_format,
        seed=config.seed,
        report=report,
    )
    # Slots do not wait for the stream on which the weights were loaded.
    device.synchronize()
    sheet = _sheet(device, model)
    table = build_partition_table(
        device.compute_units, device.unit_granularity, device.min_units, unused_units=device.unused_units
    )
    hold_activations(
        model,
        device,
        table,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_num_seqs=config.max_num_seqs,
    )
    # Before the pool takes what is left.
    lora = make_store(model, adapters, device, max_slots=config.max_loras, max_rank=config.max_lora_rank)
    block_bytes = kv_bytes_per_block(model.config, model.dtype, config.block_size)
    window = min(config.max_model_len or model.config.max_position_embeddings, model.config.max_position_embeddings)
    pool_bytes = _pool_bytes(device, config, block_bytes, min_blocks=-(-window // config.block_size))
    graph_bytes = int(device.facts.memory_bytes * _GRAPH_SHARE)
    tiering = measured_tiering(config, device, block_bytes)
    executor = TorchExecutor(
        model,
        device,
        num_blocks=pool_bytes // block_bytes,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_model_len=window,
        clock=MonotonicClock(),
        token_masks=masks,
        attention=config.attention_backend,
        lora=lora,
        tiering=tiering,
        disk=disk_options(config, source),
        make_graphs=lambda step, buckets: DecodeGraphs(
            step, buckets=buckets, max_graphs=_MAX_GRAPHS, max_bytes=graph_bytes
        ),
    )
    report(f"{executor.attention.reason}; capturing decode graphs")
    try:
        executor.prepare_graphs(_usual_slots(device, table))
        compile_prefill(executor, table, _warm_up_sizes(config.max_num_batched_tokens), max_model_len=window)
    except BaseException:
        executor.close()
        raise
    return executor, model, sheet


def _warm_up_sizes(max_num_batched_tokens: int) -> tuple[int, ...]:
    """Prompts short and long: kernels have other tiles for each."""
    return (*(size for size in (2, 16, 64, 256, 1024) if size < max_num_batched_tokens), max_num_batched_tokens)


def _usual_slots(device: CudaDevice, table: PartitionTable) -> list[CudaSlot]:
    """Where most decode steps run: alone, and beside a prefill in the middle of the ladder."""
    entries = [table.whole, *(table.splits[len(table.splits) // 2 :][:1])]
    return [device.slot(Lane.DECODE, entry.decode_units) for entry in entries]


def _pool_bytes(device: CudaDevice, config: ServeConfig, block_bytes: int, min_blocks: int) -> int:
    if config.kv_cache_memory is not None:
        return max(1, config.kv_cache_memory // block_bytes) * block_bytes
    reserve_bytes = int(device.facts.memory_bytes * _GRAPH_SHARE)
    reading = device.memory()
    return kv_pool_bytes(
        reading,
        config.gpu_memory_utilization,
        block_bytes=block_bytes,
        reserve_bytes=reserve_bytes,
        # The window may shrink to what fits, but not below one that is asked for.
        min_blocks=min_blocks if config.max_model_len is not None else 1,
    )


def _sheet(device: CudaDevice, model: DecoderModel) -> DeviceProfile:
    bandwidth, flops = measure_rates(device.torch_device, model.dtype)
    facts = device.facts
    return from_data_sheet(
        "cuda",
        device.description,
        bandwidth_bytes_per_s=bandwidth,
        flops_per_s=flops,
        compute_units=device.compute_units,
        memory_bytes=facts.memory_bytes,
        cache_bytes=facts.l2_bytes,
        unit_granularity=device.unit_granularity,
        min_units=device.min_units,
        provenance="estimated: from a copy and a matrix product",
    )
