"""Checks of arguments that launchers share. They look at shapes, strides and dtypes only, never at values."""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HEAD_DIMS = (64, 80, 96, 128, 256)
BLOCK_SIZES = (8, 16, 32, 64, 128)


class KernelArgumentError(ValueError):
    """An argument of a launcher has a wrong shape, stride, dtype or device."""


def require(condition: bool, message: str) -> None:
    """Raises KernelArgumentError with `message` unless `condition` holds."""
    if not condition:
        raise KernelArgumentError(message)


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: tuple[int | None, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device | None = None,
    *,
    num_packed: int = 1,
) -> None:
    """Checks shape (None: any size), dtype, device, and that the last `num_packed` axes are contiguous."""
    sizes = tuple(tensor.shape)
    fits = len(sizes) == len(shape) and all(want in {None, size} for want, size in zip(shape, sizes, strict=True))
    require(fits, f"{name} has shape {list(sizes)}, expected {_shown(shape)}")
    require(tensor.dtype in dtypes, f"{name} is {tensor.dtype}, expected {' or '.join(str(dtype) for dtype in dtypes)}")
    require(device is None or tensor.device == device, f"{name} is on {tensor.device}, expected {device}")
    stride = 1
    for axis in range(len(sizes) - 1, len(sizes) - 1 - num_packed, -1):
        packed = sizes[axis] == 1 or tensor.stride(axis) == stride
        require(packed, f"{name} has strides {tensor.stride()}, its last {num_packed} axes must be contiguous")
        stride *= sizes[axis]


def check_pages(k_pages: Tensor, v_pages: Tensor, *, num_heads: int, head_dim: int) -> None:
    """Checks the pages of one layer, each `[num_blocks, num_kv_heads, block_size, head_dim]`; any stride in axis 0."""
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        check_tensor(name, pages, (None, None, None, head_dim), FLOAT_DTYPES, num_packed=3)
    same = k_pages.shape == v_pages.shape and k_pages.stride() == v_pages.stride()
    require(same and k_pages.dtype == v_pages.dtype and k_pages.device == v_pages.device, "k_pages and v_pages differ")
    _, num_kv_heads, block_size, _ = k_pages.shape
    require(head_dim in HEAD_DIMS, f"head_dim is {head_dim}, expected one of {HEAD_DIMS}")
    require(block_size in BLOCK_SIZES, f"block_size is {block_size}, expected one of {BLOCK_SIZES}")
    require(num_heads % num_kv_heads == 0, f"{num_heads} query heads cannot share {num_kv_heads} KV heads")


def check_units(num_units: int) -> None:
    """Checks a number of SMs."""
    require(num_units >= 1, f"num_units is {num_units}, expected at least 1")


def _shown(shape: tuple[int | None, ...]) -> str:
    return "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
