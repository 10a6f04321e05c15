"""What policies act on besides the memory: the scheduler, as the agent runtime sees it."""

from __future__ import annotations

from typing import Protocol

from agentserve.core.memory.eviction import Key
from agentserve.core.request import Request


class IdleLanes(Protocol):
    """Where pieces run."""

    @property
    def may_speculate(self) -> bool:
        """Whether no prompt waits or is read, and no other piece is under way."""
        ...

    @property
    def num_seqs(self) -> int:
        """Requests that may need a block soon."""
        ...

    def speculate(self, request: Request) -> bool:
        """Starts a piece; False if there is something in its way."""
        ...


class Queues(IdleLanes, Protocol):
    """What policies act on."""

    def reprioritize(self, request: Request, key: Key) -> bool:
        """Gives a request that waits another place; whether it has passed another one by that."""
        ...

    def forget_order(self) -> None:
        """All requests go in the order of their arrival again."""
        ...

    def num_claimed_blocks(self) -> int:
        """Blocks that requests may need which have come: all of those that wait, one more of each that runs."""
        ...
