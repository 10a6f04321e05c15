"""The bound: evicts what is needed last, by knowing the whole recording (Belady 1966)."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

from agentserve.core.agents import Policy, TurnEvent
from agentserve.core.agents.policy import TurnKind
from agentserve.core.events import SubmitRequest
from agentserve.core.memory.eviction import Key
from agentserve.core.memory.radix import RadixNode

_Content = tuple[int, tuple[int, ...]]
"""What a block is: the block before it, by number, and its tokens."""


class ReplayOracle(Policy):
    """Block by block: the one whose next call comes last goes first; of those that nobody needs, any.

    A bound for the hits of calls that arrive in this order, but for two things: only the ends of paths can be evicted,
    and calls that run at the same time hold memory, which the order of admission decides about.
    """

    name: ClassVar[str] = "oracle"
    scores_blocks: ClassVar[bool] = True

    def __init__(self, commands: Sequence[SubmitRequest], block_size: int) -> None:
        self._numbers: dict[_Content, int] = {}
        self._paths: dict[str, tuple[int, list[int]]] = {}
        self._uses: list[list[int]] = [[]]  # by number of the content; 0 is before the first block
        self._known: dict[int, int | None] = {}
        for index, command in enumerate(commands):
            path, before = [], 0
            tokens = command.prompt_token_ids
            for start in range(0, (len(tokens) - 1) // block_size * block_size, block_size):
                before = self._numbers.setdefault((before, tokens[start : start + block_size]), len(self._uses))
                if before == len(self._uses):
                    self._uses.append([])
                self._uses[before].append(index)
                path.append(before)
            self._paths[command.request_id] = (index, path)

    def observe(self, event: TurnEvent) -> None:
        index, path = self._paths[event.request.request_id]
        if event.kind is TurnKind.ADMITTED:
            for number in path:
                self._uses[number].remove(index)
        elif event.kind is TurnKind.PREEMPTED:
            for number in path:
                bisect.insort(self._uses[number], index)

    def score_block(self, node: RadixNode) -> Key:
        number = self._number(node)
        uses = self._uses[number] if number is not None else []
        return (-uses[0] if uses else -math.inf, node.last_access)

    def _number(self, node: RadixNode | None) -> int | None:
        """None: no prompt contains it, it is an answer."""
        if node is None or node.parent is None:
            return 0
        if node.sequence not in self._known:
            before = self._number(node.parent)
            numbers: Mapping[_Content, int] = self._numbers
            self._known[node.sequence] = None if before is None else numbers.get((before, node.key))
        return self._known[node.sequence]
