"""How long a batch takes: from its shape, the share of the device and what the other lane does.

    duration = (dense + attention + head) * contention + overheads

Each part is a roofline (Williams et al. 2009) with rates of its own; the decomposition by kinds of kernel follows
Vidur (section 4). `core/device.py` says what each parameter means.

- dense: `max(weights / bandwidth, 2 * parameters * rows(tokens) / rate)`. `rows` is the efficiency of matrix products:
  they compute whole tiles, so their cost rises in steps.
- head: the same for tokens that are sampled.
- decode attention: the bytes of KV over their bandwidth, and a cost per sequence.
- prefill attention: a tile of query rows of one head is a piece of work for one unit, as long as its keys. Pieces are
  distributed as by list scheduling (Graham 1969): one wave lasts as long as its longest piece, many waves as long as
  the work divided by the units, and a tail.
- mixed batches: a fused kernel treats every decode as a tile with one row, in each head. So the heads of a group read
  the same keys again as soon as these do not fit the cache: up to the group's size times the traffic.
- Fewer units: memory time saturates long before the units are all used, which is why decode needs only a part of a
  GPU (AgentServe, Fig. 3); arithmetic is nearly proportional.
"""

from __future__ import annotations

from dataclasses import dataclass

from agentserve.core.batch import BatchShape, Lane
from agentserve.core.device import Contention, DeviceProfile
from agentserve.core.slots import PartitionKind, SlotPartition
from agentserve.errors import ConfigError

__all__ = ["BatchShape", "Contention", "CostModel", "DeviceProfile", "ModelShape", "Sample"]

