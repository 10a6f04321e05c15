"""What was measured, against what was predicted."""

from __future__ import annotations

from typing import TypeAlias

Mode: TypeAlias = tuple[str, str, bool]
"""Lane, kind of partition, and whether prompts and decodes are mixed in the batch."""

_WEIGHT = 0.15
"""Of the newest measurement in a moving average."""
_FADE = 0.001
"""Share of a correction that is forgotten with each measurement of another mode: what looked bad once, in another state
of the machine, is tried again some day."""
_LEAST, _MOST = 0.25, 4.0
"""A single measurement counts at most this much: a batch may have been interrupted by anything."""
_CAUTION = 2.0
"""Mean absolute deviations above the mean: about the 95th percentile of a normal distribution."""
_WHOLE = "whole"


class Corrections:
    """Moving averages of measured / predicted, one for each mode.

    A mode that was never seen takes the mean of those in which a lane had the device to itself: a machine that is
    slower today is so in every mode. What two lanes do to each other is known by kind of partition.
    """

    def __init__(self) -> None:
        self._factors: dict[Mode, float] = {}
        self._deviations: dict[Mode, float] = {}
        self._alone = 1.0
        self.gap_ns = 0.0
        """Mean time between the end of a decode batch and the start of the next one: part of the time per token."""

    def observe(self, mode: Mode, ratio: float) -> None:
        """Takes a measurement; `ratio` is measured / predicted."""
        known, ratio = self.factor(mode), min(max(ratio, _LEAST), _MOST)
        deviation = self._deviations.get(mode, 0.0)
        self._deviations[mode] = deviation + _WEIGHT * (abs(ratio - known) - deviation)
        self._factors[mode] = known + _WEIGHT * (ratio - known)
        if mode[1] == _WHOLE:
            alone = [factor for (_, kind, _), factor in self._factors.items() if kind == _WHOLE]
            self._alone = sum(alone) / len(alone)
        for other, factor in self._factors.items():
            if other != mode:
                self._factors[other] = factor + _FADE * (self._alone - factor)

    def observe_gap(self, gap_ns: int) -> None:
        """Takes the time between two batches; at least 0."""
        self.gap_ns += _WEIGHT * (max(0, gap_ns) - self.gap_ns)

    def factor(self, mode: Mode) -> float:
        """What a prediction for this mode is multiplied with."""
        return self._factors.get(mode, self._alone)

    def high_factor(self, mode: Mode) -> float:
        """The same for a batch that is slower than most: a target is kept only if these keep it, too.

        Mean and multiples of the mean absolute deviation, as in the retransmission timer of TCP (Jacobson, 1988).
        """
        return self.factor(mode) + _CAUTION * self._deviations.get(mode, 0.0)
