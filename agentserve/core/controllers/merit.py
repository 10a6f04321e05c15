"""Ways to share the device, and which of them is better."""

from __future__ import annotations

from agentserve.core.controllers import Decision
from agentserve.core.records import record


@record
class Option:
    """A way to share the device, and what is predicted of it."""

    decision: Decision
    tpot_ns: float
    prefill_rate: float
    """Prompt tokens per second."""


class Merit:
    """How good options are; smaller is better.

    By how much a target is missed, then what matters among those that meet it. `needed_rate` is in prompt tokens per
    second; None if nothing is asked of it. A target that nobody named is no wall: a way that misses it by a little must
    not lose against one that reads half as fast. There, delay beyond the target counts threefold in the exponent.
    """

    def __init__(self, target_ns: float, needed_rate: float | None, objective: str) -> None:
        self._target_ns = target_ns
        self._needed_rate = needed_rate
        self._weighs_delay = objective == "power" and needed_rate is None

    def __call__(self, option: Option) -> tuple[float, float]:
        if self._weighs_delay:
            return (1.0, -self.gain(option))
        missed = self.missed(option)
        if self._needed_rate is None:
            return (missed, -option.prefill_rate)
        # In time is early enough: then the smoother stream is the better one.
        return (max(missed, self._needed_rate / option.prefill_rate), option.tpot_ns)

    def missed(self, option: Option) -> float:
        """The time between two tokens in targets, at least 1."""
        return max(option.tpot_ns / self._target_ns, 1.0)

    def is_hopeless(self, option: Option, most_tokens: int, best: Option) -> bool:
        """Whether no batch that takes as long as this one or longer is better, if it reads at most so many tokens."""
        if not self._weighs_delay:
            return self.missed(option) > self(best)[0]
        missed = self.missed(option)
        return most_tokens * 1e9 / (option.tpot_ns * missed) ** 2 < self.gain(best)

    def gain(self, option: Option) -> float:
        """What another option must promise more of."""
        if not self._weighs_delay:
            return option.prefill_rate
        missed = self.missed(option)
        return option.prefill_rate / (option.tpot_ns * missed * missed)
