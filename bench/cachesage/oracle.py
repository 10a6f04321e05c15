"""The bound: evicts what is needed last, by knowing the whole recording (Belady 1966)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from agentserve.core.agents import Policy, TurnEvent
from agentserve.core.agents.policy import TurnKind
from agentserve.core.events import SubmitRequest
from agentserve.core.memory.eviction import Key
from agentserve.core.memory.radix import RadixNode
from bench.cachesage.contents import Contents


class ReplayOracle(Policy):
    """Block by block: the one whose next call comes last goes first; of those that nobody needs, any.

    A bound for the hits of calls that arrive in this order, but for two things: only the ends of paths can be evicted,
    and calls that run at the same time hold memory, which the order of admission decides about.
    """

    name: ClassVar[str] = "oracle"
    scores_blocks: ClassVar[bool] = True

    def __init__(self, commands: Sequence[SubmitRequest], block_size: int) -> None:
        self._contents = Contents(commands, block_size)

    def observe(self, event: TurnEvent) -> None:
        if event.kind is TurnKind.ADMITTED:
            self._contents.admitted(event.request.request_id)
        elif event.kind is TurnKind.PREEMPTED:
            self._contents.preempted(event.request.request_id)

    def score_block(self, node: RadixNode) -> Key:
        number = self._contents.number(node)
        uses = self._contents.uses[number] if number is not None else []
        return (-uses[0] if uses else -math.inf, node.last_access)
