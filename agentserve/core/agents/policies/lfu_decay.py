"""Least frequently used, with decay."""

from __future__ import annotations

import math
from typing import ClassVar

from agentserve.core.agents.policy import Policy
from agentserve.core.memory.eviction import Key
from agentserve.core.memory.radix import RadixNode

DECAY = 0.1
"""As in CacheSage's fork of vLLM: what was used ten turns ago counts for a third."""


class LfuDecay(Policy):
    """Blocks are worth `num_uses * exp(-DECAY * age)`, age in uses of the cache since its own (CacheSage).

    The order of such values does not change with time: the logarithm is `ln(num_uses) + DECAY * last_access` less the
    same number for all. So a block's key stays what it is until the block is used.
    """

    name: ClassVar[str] = "lfu_decay"
    scores_blocks: ClassVar[bool] = True

    def score_block(self, node: RadixNode) -> Key:
        return (math.log(max(1, node.num_uses)) + DECAY * node.last_access,)
