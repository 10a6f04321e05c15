"""What a calibration measures: batch shapes over the table of partitions, in the order of their value."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from agentserve.core.batch import Lane
from agentserve.core.executor import Capabilities
from agentserve.core.slots import PartitionTable, SlotPartition
from agentserve.errors import ConfigError

DECODE_SPAN = 48
"""Tokens that a sequence decodes before it starts again where it began."""
CHUNK_SPAN = 4
"""Chunks that a prompt with a context is continued by before it starts again."""

_QUICK_PAIR_CHUNK = 128
_FULL_BATCHES = (1, 2, 4, 8, 16, 32, 64)
_FULL_CONTEXTS = (64, 256, 1024, 4096)
_FULL_CHUNKS = (16, 32, 64, 128, 256, 512, 1024)
_FULL_STARTS = (0, 256, 1024, 4096)
_FULL_MIXED_BATCHES, _FULL_MIXED_CHUNKS = (1, 4, 8), (16, 32, 64, 128, 256)
_FULL_FILLED_TOKENS = 8192

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Limits:
    """What an executor can take. Raises ConfigError for sizes that are not positive."""

    num_blocks: int
    block_size: int
    max_model_len: int
    max_num_seqs: int
    """Requests that may hold blocks at a time, in both lanes together."""
    vocabulary_size: int = 100
    """Token ids are below this."""

    def __post_init__(self) -> None:
        if min(self.num_blocks, self.block_size, self.max_num_seqs, self.vocabulary_size) < 1:
            raise ConfigError("the limits of a calibration must be positive")
        if self.max_model_len < 2:
            raise ConfigError("a calibration needs a window of at least 2 tokens")

    @classmethod
    def of(cls, capabilities: Capabilities, max_model_len: int, max_num_seqs: int) -> Limits:
        """The limits of an executor that was built for this window and so many requests."""
        return cls(capabilities.num_blocks, capabilities.block_size, max_model_len, max_num_seqs)

    def context(self, wanted: int) -> int:
        """The largest context up to `wanted` that is whole blocks and leaves three quarters of the window."""
        return min(wanted, self.max_model_len // 4) // self.block_size * self.block_size

    def chunk(self, wanted: int) -> int:
        """The largest chunk up to `wanted` that fits behind any `context`."""
        return max(1, min(wanted, self.max_model_len // 2))


@dataclass(frozen=True, slots=True)
class Load:
    """Batches of one shape that a lane runs one after the other: so many decodes, and a prefill chunk or none."""

    num_decodes: int = 0
    context: int = 0
    """Tokens before the first decoded one; whole blocks."""
    chunk: int = 0
    """Prefill tokens in a batch; 0: no prefill."""
    start: int = 0
    """Tokens before the first chunk; whole blocks. 0: every chunk is the beginning of a new prompt."""

    @property
    def label(self) -> str:
        decodes = f"{self.num_decodes} decodes at {self.context}" if self.num_decodes else ""
        chunk = f"{self.chunk} prompt tokens at {self.start}" if self.chunk else ""
        return " + ".join(part for part in (decodes, chunk) if part)

    def num_blocks(self, limits: Limits) -> int:
        """Blocks that its sequences need of their own."""
        size = limits.block_size
        decode = self.num_decodes * (-(-decode_end(self.context, limits) // size) - self.context // size)
        return decode + (-(-chunk_end(self.start, self.chunk, limits) // size) - self.start // size)

    def fits(self, limits: Limits) -> bool:
        """Whether its positions lie in the window, with room for a step that gets a sequence ready."""
        longest_decode = self.context + 1 + (self.context > 0) if self.num_decodes else 0
        longest_chunk = self.start + self.chunk + (self.start > 0) if self.chunk else 0
        return max(longest_decode, longest_chunk) <= limits.max_model_len


def decode_end(context: int, limits: Limits) -> int:
    """Where a decoding sequence starts again at the latest."""
    return min(limits.max_model_len, context + DECODE_SPAN)


def chunk_end(start: int, chunk: int, limits: Limits) -> int:
    """Where a prompt starts again at the latest."""
    return start + chunk if start == 0 else min(limits.max_model_len, start + 1 + CHUNK_SPAN * chunk)


@dataclass(frozen=True, slots=True)
class Case:
    """One measurement: a load in one lane, alone, or one in each lane at the same time."""

    partition: SlotPartition
    decode: Load | None = None
    """What the decode lane runs."""
    prefill: Load | None = None
    """What the prefill lane runs."""
    required: bool = False
    """Measured even if the time is spent: without it a profile would be a guess."""

    @property
    def loads(self) -> dict[Lane, Load]:
        pairs = ((Lane.DECODE, self.decode), (Lane.PREFILL, self.prefill))
        return {lane: load for lane, load in pairs if load is not None}

    @property
    def co_running(self) -> bool:
        return self.decode is not None and self.prefill is not None

    @property
    def label(self) -> str:
        return f"{self.partition.label}: " + " beside ".join(load.label for load in self.loads.values())

    def fits(self, limits: Limits, num_filled: int) -> bool:
        """Whether the executor can take it while `num_filled` blocks are spoken for."""
        loads = self.loads.values()
        num_sequences = sum(load.num_decodes + (load.chunk > 0) for load in loads)
        num_blocks = sum(load.num_blocks(limits) for load in loads)
        return (
            all(load.fits(limits) for load in loads)
            and num_sequences <= limits.max_num_seqs
            and num_blocks + num_filled <= limits.num_blocks
        )


@dataclass(frozen=True, slots=True)
class Grid:
    """What to measure and how thoroughly."""

    limits: Limits
    cases: tuple[Case, ...]
    """The most valuable first."""
    num_filled_tokens: int
    """Tokens whose keys and values are computed beforehand; contexts are made of their blocks, over and over. For a
    device that caches memory they should be more than its cache holds."""
    num_rounds: int
    """How often all cases are gone through. Another process that comes and goes then slows down a round of many cases
    and not all batches of a few, which the median would believe."""
    min_timed: int
    """Batches of a case that are timed in a round at least, unless they take long."""
    max_timed: int
    case_time_ns: int
    """More than `min_timed` batches are timed until this is spent; three times as much ends the case in any event."""
    time_limit_ns: int | None = None
    """When this is spent, cases that are not required are left out."""
    quantile: float = 0.5
    """Which of a case's timed batches counts, by duration: 0.5 is the median. Noise only ever adds, so less is less
    exact where the machine is quiet, and not as far off where something else runs in every round."""

    @property
    def num_filled_blocks(self) -> int:
        """At most half of the blocks: the sequences need some of their own."""
        return min(self.num_filled_tokens // self.limits.block_size, self.limits.num_blocks // 2)

    @classmethod
    def quick(cls, table: PartitionTable, limits: Limits, time_limit_ns: int = 4_500_000_000) -> Grid:
        """What the start of a daemon can afford: each effect of the cost model once or twice.

        Three rounds, and a low quantile: a process that disturbs all of one round, or parts of each, spoils no case.
        """
        cases = (*_quick_necessary(table, limits), *_quick_rest(table, limits))
        return _grid(cls(limits, cases, limits.context(256), 3, 2, 3, 120_000_000, time_limit_ns, 0.25))

    @classmethod
    def full(cls, table: PartitionTable, limits: Limits) -> Grid:
        """What `agentserve profile` measures: minutes on a CPU."""
        cases = (*_full_alone(table, limits), *_full_together(table, limits))
        return _grid(cls(limits, cases, _FULL_FILLED_TOKENS, 3, 2, 4, 250_000_000))


def _grid(grid: Grid) -> Grid:
    """Without what does not fit and without repetitions. Raises ConfigError if a kind of work is left out by that."""
    loads = [case.loads.values() for case in grid.cases]
    longest = max(sum(load.num_decodes * load.context + load.start for load in pair) for pair in loads)
    grid = replace(grid, num_filled_tokens=min(grid.num_filled_tokens, longest))
    # A case that occurs twice is measured in its first place.
    unique: dict[tuple[SlotPartition, Load | None, Load | None], Case] = {}
    for case in grid.cases:
        if case.fits(grid.limits, grid.num_filled_blocks):
            unique.setdefault((case.partition, case.decode, case.prefill), case)
    if not any(case.decode for case in unique.values()) or not any(case.prefill for case in unique.values()):
        raise ConfigError(
            f"a KV cache of {grid.limits.num_blocks * grid.limits.block_size} tokens is too small to measure with"
        )
    return replace(grid, cases=tuple(unique.values()))


# ---- quick ----


def _quick_necessary(table: PartitionTable, limits: Limits) -> Iterator[Case]:
    """About four seconds with a model of 135 million weights on two cores."""
    context = limits.context(256)
    few, many = _few(limits), min(8, limits.max_num_seqs)
    yield Case(table.whole, decode=Load(1, context), required=True)
    yield Case(table.whole, prefill=Load(chunk=limits.chunk(256)), required=True)
    yield Case(table.whole, decode=Load(many, context), required=True)
    yield Case(table.whole, prefill=Load(chunk=limits.chunk(32)), required=True)
    yield Case(table.whole, decode=Load(few, context, limits.chunk(64), context), required=True)
    # Both lanes at once on an entry of each kind.
    beside = Load(chunk=limits.chunk(_QUICK_PAIR_CHUNK))
    half_cap = min(table.caps, key=lambda cap: abs(2 * cap.prefill_units - cap.decode_units), default=table.stream)
    for partition in dict.fromkeys((table.split_nearest(0.5), half_cap, table.stream)):
        yield Case(partition, decode=Load(few, context), prefill=beside, required=True)


def _quick_rest(table: PartitionTable, limits: Limits) -> Iterator[Case]:
    context, far = limits.context(256), limits.context(1024)
    few, beside = _few(limits), Load(chunk=limits.chunk(_QUICK_PAIR_CHUNK))
    half = table.split_nearest(0.5)
    yield Case(half, decode=Load(few, context))
    yield Case(table.whole, decode=Load(few, context, limits.chunk(16), context))
    yield Case(half, prefill=Load(chunk=limits.chunk(64)))
    yield Case(table.whole, decode=Load(few, far))
    yield Case(table.whole, prefill=beside)
    yield Case(half, decode=Load(1, context), prefill=beside)
    yield Case(table.whole, decode=Load(2 * few, context, limits.chunk(128), context))
    yield Case(table.whole, prefill=Load(chunk=limits.chunk(128), start=far))
    yield Case(half, decode=Load(1, context))
    for partition in (*table.splits, *table.caps):
        yield Case(partition, decode=Load(few, context), prefill=beside)
    for partition in table.splits:
        yield Case(partition, decode=Load(few, context))
        yield Case(partition, prefill=beside)
        yield Case(partition, decode=Load(few, context, limits.chunk(64), context))


def _few(limits: Limits) -> int:
    """Sequences that leave room for a prompt."""
    return min(4, max(1, limits.max_num_seqs - 1))


# ---- full ----


def _full_alone(table: PartitionTable, limits: Limits) -> Iterator[Case]:
    """Each lane alone, over all sizes that its slots have. Alone, only the number of units counts."""
    contexts = _distinct(limits.context(wanted) for wanted in _FULL_CONTEXTS)
    starts = _distinct(limits.context(wanted) for wanted in _FULL_STARTS)
    chunks = _distinct(limits.chunk(wanted) for wanted in _FULL_CHUNKS)
    for partition in _by_units(table, Lane.DECODE):
        for num_decodes in _FULL_BATCHES:
            for context in contexts:
                yield Case(partition, decode=Load(num_decodes, context))
    for partition in _by_units(table, Lane.PREFILL):
        for chunk in chunks:
            for start in starts:
                yield Case(partition, prefill=Load(chunk=chunk, start=start))
    context = limits.context(256)
    for partition in _by_units(table, Lane.DECODE):
        for num_decodes in _FULL_MIXED_BATCHES:
            for chunk in _distinct(limits.chunk(wanted) for wanted in _FULL_MIXED_CHUNKS):
                yield Case(partition, decode=Load(num_decodes, context, chunk, context))


def _full_together(table: PartitionTable, limits: Limits) -> Iterator[Case]:
    near, far = limits.context(256), limits.context(1024)
    decodes = _distinct((Load(1, near), Load(4, near), Load(8, near), Load(4, far)))
    # The last is a decode lane that takes resume prefills along.
    decodes = (*decodes, Load(4, near, limits.chunk(32), near))
    prefills = _distinct(
        (Load(chunk=limits.chunk(64)), Load(chunk=limits.chunk(256)), Load(chunk=limits.chunk(256), start=far))
    )
    for partition in (*table.splits, table.stream, *table.caps):
        for decode in decodes:
            for prefill in prefills:
                yield Case(partition, decode=decode, prefill=prefill)


def _by_units(table: PartitionTable, lane: Lane) -> Sequence[SlotPartition]:
    """The first entry for each number of units that the lane can have."""
    found: dict[int, SlotPartition] = {}
    for partition in table.entries:
        found.setdefault(partition.units(lane), partition)
    return tuple(found.values())


def _distinct(values: Iterable[_T]) -> tuple[_T, ...]:
    return tuple(dict.fromkeys(values))
