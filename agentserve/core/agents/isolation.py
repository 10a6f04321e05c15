"""What a policy that raises can do to others: nothing. Its answer is the built-in one, and it is out at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from agentserve.core.agents.policy import Action, Policy
from agentserve.core.memory.eviction import Key, lru_key
from agentserve.core.memory.radix import RadixNode

_T = TypeVar("_T")


class Isolation:
    """Asks policies, and notes those that have raised."""

    def __init__(self, name_of: Callable[[Policy], str], counts: Counter[str]) -> None:
        self._name_of = name_of
        self._counts = counts
        self.failures: dict[str, str] = {}
        """What policies have raised, by name."""
        self.failed: dict[str, Policy] = {}
        """By name; to be taken out of their seats at the end of the step."""

    def ask(self, policy: Policy, default: _T, question: Callable[..., _T], *arguments: object) -> _T:
        """What a policy answers, or `default` if it raises."""
        try:
            return question(*arguments)
        except Exception as error:  # noqa: BLE001  # whatever it is: it is not the engine's
            return self.raised(policy, error, default)

    def actions(self, policy: Policy, act: Callable[[int], Iterable[Action]], now_ns: int) -> Sequence[Action]:
        """What a policy wants done; a generator runs to its end here, where it may raise."""
        try:
            return tuple(act(now_ns))
        except Exception as error:  # noqa: BLE001  # as above
            return self.raised(policy, error, ())

    def block_key(self, policy: Policy) -> Callable[[RadixNode], Key]:
        """What a policy says of single blocks."""
        score = policy.score_block

        def key(node: RadixNode) -> Key:
            try:
                return score(node)
            except Exception as error:  # noqa: BLE001  # as above
                return self.raised(policy, error, lru_key(node))

        return key if type(policy).score_block is not Policy.score_block else lru_key

    def raised(self, policy: Policy, error: Exception, default: _T) -> _T:
        """Notes what a policy has raised; `default` is its answer."""
        self._counts["failures"] += 1
        name = self._name_of(policy)
        if name not in self.failures:
            self.failures[name] = f"{type(error).__name__}: {error}"
            self.failed[name] = policy
        return default
