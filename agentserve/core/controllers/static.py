"""The controller that never changes its mind."""

from __future__ import annotations

from agentserve.core.controllers import ControlSignal, Decision


class StaticController:
    """Always returns the same decision; for experiments and as the baseline of the adaptive ones."""

    def __init__(self, decision: Decision) -> None:
        self._decision = decision

    def decide(self, signal: ControlSignal) -> Decision:  # noqa: ARG002 - the point of this controller
        return self._decision
