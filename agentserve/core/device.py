"""What a device can do: the parameters of the cost model that do not depend on the model that is served."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, fields

from agentserve.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Contention:
    """Factors on a batch's time while the other lane is busy all the time; 1 is no effect.

    `split` is for disjoint units, which still share bandwidth and caches; `shared` is for two lanes on all units. `cap`
    is for capped partitions: of the decode lane when it meets the other one on half of its units (nan: half-way between
    its other two), and of the prefill lane, which is never alone on any of its units (nan: as if shared).
    """

    decode_split: float
    prefill_split: float
    decode_shared: float
    prefill_shared: float
    decode_cap: float = math.nan
    prefill_cap: float = math.nan

    def __post_init__(self) -> None:
        if math.isnan(self.decode_cap):
            object.__setattr__(self, "decode_cap", (self.decode_split + self.decode_shared) / 2)
        if math.isnan(self.prefill_cap):
            object.__setattr__(self, "prefill_cap", self.prefill_shared)
        for field in fields(self):
            value = getattr(self, field.name)
            if not (math.isfinite(value) and value >= 1.0):
                raise ConfigError(f"contention.{field.name} must be at least 1, not {value}")

    @classmethod
    def uniform(cls, factor: float) -> Contention:
        """The same factor for everything."""
        return cls(factor, factor, factor, factor, factor, factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProfile:
    """Rates, efficiencies and overheads of a device. `profiles/fit.py` fits them, `core/costmodel.py` uses them."""

    name: str
    description: str
    compute_units: int
    unit_granularity: int
    min_units: int
    memory_bytes: int

    bandwidth_bytes_per_s: float
    """At which the weights are read by all units."""
    flops_per_s: float
    """Dense matrix rate of all units for many tokens, in the data type that is served."""
    rows: tuple[tuple[float, float], ...]
    """Knots `(tokens, rows)`: a matrix product over so many tokens costs as much as so many full rows. GPUs compute
    whole tiles, so 130 tokens cost about 256 rows. Linear between knots, constant before the first, and proportional
    after the last."""
    streaming_slowdown: float
    """By how much reading the weights slows down with each token of the batch, as a fraction."""
    bandwidth_saturation: float
    """Share of memory time that does not shrink with more units: 0 is proportional, 1 is saturated by one unit."""
    rate_saturation: float
    """The same for arithmetic."""

    kv_bandwidth_bytes_per_s: float
    """At which all units read keys and values in decode attention."""
    attention_flops_per_s: float
    """Rate of all units in prefill attention."""
    attention_tile_rows: int
    """Query rows of one head that one unit handles at a time."""
    attention_tile_keys: float
    """What starting a tile costs, counted in keys."""
    attention_tail: float
    """Share of the longest tile for which the last wave of tiles outlasts an even distribution."""
    fused_attention: bool
    """Whether one kernel handles prefill and decodes of a mixed batch: then each decode occupies a whole tile in each
    head, which is what makes mixed batches dear. Otherwise they follow each other and cost their sum."""
    cache_bytes: int
    """Last-level cache: heads that share keys read them once from memory as long as these fit."""
    cache_misalignment: float
    """Reads added to fused decodes that overflow the cache because heads of a group fall into two waves, 0 to 1."""

    overhead_ns: int
    """Per batch, independent of its size."""
    layer_overhead_ns: float
    """Per layer: norms, activations, launches."""
    sequence_overhead_ns: float
    """Per layer and decode in decode attention."""
    sample_overhead_ns: float
    """Per token that is sampled."""

    contention: Contention
    provenance: str
    """`measured`, `fitted` or `estimated`, and from what."""

    turnaround_ns: int = 0
    """For which a lane stands still before a batch that is handed to it while it is idle: threads wake each other, and
    the control plane makes a step. With look-ahead the next batch is there already. Found in recordings, since only a
    daemon has all of it; 0 where nobody measured it."""
    wake_ns: int = 0
    """By how much longer a batch takes that is the first one after the whole device stood still for at least
    `wake_after_ns`: threads sleep and caches belong to others by then. Found in recordings, as above."""
    wake_after_ns: int = 0
    """See `wake_ns`."""

    def __post_init__(self) -> None:
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise ConfigError(f"profile {self.name}: {name} must be at least 1, not {getattr(self, name)}")
        for name in _RATES:
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"profile {self.name}: {name} must be positive, not {value}")
        for name in _COSTS:
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"profile {self.name}: {name} must not be negative, but is {value}")
        for name in ("bandwidth_saturation", "rate_saturation", "cache_misalignment"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"profile {self.name}: {name} must be from 0 to 1, not {getattr(self, name)}")
        self._check_rows()

    def _check_rows(self) -> None:
        if not self.rows:
            raise ConfigError(f"profile {self.name}: rows has no knots")
        before = (0.0, 0.0)
        for tokens, rows in self.rows:
            if not (math.isfinite(tokens + rows) and tokens > before[0] and rows >= before[1] and rows > 0):
                raise ConfigError(
                    f"profile {self.name}: the knots of rows must be positive, with rising tokens and rows that do "
                    f"not fall, but ({tokens}, {rows}) follows ({before[0]}, {before[1]})"
                )
            before = (tokens, rows)

    def rows_of(self, num_tokens: int) -> float:
        """Rows that a matrix product over `num_tokens` costs; it does not fall with more tokens."""
        knots = self.rows
        index = bisect_right(knots, (num_tokens, math.inf))
        if index == 0:
            return knots[0][1]
        tokens, rows = knots[index - 1]
        if index == len(knots):
            return rows * num_tokens / tokens
        next_tokens, next_rows = knots[index]
        return rows + (next_rows - rows) * (num_tokens - tokens) / (next_tokens - tokens)

    def wake_ns_after(self, idle_ns: int) -> int:
        """What is added to a batch before which no lane was busy for so long."""
        return self.wake_ns if idle_ns >= self.wake_after_ns else 0

    def memory_factor(self, units: int) -> float:
        """Factor on memory-bound time when only `units` of the compute units are used."""
        return self.bandwidth_saturation + (1.0 - self.bandwidth_saturation) * max(1.0, self.compute_units / units)

    def compute_factor(self, units: int) -> float:
        """Factor on compute-bound time when only `units` of the compute units are used."""
        return self.rate_saturation + (1.0 - self.rate_saturation) * max(1.0, self.compute_units / units)


_SIZES = ("compute_units", "unit_granularity", "min_units", "memory_bytes", "attention_tile_rows", "cache_bytes")
_RATES = ("bandwidth_bytes_per_s", "flops_per_s", "kv_bandwidth_bytes_per_s", "attention_flops_per_s")
_COSTS = (
    "streaming_slowdown",
    "attention_tile_keys",
    "attention_tail",
    "overhead_ns",
    "layer_overhead_ns",
    "sequence_overhead_ns",
    "sample_overhead_ns",
    "turnaround_ns",
    "wake_ns",
    "wake_after_ns",
)
