"""Which hooks the policies in the seats have: those of the base class do nothing, so they are not called."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from agentserve.core.agents.policy import Action, Policy, TurnEvent
from agentserve.core.agents.registry import Session
from agentserve.core.events import SetDistances

Hooks: TypeAlias = tuple[tuple[Policy, Callable[..., Any]], ...]


class SeatedHooks:
    """By hook the policies that override it, in the order of their seats; each once, however many seats it has."""

    __slots__ = ("act", "falls_behind", "next_deadline_ns", "observe", "policies", "set_distances", "tool_called")

    def __init__(self, seats: Iterable[Policy | None]) -> None:
        """`seats`: who sits there; None: nobody."""
        self.policies = tuple(dict.fromkeys(policy for policy in seats if policy is not None))
        self.observe: tuple[tuple[Policy, Callable[[TurnEvent], None]], ...] = self._of("observe")
        self.tool_called: tuple[tuple[Policy, Callable[[Session, int], None]], ...] = self._of("tool_called")
        self.set_distances: tuple[tuple[Policy, Callable[[SetDistances, int], None]], ...] = self._of("set_distances")
        self.act: tuple[tuple[Policy, Callable[[int], Iterable[Action]]], ...] = self._of("act")
        self.next_deadline_ns: tuple[tuple[Policy, Callable[[], int | None]], ...] = self._of("next_deadline_ns")

        self.falls_behind = tuple(policy for policy in self.policies if type(policy).is_behind is not Policy.is_behind)
        """Those of which `is_behind` may be true."""

    def _of(self, name: str) -> Hooks:
        found = ((policy, getattr(policy, name)) for policy in self.policies)
        inherited = getattr(Policy, name)
        return tuple((policy, hook) for policy, hook in found if getattr(hook, "__func__", None) is not inherited)
