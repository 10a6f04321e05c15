"""Who holds which blocks."""

from __future__ import annotations

import sys

from agentserve.core.memory.eviction import SessionBlocks
from agentserve.core.memory.radix import RadixNode
from agentserve.core.memory.trails import Trail

NEVER = sys.maxsize
"""Of `Holding.publish_at` if nothing is cached."""


class Holding:
    """The blocks of one request.

        block_ids  b0 b1 b2 b3 b4      one for every block of tokens, computed or not
        path       n0 n1 n2            the nodes it holds, from the root down

    Block *i* is private unless `path[i]` exists and says the same block id. (It says another one if someone else
    published the same tokens first.) Nodes before `num_ready_blocks` are ready.

    `capacity` and `publish_at` follow from the rest. They are kept because most tokens neither need a block nor fill
    one, and then a comparison tells.
    """

    __slots__ = (
        "block_ids",
        "block_ids_tuple",
        "capacity",
        "num_computed_tokens",
        "num_ready_blocks",
        "path",
        "publish_at",
        "salt",
        "session",
        "trail",
    )

    def __init__(
        self,
        salt: str | None,
        path: list[RadixNode],
        num_cached_tokens: int,
        session: SessionBlocks | None = None,
        trail: Trail | None = None,
    ) -> None:
        self.salt = salt
        self.session = session
        """To whom the blocks belong when the request has ended, if that is known."""
        self.path = path
        self.trail = trail
        """The beginning of `path`, if a prompt before this one had it."""
        known = () if trail is None else trail.block_ids
        self.block_ids = [*known, *[node.block_id for node in path[len(known) :]]]
        self.block_ids_tuple: tuple[int, ...] | None = None
        self.num_ready_blocks = len(path)
        self.num_computed_tokens = num_cached_tokens
        self.capacity = num_cached_tokens
        """Tokens that there are blocks for."""
        self.publish_at = NEVER
        """Computed tokens at which a block is full that is not ready yet."""

    @property
    def last_node(self) -> RadixNode | None:
        return self.path[-1] if self.path else None

    def private_block_ids(self) -> list[int]:
        """Blocks that are not in the tree, in the order of the tokens."""
        path, block_ids = self.path, self.block_ids
        # What was there at the admission is in the tree.
        first = 0 if self.trail is None else len(self.trail.path)
        found = [own for own, node in zip(block_ids[first:], path[first:], strict=False) if own != node.block_id]
        return found + block_ids[len(path) :]

    def is_private(self, index: int) -> bool:
        return index >= len(self.path) or self.path[index].block_id != self.block_ids[index]


class Holdings(dict[str, Holding]):
    """By request id. Raises ValueError for a request without one."""

    def __missing__(self, request_id: str) -> Holding:
        raise ValueError(f"request {request_id!r} holds no blocks")
