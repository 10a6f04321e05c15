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
    """Prompt tokens per second, one prompt after the other."""


def rate_in_turn(first: float, second: float) -> float:
    """Prompt tokens per second at which two equal prompts, read one after the other, would end as early in the mean as
    they do when both are read at once, at these rates.

    Read at once, with shares s and 1 - s of a rate, they end after 1 / s and 2 times what one of them takes at the
    whole rate; one after the other after 1 and 2. The sum of both rates alone would call that the same.
    """
    total = first + second
    return 3.0 * total / (2.0 + total / max(first, second))


class Merit:
    """How good options are; smaller is better.

    By how much a target is missed, then what matters among those that meet it. A target that nobody named is no wall:
    a way that misses it by a little must not lose against one that reads half as fast. There, what counts is the time
    that all agents together lose for a prompt token (see `gain_of`), and delay beyond the target squared on top.
    """

    def __init__(
        self,
        target_ns: float,
        objective: str,
        *,
        needed_rate: float | None,
        alone_ns: float,
        num_decodes: int,
        num_prompts: int,
    ) -> None:
        """What is to be weighed.

        Args:
            target_ns: time between two tokens.
            objective: one of `agentserve.config.OBJECTIVES`.
            needed_rate: prompt tokens per second; None if nothing is asked of it.
            alone_ns: time between two tokens without any prompt.
            num_decodes: streams that every prompt token delays.
            num_prompts: who waits for a first token.
        """
        self._target_ns = target_ns
        self._needed_rate = needed_rate
        self.weighs_delay = objective == "delay" and needed_rate is None
        """Whether the delay of all agents is all that counts."""
        # Prompts of one length, read one after the other, wait for this many of them in the mean.
        self._num_waiting = (max(num_prompts, 1) + 1) / 2.0
        self._num_decodes = num_decodes
        self._alone_ns = alone_ns

    def __call__(self, option: Option) -> tuple[float, float]:
        return self.of(option.tpot_ns, option.prefill_rate)

    def of(self, tpot_ns: float, prefill_rate: float) -> tuple[float, float]:
        """The same of an option with these numbers."""
        if self.weighs_delay:
            return (1.0, -self.gain_of(tpot_ns, prefill_rate))
        missed = max(tpot_ns / self._target_ns, 1.0)
        if self._needed_rate is None:
            return (missed, -prefill_rate)
        # In time is early enough: then the smoother stream is the better one.
        return (max(missed, self._needed_rate / prefill_rate), tpot_ns)

    def is_hopeless(self, option: Option, most_tokens: int, best: Option, hysteresis: float) -> bool:
        """Whether no batch that takes as long as this one or longer can be chosen, if it reads at most so many tokens.

        A batch like `best` is an option too; what reads more and misses a target by hardly more may be chosen.
        """
        missed = max(option.tpot_ns / self._target_ns, 1.0)
        if not self.weighs_delay:
            return missed > self(best)[0] * (1.0 + hysteresis / 2) * _ROUNDING
        return self.gain_of(option.tpot_ns, most_tokens * 1e9 / option.tpot_ns) * _ROUNDING < self.gain(best)

    def is_beaten(self, least_tpot_ns: float, most_rate: float, best: Option, hysteresis: float) -> bool:
        """Whether no option with at least this time and at most this rate is chosen where `best` is one, too.

        Not even as one that has hardly less merit: see `hysteresis` in the controller.
        """
        if self.weighs_delay:
            return self.gain_of(least_tpot_ns, most_rate) * (1.0 + hysteresis) * _ROUNDING < self.gain(best)
        missed = max(least_tpot_ns / self._target_ns, 1.0)
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
        return self.gain_of(option.tpot_ns, option.prefill_rate)

    def gain_of(self, tpot_ns: float, prefill_rate: float) -> float:
        """The same of an option with these numbers.

        While a prompt token is read, for 1 / rate, everybody who waits for a first token waits, and every stream loses
        the part of that time in which it would have made more tokens alone: 1 - alone / tpot. The sum over all agents
        is what reading adds to the time in which they get everything done, so its inverse is what there must be most
        of.
        """
        if not self.weighs_delay:
            return prefill_rate
        lost = self._num_waiting + self._num_decodes * max(0.0, 1.0 - self._alone_ns / tpot_ns)
        missed = max(tpot_ns / self._target_ns, 1.0)
        return prefill_rate / (lost * missed * missed)
