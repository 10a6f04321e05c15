"""Bounds: policies that know the future. Only the simulator can tell it, so only the simulator can run them."""

# ruff: noqa: ARG002  # a hook gets what any policy may need

from __future__ import annotations

import math
from typing import ClassVar

from agentserve.core.agents.costs import ForwardCosts
from agentserve.core.agents.policy import Forecast, Policy
from agentserve.core.agents.registry import Session
from agentserve.core.memory.eviction import Key
from agentserve.core.request import Request


class Belady(Policy):
    """Keeps what is needed next: the session whose next call is farthest away goes first (Belady 1966).

    A bound in practice, not in theory: sessions have different sizes, and what is evicted changes when calls come.
    """

    name: ClassVar[str] = "belady"

    def score(self, session: Session, now_ns: int) -> Key:
        forecast = self.predict(session, now_ns)
        return (0,) if forecast is None else (-forecast.next_use_ns,)

    def predict(self, session: Session, now_ns: int) -> Forecast | None:
        if session.idle_since_ns is None or session.foresight is None:
            return None  # its call waits or runs: nothing is needed sooner
        future = session.foresight
        if future.gap_ns is None:
            return Forecast(math.inf)
        return Forecast(max(session.idle_since_ns + future.gap_ns, future.next_not_before_ns))


class ShortestRemainingProgram(Policy):
    """The program goes first that needs the device least until its end (shortest remaining processing time)."""

    name: ClassVar[str] = "srpt"

    def __init__(self, costs: ForwardCosts) -> None:
        self._costs = costs

    def order_key(self, session: Session, request: Request, now_ns: int) -> Key:
        left = session.foresight
        if left is None:
            return (math.inf,)
        return (left.num_prompt_tokens * self._costs.token_ns + left.num_output_tokens * self._costs.base_ns,)
