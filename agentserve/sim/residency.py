"""How full the KV memory of an instance is over time."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agentserve.core.memory.manager import MemoryManager
from agentserve.core.stats import TierStats

_MAX_SAMPLES = 1024


@dataclass(frozen=True, slots=True)
class Residency:
    """Use of the KV blocks of one instance. Means are weighted by time and, like shares, lie between 0 and 1."""

    num_blocks: int
    mean_held: float
    """Share of the blocks that requests held."""
    peak_held: float
    mean_cached: float
    """Share that held a prefix nobody used at the moment."""
    num_evicted_blocks: int
    samples: tuple[tuple[int, ...], ...]
    """(nanoseconds from the start, blocks held, blocks cached, blocks in each lower tier): some of the steps, evenly,
    and the last one."""
    tiers: tuple[TierStats, ...] = ()
    """The tiers below the device at the end, the nearest one first."""

    def to_json(self) -> dict[str, Any]:
        """All but the samples."""
        return {
            "num_blocks": self.num_blocks,
            "mean_held": self.mean_held,
            "peak_held": self.peak_held,
            "mean_cached": self.mean_cached,
            "num_evicted_blocks": self.num_evicted_blocks,
            "tiers": [dataclasses.asdict(tier) for tier in self.tiers],
        }


def occupancy_of(memory: MemoryManager) -> tuple[int, ...]:
    """Blocks held, blocks cached, and blocks used in each lower tier, now."""
    cached = memory.num_cached_blocks
    held = memory.num_blocks - memory.num_free_blocks - cached
    return (held, cached) if memory.residency is None else (held, cached, *memory.residency.num_used_blocks())


class ResidencyMeter:
    """Is told of a memory manager after every step. Keeps exact means and peaks, and at most 1,024 samples."""

    def __init__(self, memory: MemoryManager) -> None:
        self._memory = memory
        self._samples: list[tuple[int, ...]] = []
        self._stride = 1
        """Every so many steps are kept: twice as many whenever the list is full, and half of the list is dropped."""
        self._num_steps = 0
        self._last = (0, 0, memory.num_cached_blocks)
        self._below = occupancy_of(memory)[2:]
        self._held_time = self._cached_time = self._peak = 0

    def sample(self, now_ns: int, occupancy: tuple[int, ...]) -> None:
        """After a step at this time; `occupancy` is what `occupancy_of` said then."""
        self._below = occupancy[2:]
        self._sample_at(now_ns, occupancy[0], occupancy[1])

    def _sample_unchanged(self, times_ns: Sequence[int]) -> None:
        """After steps that left everything as it was."""
        _, held, cached = self._last
        begin = 0
        while (kept := begin + -self._num_steps % self._stride) < len(times_ns):  # thinning makes the stride longer
            self._num_steps += kept - begin
            self._sample_at(times_ns[kept], held, cached)
            begin = kept + 1
        if begin == len(times_ns):
            return
        elapsed_ns = times_ns[-1] - self._last[0]
        self._held_time += elapsed_ns * held
        self._cached_time += elapsed_ns * cached
        self._last = (times_ns[-1], held, cached)
        self._num_steps += len(times_ns) - begin

    def _sample_at(self, now_ns: int, held: int, cached: int) -> None:
        last_ns, last_held, last_cached = self._last
        elapsed_ns = now_ns - last_ns
        self._held_time += elapsed_ns * last_held
        self._cached_time += elapsed_ns * last_cached
        self._peak = max(self._peak, held)
        self._last = (now_ns, held, cached)
        if self._num_steps % self._stride == 0:
            self._samples.append((*self._last, *self._below))
            if len(self._samples) == _MAX_SAMPLES:
                self._samples = self._samples[::2]
                self._stride *= 2
        self._num_steps += 1

    def sample_run(self, times_ns: Sequence[int], changes: Sequence[tuple[int, int, int]]) -> None:
        """After each of some steps. `changes`: (step, free blocks, cached blocks) where these numbers changed."""
        num_blocks, begin = self._memory.num_blocks, 0
        for index, num_free, num_cached in changes:
            self._sample_unchanged(times_ns[begin:index])
            self._sample_at(times_ns[index], num_blocks - num_free - num_cached, num_cached)
            begin = index + 1
        self._sample_unchanged(times_ns[begin:])

    def result(self, end_ns: int) -> Residency:
        """Of the time from the start to `end_ns`."""
        last_ns, held, cached = self._last
        left_ns = end_ns - last_ns
        total = max(1, end_ns) * self._memory.num_blocks
        return Residency(
            num_blocks=self._memory.num_blocks,
            mean_held=(self._held_time + left_ns * held) / total,
            peak_held=self._peak / self._memory.num_blocks,
            mean_cached=(self._cached_time + left_ns * cached) / total,
            num_evicted_blocks=self._memory.num_evicted_blocks,
            samples=(*self._samples, (end_ns, held, cached, *self._below)),
            tiers=() if self._memory.residency is None else self._memory.residency.stats(),
        )
