"""What the device can do at best: the two rates that everything else is held against."""

from __future__ import annotations

from typing import Any

import torch

from bench.gpu.record import spread
from bench.gpu.timing import time_work

_GPU_BYTES, _GPU_SIZE = 2 << 30, 8192
_CPU_BYTES, _CPU_SIZE = 4 << 20, 128


def ceilings(device_type: str) -> dict[str, Any]:
    """Bytes a second of a large copy, counting those read and those written, and operations a second of a product.

    Random numbers: zeros take less power and run faster.
    """
    device = torch.device(device_type)
    num_bytes, size = (_GPU_BYTES, _GPU_SIZE) if device.type == "cuda" else (_CPU_BYTES, _CPU_SIZE)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    copies_ms, products_ms = _copies(num_bytes, device), _products(size, dtype, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return {
        "copy_bytes_per_s": spread(2 * num_bytes / ms * 1e3 for ms in copies_ms),
        "matrix_flops_per_s": spread(2 * size**3 / ms * 1e3 for ms in products_ms),
        "how": f"copy of {num_bytes >> 20} MiB; product of {size}x{size} {str(dtype).removeprefix('torch.')}",
    }


def _copies(num_bytes: int, device: torch.device) -> list[float]:
    source = torch.randn(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return time_work(lambda: target.copy_(source), device)


def _products(size: int, dtype: torch.dtype, device: torch.device) -> list[float]:
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    return time_work(lambda: torch.matmul(left, right, out=out), device)
