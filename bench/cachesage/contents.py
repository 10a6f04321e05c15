"""What the blocks of a recording hold, and which calls need them."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence

from agentserve.core.events import SubmitRequest
from agentserve.core.memory.radix import RadixNode

_Content = tuple[int, tuple[int, ...]]
"""What a block is: the block before it, by number, and its tokens."""


class Contents:
    """All blocks of all prompts, by number, and the calls to come that need them."""

    def __init__(self, commands: Sequence[SubmitRequest], block_size: int) -> None:
        self.paths: dict[str, list[int]] = {}
        """The blocks of each call's prompt that can be found in a cache."""
        self.uses: list[list[int]] = [[]]  # 0 is before the first block
        """For each block the calls that need it and have not been admitted, by their order."""
        self._numbers: dict[_Content, int] = {}
        self._order: dict[str, int] = {}
        self._known: dict[int, int | None] = {}
        for index, command in enumerate(commands):
            path, before = [], 0
            tokens = command.prompt_token_ids
            for start in range(0, (len(tokens) - 1) // block_size * block_size, block_size):
                before = self._numbers.setdefault((before, tokens[start : start + block_size]), len(self.uses))
                if before == len(self.uses):
                    self.uses.append([])
                self.uses[before].append(index)
                path.append(before)
            self.paths[command.request_id] = path
            self._order[command.request_id] = index

    def admitted(self, request_id: str) -> None:
        """A call has what it needs."""
        for number in self.paths[request_id]:
            self.uses[number].remove(self._order[request_id])

    def preempted(self, request_id: str) -> None:
        """A call needs everything again."""
        for number in self.paths[request_id]:
            bisect.insort(self.uses[number], self._order[request_id])

    def number(self, node: RadixNode | None) -> int | None:
        """Which block a node is. None: no prompt contains it, it is an answer."""
        if node is None or node.parent is None:
            return 0
        if node.sequence not in self._known:
            before = self.number(node.parent)
            numbers: Mapping[_Content, int] = self._numbers
            self._known[node.sequence] = None if before is None else numbers.get((before, node.key))
        return self._known[node.sequence]
