"""Ways to share the device, and which of them is better."""

from __future__ import annotations

from agentserve.core.controllers import Decision
from agentserve.core.records import record


_ROUNDING = 1.0 + 1e-9
"""Limits are compared with this allowance, since they are computed in another order than what they limit."""


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
        self.weighs_delay = objective == "power" and needed_rate is None
        """Whether throughput over delay is all that counts."""

    def __call__(self, option: Option) -> tuple[float, float]:
        if self.weighs_delay:
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
        if not self.weighs_delay:
            return self.missed(option) > self(best)[0]
        missed = self.missed(option)
        return most_tokens * 1e9 / (option.tpot_ns * missed) ** 2 * _ROUNDING < self.gain(best)

    def is_beaten(self, least_tpot_ns: float, most_rate: float, best: Option, hysteresis: float) -> bool:
        """Whether no option with at least this time and at most this rate is chosen where `best` is one, too.

        Not even as one that has hardly less merit: see `hysteresis` in the controller.
        """
        missed = max(least_tpot_ns / self._target_ns, 1.0)
        if self.weighs_delay:
            gain = most_rate / (least_tpot_ns * missed * missed)
            return gain * (1.0 + hysteresis) * _ROUNDING < self.gain(best)
        if self._needed_rate is not None:
            missed = max(missed, self._needed_rate / most_rate)
        best_missed = self(best)[0]
        if missed > best_missed * (1.0 + hysteresis / 2) * _ROUNDING:
            return True
        # Among those that meet the target the rate decides, if none is asked for.
        meets = self._needed_rate is None and best_missed <= 1.0
        return meets and most_rate * (1.0 + hysteresis) * _ROUNDING < best.prefill_rate

    def gain(self, option: Option) -> float:
        """What another option must promise more of."""
        if not self.weighs_delay:
            return option.prefill_rate
        missed = self.missed(option)
        return option.prefill_rate / (option.tpot_ns * missed * missed)
