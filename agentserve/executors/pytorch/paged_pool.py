"""The pool of KV blocks that is attended to in place.

    pages     [num_blocks + 1, num_layers, 2, num_kv_heads, block_size, head_dim]

A block, all layers of it, is one piece of memory: it moves between tiers in one copy. For a layer, keys and values
are views of it, `[num_blocks + 1, num_kv_heads, block_size, head_dim]` each, in which only the first stride is unusual;
that is the layout that FlashInfer calls HND.

The last block belongs to nobody. Rows of padding write there where a kernel cannot leave a write out, so that a slot of
-1, the last token of the last block, is right for both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agentserve.executors.pytorch.devices.interface import Device
from agentserve.models.config import ModelConfig


class PagedPool:
    """All blocks, allocated once."""

    def __init__(
        self, config: ModelConfig, device: Device, dtype: torch.dtype, *, num_blocks: int, block_size: int
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.spare_block = num_blocks
        self.pages = device.empty(
            (num_blocks + 1, config.num_layers, 2, config.num_kv_heads, block_size, config.head_dim), dtype
        )
        if device.torch_device.type == "cpu":
            # The operating system supplies pages when they are first written: an unused pool costs nothing.
            self.pages[self.spare_block].zero_()
        else:
            # What was in this memory before may not be numbers. A kernel that weighs the end of a block with zero
            # would make them its result.
            self.pages.zero_()
            device.synchronize()
        self.pages_by_layer: tuple[tuple[Tensor, Tensor], ...] = tuple(
            zip(self.pages[:, :, 0].unbind(1), self.pages[:, :, 1].unbind(1), strict=True)
        )
        """Keys and values of each layer."""
