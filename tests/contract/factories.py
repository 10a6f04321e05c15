"""The executors that the contract suite runs over."""

from __future__ import annotations

from functools import partial
from typing import Any

from agentserve.core.clock import VirtualClock
from agentserve.core.masks import TokenMasks
from agentserve.executors.simulated.constrained import ConstrainedTokens
from tests.contract.harness import BLOCK_SIZE, NUM_BLOCKS, Harness
from tests.core import builders as core_builders
from tests.executors.builders import torch_harness


def simulated(*, token_masks: TokenMasks | None = None, **values: Any) -> Harness:
    """The simulated executor on a virtual clock."""
    constrained = None if token_masks is None else ConstrainedTokens(token_masks, ())
    return Harness(core_builders.simulated(NUM_BLOCKS, BLOCK_SIZE, constrained=constrained, **values), VirtualClock())


def torch_cpu(**values: Any) -> Harness:
    """The torch executor with a tiny model of random weights."""
    return torch_harness(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, **values)


FACTORIES = {
    "simulated": simulated,
    "torch-cpu": torch_cpu,
    "torch-cpu-lookahead": partial(torch_cpu, lookahead=2),
    "torch-cpu-paged": partial(torch_cpu, attention="torch"),
    "torch-cpu-paged-lookahead": partial(torch_cpu, attention="torch", lookahead=2),
}
