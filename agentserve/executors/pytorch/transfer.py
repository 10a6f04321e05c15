"""Small copies between host and device that never make the host wait.

`torch.tensor(values, device="cuda")` waits for everything that was launched on the stream before it, and so does
reading a value back. Going through page-locked memory does not; the allocator of page-locked memory keeps a piece until
the copy that uses it is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def upload(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`values` as a tensor on `device`; the copy is ordered in the current stream."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor if device.type == "cpu" else to_device(tensor, device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on `device`; the copy is ordered in the current stream."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """`tensor` in host memory, valid after a fence behind this call; page-locked if it comes from a device."""
    return tensor if tensor.is_cpu else tensor.to("cpu", non_blocking=True)
