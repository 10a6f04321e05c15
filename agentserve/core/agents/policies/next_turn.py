"""Speculation about the next prompt while a tool runs: how much of what is missing is computed, in which pieces."""

from __future__ import annotations

from typing import ClassVar

from agentserve.core.agents.costs import ForwardCosts
from agentserve.core.agents.policy import Policy
from agentserve.core.agents.registry import Session

PIECE_NS = 30_000_000
"""A prompt that comes meanwhile waits for one piece at most, and a piece takes about this long."""
MAX_PIECE = 512
UNKNOWN_PIECE = 64
"""Tokens in a piece when nobody knows how fast the device is."""
WORTH_A_PASS = 64
"""Fewer missing tokens than this cost the next call next to nothing: it has a prompt to read anyway."""


class NextTurn(Policy):
    """All that is missing, down to a single block."""

    name: ClassVar[str] = "next_turn"
    min_tokens: ClassVar[int] = 1

    def __init__(self, costs: ForwardCosts | None) -> None:
        self._piece = UNKNOWN_PIECE if costs is None else max(1, min(MAX_PIECE, int(PIECE_NS / costs.token_ns)))

    def speculates(self, session: Session, start: int, num_missing: int, now_ns: int) -> int:  # noqa: ARG002
        """See `Policy.speculates`."""
        return self._piece if num_missing >= self.min_tokens else 0


class LostContext(NextTurn):
    """Only what the next call would feel: context that was evicted, or that is written anew.

    The end of a turn is a block at most, and every call computes it beside the result of its tool for nothing.
    """

    name: ClassVar[str] = "lost_context"
    min_tokens: ClassVar[int] = WORTH_A_PASS