# Looking up a member of an enumeration costs as much as a call.
_DECODE = Lane.DECODE
_SPLIT = PartitionKind.SPLIT
_CAP = PartitionKind.CAP


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the cost of a model depends on."""

    num_linear_parameters: int
    """Weights that every token is multiplied with: all but the embedding table."""
    num_head_parameters: int
    """Weights of the output head: only tokens that are sampled pass through it."""
    weight_bytes: int
    kv_bytes_per_token: int
    attention_flops_per_pair: int
    """For one query token and one key token, over all layers and heads."""
    num_layers: int
    num_heads: int
    num_kv_heads: int

    def __post_init__(self) -> None:
        if min(self.num_linear_parameters, self.weight_bytes, self.num_layers, self.num_heads, self.num_kv_heads) < 1:
            raise ConfigError("a model needs weights, layers and heads")
        if min(self.num_head_parameters, self.kv_bytes_per_token, self.attention_flops_per_pair) < 0:
            raise ConfigError("sizes of a model must not be negative")


@dataclass(frozen=True, slots=True)
class Sample:
    """One measured (or simulated) batch: what a profile is fitted to."""

    shape: BatchShape
    lane: Lane
    partition: SlotPartition
    co_running: bool
    """The other lane was busy all the time."""
    duration_ns: int


_CACHE_SHARE = 0.5
"""Of the cache is left for keys; outputs, tables and unlucky sets take the rest."""

_DELAY = 1.0
"""By how much more than its own time the shorter kind of piece of a mixed batch delays the longer one."""


class _Rates:
    """Nanoseconds for units of work on a number of compute units, and how many of these attention effectively has."""

    __slots__ = ("dense", "head", "head_row", "key", "kv_token", "row", "units", "weights")

    def __init__(self, device: DeviceProfile, model: ModelShape, units: int) -> None:
        memory, compute = device.memory_factor(units), device.compute_factor(units)
        head_share = model.num_head_parameters / (model.num_linear_parameters + model.num_head_parameters)
        read_weights = model.weight_bytes / device.bandwidth_bytes_per_s * memory * 1e9
        self.weights = read_weights * (1.0 - head_share)
        self.head = read_weights * head_share
        self.row = 2e9 * model.num_linear_parameters / device.flops_per_s * compute
        self.head_row = 2e9 * model.num_head_parameters / device.flops_per_s * compute
        self.kv_token = model.kv_bytes_per_token / device.kv_bandwidth_bytes_per_s * memory * 1e9
        tile_flops = device.attention_tile_rows * model.attention_flops_per_pair / model.num_heads
        # A single tile takes as long on many units as on few; the fewer there are, the more waves.
        self.key = tile_flops * device.compute_units / device.attention_flops_per_s * 1e9
        self.units = device.compute_units / compute
        self.dense: dict[tuple[int, int], float] = {}
        """By tokens and samples: all but attention. Kept, since few numbers come up, and these all the time."""


class CostModel:
    """Predicts the duration of batches of one model on one device."""

    def __init__(self, device: DeviceProfile, model: ModelShape) -> None:
        self.device = device
        self.model = model
        self._rates: dict[int, _Rates] = {}
        self._rows: dict[int, float] = {}
        self._overhead_ns = device.overhead_ns + device.layer_overhead_ns * model.num_layers
        self._sequence_ns = device.sequence_overhead_ns * model.num_layers
        self._group = model.num_heads / model.num_kv_heads
        self._tiles = device.attention_tile_rows, device.attention_tile_keys, device.attention_tail, model.num_heads
        head_bytes = model.kv_bytes_per_token / (model.num_layers * model.num_kv_heads)
        self._cached_tokens = _CACHE_SHARE * device.cache_bytes / max(1.0, head_bytes)
        """Tokens whose KV in one head of one layer stays in the cache."""

    def duration_ns(self, shape: BatchShape, lane: Lane, partition: SlotPartition, co_running: bool) -> int:
        """Predicted duration in a lane of a partition; `co_running`: the other lane is busy meanwhile."""
        units = partition.decode_units if lane is _DECODE else partition.prefill_units
        return self.stretched_ns(self.work_ns(shape, units), self.contention(lane, partition) if co_running else 1.0)

    def stretched_ns(self, work_ns: float, contention: float) -> int:
        """The duration of a batch with so much work (see `work_ns`) under contention."""
        return round(work_ns * contention + self._overhead_ns)

    def work_ns(self, shape: BatchShape, units: int) -> float:
        """What `units` compute units need for a batch, without overheads and a neighbour."""
        rates = self._rates.get(units) or self._rates_of(units)
        num_prefill_tokens = shape.num_prefill_tokens
        key = (shape.num_decodes + num_prefill_tokens, shape.num_samples)
        duration = rates.dense.get(key) or self._dense(rates, *key)
        if not num_prefill_tokens:
            return duration + (rates.kv_token * shape.num_decode_context + self._sequence_ns * shape.num_decodes)
        if self.device.fused_attention or not shape.num_decodes:
            duration += self._tiled_attention(shape, rates, shape.num_decodes)
        else:
            duration += self._decode_attention(shape, rates) + self._tiled_attention(shape, rates, 0)
        return duration

    def decode_durations(self, shape: BatchShape, partition: SlotPartition, co_running: bool, count: int) -> list[int]:
        """Durations of `count` decode batches: one of this shape, and those that follow it, all with the same requests.

        Each request has one token more each time. The same numbers as `duration_ns` has for each of them.
        """
        contention = self.contention(_DECODE, partition) if co_running else 1.0
        num_decodes, context = shape.num_decodes, shape.num_decode_context
        rates = self._rates_of(partition.decode_units)
        dense = rates.dense.get((num_decodes, num_decodes)) or self._dense(rates, num_decodes, num_decodes)
        kv_token, sequences, overhead_ns = rates.kv_token, self._sequence_ns * num_decodes, self._overhead_ns
        return [
            round((dense + (kv_token * tokens + sequences)) * contention + overhead_ns)
            for tokens in range(context, context + num_decodes * count, num_decodes)
        ]

    def contention(self, lane: Lane, partition: SlotPartition) -> float:
        """Factor on a batch's time in this lane while the other lane is busy."""
        factors = self.device.contention
        split, cap, shared = overlap_of(lane, partition)
        if lane is _DECODE:
            return factors.decode_split * split + factors.decode_cap * cap + factors.decode_shared * shared
        return factors.prefill_split * split + factors.prefill_cap * cap + factors.prefill_shared * shared

    def _rates_of(self, units: int) -> _Rates:
        rates = self._rates.get(units)
        if rates is None:
            rates = self._rates[units] = _Rates(self.device, self.model, units)
        return rates

    def _rows_of(self, num_tokens: int) -> float:
        rows = self._rows.get(num_tokens)
        if rows is None:
            rows = self._rows[num_tokens] = self.device.rows_of(num_tokens)
        return rows

    def _dense(self, rates: _Rates, num_tokens: int, num_samples: int) -> float:
        """Nanoseconds of the matrix products with the weights, and of sampling; from now on in `rates.dense`."""
        slowdown = self.device.streaming_slowdown
        duration = max(rates.weights * (1.0 + slowdown * num_tokens), rates.row * self._rows_of(num_tokens))
        if num_samples:
            duration += max(rates.head * (1.0 + slowdown * num_samples), rates.head_row * self._rows_of(num_samples))
            duration += self.device.sample_overhead_ns * num_samples
        rates.dense[num_tokens, num_samples] = duration
        return duration

    def _decode_attention(self, shape: BatchShape, rates: _Rates) -> float:
        return rates.kv_token * shape.num_decode_context + self._sequence_ns * shape.num_decodes

    def _tiled_attention(self, shape: BatchShape, rates: _Rates, num_decodes: int) -> float:
        """Nanoseconds of the kernel that handles the chunks and, if it is fused, `num_decodes` decodes."""
        units, num_tokens = rates.units, shape.num_prefill_tokens
        tile_rows, tile_keys, tail, num_heads = self._tiles
        longest: float = shape.num_prefill_longest or shape.num_prefill_context
        if shape.num_prefill_chunks <= 1:
            num_tiles: float = -(-num_tokens // tile_rows)
            keys = num_tiles * shape.num_prefill_pairs / num_tokens
        else:
            # Where the chunks end within their tiles is not known: as if every last tile had one row.
            padding = (tile_rows - 1) / tile_rows
            num_tiles = num_tokens / tile_rows + padding * shape.num_prefill_chunks
            keys = shape.num_prefill_pairs / tile_rows + padding * shape.num_prefill_context
        num_bytes_as_tokens: float = shape.num_prefill_context
        in_turn = -(-num_tiles * num_heads // units) * (longest + tile_keys)
        if num_decodes:
            context = shape.num_decode_context / num_decodes
            decodes = -(-num_decodes * num_heads // units) * (context + tile_keys)
            in_turn += decodes + _DELAY * min(in_turn, decodes)
            longest = max(longest, context)
            num_tiles += num_decodes
            keys += shape.num_decode_context
            num_bytes_as_tokens = max(
                num_bytes_as_tokens, shape.num_decode_context * self._num_reads(shape, num_decodes, units)
            )
        longest += tile_keys
        num_tiles *= num_heads
        makespan = longest
        if num_tiles > units:
            evenly = (num_heads * keys + num_tiles * tile_keys) / units + tail * longest
            makespan = max(longest, min(in_turn, -(-num_tiles // units) * longest, evenly))
        return max(rates.key * makespan, rates.kv_token * num_bytes_as_tokens)

    def _num_reads(self, shape: BatchShape, num_decodes: int, units: float) -> float:
        """How often a fused kernel reads the KV of the decodes from memory: once, or up to once for each head.

        The heads of a group run in consecutive waves. Those of one wave share what they read; later ones find again
        what part of the keys of all sequences fits the cache.
        """
        reads = min(self._group, max(1.0, self._group * num_decodes / units + self.device.cache_misalignment))
        lost = 1.0 - self._cached_tokens / max(1, shape.num_decode_context)
        return 1.0 + (reads - 1.0) * lost if lost > 0 else 1.0


def prompt_shape(num_tokens: int, start: int = 0) -> BatchShape:
    """A batch of one chunk of a prompt that is not finished by it; `start`: tokens before it."""
    end, num_pairs = start + num_tokens, num_tokens * start + num_tokens * (num_tokens + 1) // 2
    return BatchShape(0, 0, 1, num_tokens, end, num_pairs, 0, end)


def overlap_of(lane: Lane, partition: SlotPartition) -> tuple[float, float, float]:
    """Weights of the contention factors `split`, `cap` and `shared` in this lane; their sum is 1.

    The decode lane of a capped partition meets the other lane on a part of its units: between two factors each.
    """
    if partition.kind is _SPLIT:
        return (1.0, 0.0, 0.0)
    if partition.kind is not _CAP:
        return (0.0, 0.0, 1.0)
    if lane is not _DECODE:
        return (0.0, 1.0, 0.0)
    overlap = partition.prefill_units / partition.decode_units
    return (max(0.0, 1.0 - 2.0 * overlap), 1.0 - abs(1.0 - 2.0 * overlap), max(0.0, 2.0 * overlap - 1.0))
