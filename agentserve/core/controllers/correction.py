"""What was measured, against what was predicted."""

from __future__ import annotations

from typing import TypeAlias

Mode: TypeAlias = tuple[str, str, bool]
"""Lane, kind of partition, and whether prompts and decodes are mixed in the batch."""

_WEIGHT = 0.18
"""Of the newest error, half of it for what modes have in common: a moving average over about six measurements."""
_TRANSFER = 0.05
"""Share of a mode's factor that becomes common with each measurement of it, if no other mode contradicts."""
_FADE = 0.002
"""Share of a mode's factor that is forgotten with each measurement of another one, and of what two lanes do to each
other with each of a lane alone: what looked bad once is tried again some day."""
_LEAST, _MOST = 0.5, 2.0
"""A single error counts at most this much: a batch may have been interrupted by anything."""
_DEVIATION_WEIGHT, _COMMON_WEIGHT = 0.15, 0.03
_PRIOR_COUNT = 20
"""A mode's own deviation weighs as much as that of all modes together once it was seen so often. With few measurements
the mode that was tried would look worse than those that were not, for one slow batch."""
_CAUTION = 2.0
"""Mean absolute deviations above the mean: about the 95th percentile of a normal distribution."""
_WHOLE = "whole"


class Corrections:
    """Measured / predicted as a product of what modes have in common and what is particular to one.

    In common are the speed of the machine, which lanes that run alone tell, and what two lanes do to each other in any
    partition. Only what a mode differs by may decide between modes, so the common factors follow every measurement,
    also for modes never seen: else the partition that was tried while the machine was slow would look worse than the
    others. All are geometric moving averages.
    """

    def __init__(self) -> None:
        self._speed = 1.0
        self._beside = 1.0
        self._modes: dict[Mode, float] = {}
        self._deviations: dict[Mode, float] = {}
        self._counts: dict[Mode, int] = {}
        self._common_deviation = 0.0
        self._is_exact = True
        """Whether all that was measured was as predicted. Then one more of that kind changes nothing."""
        self.gap_ns = 0.0
        """Mean time between the end of a decode batch and the start of the next one: part of the time per token."""

    def observe(self, mode: Mode, ratio: float) -> None:
        """Takes a measurement; `ratio` is measured / predicted without corrections."""
        if self._is_exact and ratio == 1.0:
            self._observe_exact(mode, 1)
            return
        self._is_exact = False
        error = min(max(ratio / self.factor(mode), _LEAST), _MOST)
        for other, factor in self._modes.items():
            self._modes[other] = factor + _FADE * (1.0 - factor)
        particular = self._modes.get(mode, 1.0) * error ** (_WEIGHT / 2)
        is_speed = mode[1] == _WHOLE
        # As long as no other mode was seen, all of it is the speed of the machine. What was left to this mode would be
        # forgotten while others run, and ways that had not been tried would look better than they are.
        transfer = 1.0 if is_speed and self._modes.keys() <= {mode} else _TRANSFER
        common = error ** (_WEIGHT / 2) * particular**transfer
        self._modes[mode] = particular ** (1.0 - transfer)
        if is_speed:
            self._speed *= common
            self._beside += _FADE * (1.0 - self._beside)
        else:
            self._beside *= common
        distance = abs(error - 1.0)
        own = self._deviations.get(mode, self._common_deviation)
        self._deviations[mode] = own + _DEVIATION_WEIGHT * (distance - own)
        self._common_deviation += _COMMON_WEIGHT * (distance - self._common_deviation)
        self._counts[mode] = self._counts.get(mode, 0) + 1

    def observe_all(self, mode: Mode, measured_ns: list[int], predicted_ns: list[int]) -> None:
        """Takes the measurements of several batches of a mode, one after the other."""
        if self._is_exact and measured_ns == predicted_ns:
            self._observe_exact(mode, len(measured_ns))
            return
        for measured, predicted in zip(measured_ns, predicted_ns, strict=True):
            self.observe(mode, measured / max(1, predicted))

    def _observe_exact(self, mode: Mode, count: int) -> None:
        """Takes measurements that were as predicted, as all have been: every factor is 1, and stays so."""
        self._modes[mode] = 1.0
        self._deviations[mode] = 0.0
        self._counts[mode] = self._counts.get(mode, 0) + count

    def observe_gap(self, gap_ns: int) -> None:
        """Takes the time between two batches; at least 0."""
        self.gap_ns += _DEVIATION_WEIGHT * (max(0, gap_ns) - self.gap_ns)

    def observe_no_gaps(self, count: int) -> None:
        """Takes so many gaps of no time."""
        gap_ns = self.gap_ns
        for _ in range(count if gap_ns else 0):
            gap_ns += _DEVIATION_WEIGHT * (0 - gap_ns)
        self.gap_ns = gap_ns

    def factor(self, mode: Mode) -> float:
        """What a prediction for this mode is multiplied with."""
        common = self._speed if mode[1] == _WHOLE else self._speed * self._beside
        return common * self._modes.get(mode, 1.0)

    def high_factor(self, mode: Mode) -> float:
        """The same for a batch that is slower than most: a target is kept only if these keep it, too.

        Mean and multiples of the mean absolute deviation, as in the retransmission timer of TCP (Jacobson, 1988).
        """
        count = self._counts.get(mode, 0)
        own = self._deviations.get(mode, 0.0)
        deviation = (count * own + _PRIOR_COUNT * self._common_deviation) / (count + _PRIOR_COUNT)
        return self.factor(mode) * (1.0 + _CAUTION * deviation)
