"""How full the KV memory of an instance is over time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from agentserve.core.memory.manager import MemoryManager

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
    samples: tuple[tuple[int, int, int], ...]
    """(nanoseconds from the start, blocks held, blocks cached): some of the steps, evenly, and the last one."""

    def to_json(self) -> dict[str, Any]:
        """All but the samples."""
        return {
            "num_blocks": self.num_blocks,
            "mean_held": self.mean_held,
            "peak_held": self.peak_held,
            "mean_cached": self.mean_cached,
            "num_evicted_blocks": self.num_evicted_blocks,
        }


class ResidencyMeter:
    """Looks at a memory manager after every step. Keeps exact means and peaks, and at most 1,024 samples."""

    def __init__(self, memory: MemoryManager) -> None:
        self._memory = memory
        self._samples: list[tuple[int, int, int]] = []
        self._stride = 1
        """Every so many steps are kept: twice as many whenever the list is full, and half of the list is dropped."""
        self._num_steps = 0
        self._last = (0, 0, memory.num_cached_blocks)
        self._held_time = self._cached_time = self._peak = 0

    def sample(self, now_ns: int) -> None:
        """After a step at this time."""
        memory = self._memory
        cached = memory.num_cached_blocks
        held = memory.num_blocks - memory.num_free_blocks - cached
        last_ns, last_held, last_cached = self._last
        elapsed_ns = now_ns - last_ns
        self._held_time += elapsed_ns * last_held
        self._cached_time += elapsed_ns * last_cached
        self._peak = max(self._peak, held)
        self._last = (now_ns, held, cached)
        if self._num_steps % self._stride == 0:
            self._samples.append(self._last)
            if len(self._samples) == _MAX_SAMPLES:
                self._samples = self._samples[::2]
                self._stride *= 2
        self._num_steps += 1

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
            samples=(*self._samples, (end_ns, held, cached)),
        )
