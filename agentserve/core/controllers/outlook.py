"""What is predicted while one plan is made, each number once.

Ways to share the device have much in common: all caps leave the decode lane every unit, and what was measured counts
for a kind of partition. What depends on the partition alone is kept with it for good.
"""

from __future__ import annotations

import math

from agentserve.core.batch import Lane
from agentserve.core.controllers import ControlSignal
from agentserve.core.controllers.correction import Corrections
from agentserve.core.costmodel import CostModel, prompt_shape
from agentserve.core.slots import PartitionKind, SlotPartition

# Looking up a member of an enumeration costs as much as a call.
_PREFILL, _DECODE = Lane.PREFILL, Lane.DECODE
CHUNK_LEVEL = 1.15
"""The chunk is chosen anew when the prefill lane turns out to be so much slower or faster than predicted."""


class Way:
    """A partition, and what of its predictions does not change."""

    __slots__ = (
        "chunks",
        "decode_contention",
        "decode_units",
        "kind",
        "partition",
        "prefill_contention",
        "prefill_units",
        "rates",
    )

    def __init__(self, cost: CostModel, partition: SlotPartition, *, co_running: bool = True) -> None:
        self.partition = partition
        self.kind = partition.kind
        self.decode_units = partition.decode_units
        self.prefill_units = partition.prefill_units
        self.decode_contention = cost.contention(_DECODE, partition) if co_running else 1.0
        self.prefill_contention = cost.contention(_PREFILL, partition) if co_running else 1.0
        self.chunks: dict[int, int] = {}
        """Of the prefill lane, by `Outlook.prefill_level`."""
        self.rates: dict[int, float] = {}
        """Tokens per second of the prefill lane at the start of a prompt, by chunk, before corrections."""


class Outlook:
    """Predictions for one signal, as measured times suggest them until now."""

    __slots__ = (
        "_corrections",
        "_cost",
        "_high_factors",
        "_lane_works",
        "_prefill_factors",
        "_prefill_levels",
        "_works",
        "alone_ns",
        "num_pending",
        "signal",
        "wait_ns",
        "whole",
    )

    def __init__(self, cost: CostModel, corrections: Corrections, signal: ControlSignal, whole: Way) -> None:
        self._cost = cost
        self._corrections = corrections
        self.signal = signal
        self.whole = whole
        self._works: dict[tuple[int, int], float] = {}
        self._lane_works: dict[tuple[int, int, int], float] = {}
        self._high_factors: dict[tuple[PartitionKind, bool], float] = {}
        self._prefill_factors: dict[PartitionKind, float] = {}
        self._prefill_levels: dict[PartitionKind, int] = {}
        self.num_pending = signal.num_prefill_tokens + signal.num_resume_tokens
        """Prompt tokens that wait for any lane."""
        self.alone_ns = self.decode_ns(whole, 0)
        """Time between two tokens without any prompt."""
        self.wait_ns = self._wait_ns()
        """How long prompts that ride with the decodes wait for what runs there now; None if that lane is idle."""

    def decode_ns(self, way: Way, num_riding: int) -> float:
        """Time between two tokens, as most batches will keep it, with so many prompt tokens in each decode batch."""
        key = (way.decode_units, num_riding)
        work_ns = self._works.get(key)
        if work_ns is None:
            decodes = self.signal.decodes
            shape = decodes.with_prefill(num_riding, self.signal.riding_start) if num_riding else decodes
            work_ns = self._works[key] = self._cost.work_ns(shape, way.decode_units)
        return self._token_ns(work_ns, way, num_riding > 0)

    def turn_ns(self, num_tokens: int) -> float:
        """The same with everything in one lane, on the whole device."""
        signal, whole = self.signal, self.whole
        shape = signal.decodes.with_prefill(num_tokens, signal.prefill_start or signal.riding_start)
        return self._token_ns(self._cost.work_ns(shape, whole.decode_units), whole, signal.decodes.num_decodes > 0)

    def prefill_factor(self, kind: PartitionKind) -> float:
        """Measured / predicted in the prefill lane."""
        factor = self._prefill_factors.get(kind)
        if factor is None:
            factor = self._prefill_factors[kind] = self._corrections.factor((_PREFILL, kind, False))
        return factor

    def prefill_level(self, kind: PartitionKind) -> int:
        """The same in steps of `CHUNK_LEVEL`; 0 is as predicted."""
        level = self._prefill_levels.get(kind)
        if level is None:
            level = self._prefill_levels[kind] = round(math.log(self.prefill_factor(kind), CHUNK_LEVEL))
        return level

    def lane_rate(self, way: Way, num_tokens: int) -> float:
        """Prompt tokens per second of the prefill lane beside a busy decode lane."""
        signal = self.signal
        start = signal.prefill_start if signal.num_prefill_tokens else signal.riding_start
        return num_tokens * 1e9 / (self._lane_ns(way, num_tokens, start) * self.prefill_factor(way.kind))

    def most_lane_rate(self, way: Way, chunk: int) -> float:
        """The same with a whole chunk at most: where it starts, a prompt is read fastest."""
        rate = way.rates.get(chunk)
        if rate is None:
            rate = way.rates[chunk] = chunk * 1e9 / self._lane_ns(way, chunk, 0)
        return rate / self.prefill_factor(way.kind)

    def delayed(self, rate: float, num_tokens: int) -> float:
        """The rate of `num_tokens` that ride, if they go at `rate` once what runs there now is done."""
        wait_ns = self.wait_ns
        return num_tokens * 1e9 / (wait_ns + num_tokens * 1e9 / rate) if num_tokens and wait_ns is not None else rate

    def _lane_ns(self, way: Way, num_tokens: int, start: int) -> int:
        key = (way.prefill_units, num_tokens, start)
        work_ns = self._lane_works.get(key)
        if work_ns is None:
            work_ns = self._lane_works[key] = self._cost.work_ns(prompt_shape(num_tokens, start), way.prefill_units)
        return self._cost.stretched_ns(work_ns, way.prefill_contention)

    def _token_ns(self, work_ns: float, way: Way, mixed: bool) -> float:
        factor = self._high_factors.get((way.kind, mixed))
        if factor is None:
            factor = self._corrections.high_factor((_DECODE, way.kind, mixed))
            self._high_factors[way.kind, mixed] = factor
        return self._cost.stretched_ns(work_ns, way.decode_contention) * factor + self._corrections.gap_ns

    def _wait_ns(self) -> float | None:
        signal = self.signal
        if signal.decode_running_ns is None:
            return None
        return max(0.0, self.alone_ns - signal.decode_running_ns) + (self.alone_ns if signal.decode_is_ahead else 0.0)
