"""Makes the backend that was chosen."""

from __future__ import annotations

from collections.abc import Callable

import torch

from agentserve.executors.pytorch.attention.choice import AttentionChoice
from agentserve.executors.pytorch.attention.fused import native_fused_kernels, triton_fused_kernels
from agentserve.executors.pytorch.attention.interface import KvBackend
from agentserve.executors.pytorch.attention.mirror import MirrorBackend
from agentserve.executors.pytorch.attention.paged import PagedBackend, table_width
from agentserve.executors.pytorch.attention.paged_batch import FusedKernels
from agentserve.executors.pytorch.attention.paged_kernels import AttentionShape, PagedKernels, TorchKernels
from agentserve.executors.pytorch.devices.interface import Device
from agentserve.executors.pytorch.kv_store import KvStore
from agentserve.executors.pytorch.paged_pool import PagedPool
from agentserve.models.config import ModelConfig


def make_backend(
    choice: AttentionChoice,
    config: ModelConfig,
    dtype: torch.dtype,
    device: Device,
    *,
    num_blocks: int,
    block_size: int,
    max_num_seqs: int,
    max_model_len: int,
    lookahead: int,
) -> KvBackend:
    """The backend with its pool, all memory of it allocated."""
    if choice.name == "mirror":
        pool_bytes = config.kv_bytes_per_token(dtype.itemsize) * block_size * num_blocks
        store = KvStore(
            config,
            device,
            dtype,
            num_blocks=num_blocks,
            block_size=block_size,
            # Requests that run hold distinct tokens except for shared prefixes: as much as the pool is ample.
            mirror_limit_bytes=pool_bytes,
        )
        return MirrorBackend(store, config.num_kv_heads)
    shape = AttentionShape.of(config, block_size, dtype)
    pool = PagedPool(config, device, dtype, num_blocks=num_blocks, block_size=block_size)
    width = table_width(max_model_len, block_size)
    make_kernels = _kernels(choice.name, shape, pool, device, max_num_seqs=max_num_seqs, width=width)
    fused: FusedKernels | None = None
    if choice.is_fused:
        fused = native_fused_kernels() if choice.name == "native" else triton_fused_kernels()
    return PagedBackend(
        pool,
        device,
        make_kernels,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        lookahead=lookahead,
        fused=fused,
    )


def _kernels(
    name: str, shape: AttentionShape, pool: PagedPool, device: Device, *, max_num_seqs: int, width: int
) -> Callable[[], PagedKernels]:
    """Makes kernels for one lane. Their modules are imported here: most machines lack one of the packages."""
    if name == "triton":
        from agentserve.executors.pytorch.attention.triton_kernels import TritonKernels  # noqa: PLC0415

        return lambda: TritonKernels(
            shape,
            device.torch_device,
            max_num_seqs=max_num_seqs,
            max_context=width * shape.block_size,
            compute_units=device.compute_units,
        )
    if name == "flashinfer":
        from agentserve.executors.pytorch.attention.flashinfer import FlashInferKernels  # noqa: PLC0415

        return lambda: FlashInferKernels(shape, device.torch_device, spare_block=pool.spare_block, max_blocks=width)
    if name == "native":
        from agentserve.executors.pytorch.attention.native import NativeKernels  # noqa: PLC0415

        return lambda: NativeKernels(shape)
    assert name == "torch", name
    return lambda: TorchKernels(shape)
