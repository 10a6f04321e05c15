"""The cost model: exact sums on a simple device, and what must hold on any device."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentserve.core.batch import Batch, Lane, SampleSpec, ScheduledChunk
from agentserve.core.costmodel import BatchShape, Contention, CostModel, ModelShape
from agentserve.core.request import SamplingParams, WorkClass
from agentserve.core.slots import PartitionKind, SlotPartition, build_partition_table
from agentserve.errors import ConfigError
from agentserve.profiles import available_profiles, load_profile
from tests.core.builders import MS, cost_model, device_profile

WHOLE = SlotPartition(8, 8, PartitionKind.WHOLE)
STREAM = SlotPartition(8, 8, PartitionKind.STREAM)
MODEL = ModelShape(
    num_linear_parameters=1_000_000,
    num_head_parameters=1_000_000,
    weight_bytes=16_000_000,
    kv_bytes_per_token=1000,
    attention_flops_per_pair=8_000,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
)
"""8 MB of layers and 8 MB of head; 2 kflops for a pair in each head; 250 bytes of KV in each KV head of a layer."""


def decodes(num_decodes: int, context: int, num_samples: int | None = None) -> BatchShape:
    return BatchShape(
        num_decodes=num_decodes,
        num_decode_context=num_decodes * context,
        num_samples=num_decodes if num_samples is None else num_samples,
    )


def prefill(num_tokens: int, start: int = 0) -> BatchShape:
    return BatchShape().with_prefill(num_tokens, start)


def alone(model: CostModel, shape: BatchShape, partition: SlotPartition = WHOLE, lane: Lane = Lane.PREFILL) -> int:
    return model.duration_ns(shape, lane, partition, False)


# ---- shapes ----


def test_the_shape_of_a_batch() -> None:
    spec = SampleSpec(SamplingParams(max_tokens=1), 0, (), 0)
    chunks = (
        ScheduledChunk("a", WorkClass.COLD_PREFILL, 4, (1, 2, 3), (0, 1), None),
        ScheduledChunk("b", WorkClass.DECODE, 9, (1,), (2, 3, 4), spec),
        ScheduledChunk("c", WorkClass.RESUME_PREFILL, 8, (1, 2), (5, 6, 7), spec),
    )
    shape = BatchShape.of(Batch(0, Lane.DECODE, WHOLE, False, chunks))
    assert shape == BatchShape(
        num_decodes=1,
        num_decode_context=10,
        num_prefill_chunks=2,
        num_prefill_tokens=3 + 2,
        num_prefill_context=7 + 10,
        # 3 * 4 before the chunk and 1 + 2 + 3 within; 2 * 8 and 1 + 2.
        num_prefill_pairs=12 + 6 + 16 + 3,
        num_samples=2,
        num_prefill_longest=10,
    )
    assert shape.num_tokens == 6
    grown = replace(shape, num_prefill_chunks=3, num_prefill_tokens=6, num_prefill_context=18, num_prefill_pairs=38)
    assert shape.with_prefill(1) == grown


def test_the_longest_chunk_of_a_shape_made_by_hand_is_its_only_chunk() -> None:
    by_hand = replace(prefill(16, 100), num_prefill_longest=0)
    model = CostModel(device_profile(attention_flops_per_s=1e6), MODEL)
    assert alone(model, by_hand) == alone(model, prefill(16, 100))
    assert by_hand.with_prefill(1, 0) == prefill(16, 100).with_prefill(1, 0)


# ---- sums ----


def test_decode_is_bound_by_bandwidth_and_prefill_by_arithmetic() -> None:
    model = cost_model()
    # 8 MB of weights and 1000 tokens of 1 kB at 1 GB/s.
    assert alone(model, decodes(1, 1000)) == 9 * MS
    # 100 tokens of 2 * 1e6 flops at 2e9 flops/s.
    assert alone(model, prefill(100)) == 100 * MS + 100_000
    # Half of the units: arithmetic takes twice as long, memory (0.8 + 0.2 * 2) times as long.
    half = SlotPartition(4, 4, PartitionKind.SPLIT)
    assert alone(model, prefill(100), half) == 200 * MS + 120_000
    assert alone(model, decodes(1, 1000), half, Lane.DECODE) == pytest.approx(9 * MS * 1.2, rel=1e-9)


def test_each_lane_has_its_units() -> None:
    split = SlotPartition(2, 4, PartitionKind.SPLIT)
    model = cost_model(bandwidth_saturation=0.0)
    assert alone(model, decodes(1, 0), split, Lane.DECODE) == 32 * MS
    assert alone(model, decodes(1, 0), split, Lane.PREFILL) == 16 * MS


def test_only_sampled_tokens_pass_through_the_head() -> None:
    model = CostModel(device_profile(sample_overhead_ns=1000.0), MODEL)
    assert alone(model, decodes(2, 0, num_samples=0)) == 8 * MS
    # Reading 8 MB more, and 1 us for each sample.
    assert alone(model, decodes(2, 0)) == 16 * MS + 2000
    # 20 samples of 2 * 1e6 flops at 2e9 flops/s exceed reading the head.
    assert alone(model, decodes(20, 0)) == 40 * MS + 20_000


def test_overheads_and_the_slowdown_of_streaming() -> None:
    device = device_profile(
        overhead_ns=10_000, layer_overhead_ns=3_000.0, sequence_overhead_ns=50.0, streaming_slowdown=0.01
    )
    # 8 ms, 2 % slower with 2 tokens; 10 us; 3 us in each of 2 layers; 50 ns for each of 2 sequences in each layer.
    assert alone(CostModel(device, MODEL), decodes(2, 0, num_samples=0)) == 8_160_000 + 10_000 + 6_000 + 200


def test_matrix_products_cost_whole_tiles() -> None:
    device = device_profile(rows=((1.0, 16.0), (16.0, 16.0), (18.0, 32.0), (32.0, 32.0)))
    assert [device.rows_of(n) for n in (0, 1, 16, 17, 18, 32, 64)] == [16, 16, 16, 24, 32, 32, 64]
    no_attention = replace(MODEL, kv_bytes_per_token=0, attention_flops_per_pair=0)
    assert alone(CostModel(device, no_attention), prefill(17)) == 24 * MS


def test_prefill_attention_comes_in_waves() -> None:
    # A tile of 16 rows: 16 * 2 kflops for a key. A unit does 1/8 of 256e6 flops/s, so that a key takes 1 ms.
    model = CostModel(device_profile(attention_flops_per_s=256e6), MODEL)
    dense = {num_tokens: max(8, num_tokens) for num_tokens in (16, 32, 33, 64)}
    # 1 tile in each of 4 heads: 4 of 8 units are busy, for as long as the last token has keys.
    assert alone(model, prefill(16, 100)) == (dense[16] + 116) * MS
    assert alone(model, prefill(32, 100)) == (dense[32] + 132) * MS
    # 12 tiles are 2 waves, but not all tiles are equally long: 12 / 8 of the mean (100 + 17).
    assert alone(model, prefill(33, 100)) == (dense[33] + 1.5 * 117) * MS
    # 16 tiles: two waves of the mean length 100 + 32.5.
    assert alone(model, prefill(64, 100)) == (dense[64] + 2 * 132.5) * MS


def test_a_fused_kernel_handles_decodes_like_chunks() -> None:
    shape = replace(decodes(2, 200, num_samples=0)).with_prefill(16, 100)
    apart = CostModel(device_profile(attention_flops_per_s=256e6), MODEL)
    # The chunk as above, then 400 tokens of KV: 1 kB each at 1 GB/s.
    assert alone(apart, shape) == (18 + 116) * MS + 400_000
    fused = CostModel(device_profile(attention_flops_per_s=256e6, fused_attention=True, cache_bytes=1 << 40), MODEL)
    # 4 tiles of 100 + 8.5 keys and 8 of 200 on 8 units: evenly (434 + 1600) / 8 keys; two waves would be 400.
    assert alone(fused, shape) == (18 + 2034 / 8) * MS


def test_a_fused_kernel_reads_keys_again_that_do_not_fit_the_cache() -> None:
    shape = decodes(32, 1000, num_samples=0).with_prefill(1)
    device = device_profile(fused_attention=True, kv_bandwidth_bytes_per_s=1e8)

    def attention_ms(cache_bytes: int) -> float:
        return alone(CostModel(replace(device, cache_bytes=cache_bytes), MODEL), shape) / MS - 33

    # 32,000 tokens of 1 kB at 0.1 GB/s once, and twice if the two heads of a group find nothing in the cache.
    assert attention_ms(1 << 40) == pytest.approx(320)
    assert attention_ms(1) == pytest.approx(640, rel=1e-4)
    # Keys of one head are 32,000 * 250 bytes; half of a cache of this size holds half of them.
    assert attention_ms(8_000_000) == pytest.approx(480)


def test_contention_depends_on_lane_and_kind() -> None:
    factors = Contention(decode_split=1.25, prefill_split=1.5, decode_shared=2.25, prefill_shared=3.0)
    model = cost_model(contention=factors, overhead_ns=1000)

    def factor(lane: Lane, partition: SlotPartition) -> float:
        with_other = model.duration_ns(prefill(8), lane, partition, True)
        return (with_other - 1000) / (model.duration_ns(prefill(8), lane, partition, False) - 1000)

    split, cap = SlotPartition(4, 4, PartitionKind.SPLIT), SlotPartition(8, 2, PartitionKind.CAP)
    assert factor(Lane.DECODE, split) == pytest.approx(1.25)
    assert factor(Lane.PREFILL, split) == pytest.approx(1.5)
    assert factor(Lane.DECODE, STREAM) == pytest.approx(2.25)
    assert factor(Lane.PREFILL, STREAM) == pytest.approx(3.0)
    # The decode lane meets the other one on 2 of its 8 units, the capped one on all of its own.
    assert factor(Lane.DECODE, cap) == pytest.approx(1.5)
    assert factor(Lane.PREFILL, cap) == pytest.approx(3.0)
    # What is measured at half of the units counts half there, and what is measured of caps for all of them.
    model = cost_model(contention=replace(factors, decode_cap=2.0, prefill_cap=2.5), overhead_ns=1000)
    assert factor(Lane.DECODE, cap) == pytest.approx((1.25 + 2.0) / 2)
    assert factor(Lane.DECODE, SlotPartition(8, 4, PartitionKind.CAP)) == pytest.approx(2.0)
    assert factor(Lane.DECODE, SlotPartition(8, 6, PartitionKind.CAP)) == pytest.approx((2.0 + 2.25) / 2)
    assert factor(Lane.PREFILL, cap) == pytest.approx(2.5)


# ---- what holds on any device ----

LLAMA = ModelShape(
    num_linear_parameters=6_979_321_856,
    num_head_parameters=525_336_576,
    weight_bytes=15_009_316_864,
    kv_bytes_per_token=131_072,
    attention_flops_per_pair=524_288,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
)
DEVICES = {name: load_profile(name) for name in available_profiles()}
names = st.sampled_from(sorted(DEVICES))
tokens, contexts, counts = st.integers(1, 4096), st.integers(0, 20_000), st.integers(0, 64)


@given(name=names, num_decodes=counts, context=contexts, chunk=tokens, start=contexts, more=st.integers(1, 300))
@settings(max_examples=300)
def test_more_work_never_takes_less_time(
    name: str, num_decodes: int, context: int, chunk: int, start: int, more: int
) -> None:
    device = DEVICES[name]
    model = CostModel(device, LLAMA)
    whole = build_partition_table(device.compute_units, device.unit_granularity, device.min_units).whole
    shape = decodes(num_decodes, context + 1)
    base = alone(model, shape.with_prefill(chunk, start), whole)
    assert alone(model, shape, whole) <= base or not num_decodes
    assert base <= alone(model, shape.with_prefill(chunk + more, start), whole)
    assert base <= alone(model, shape.with_prefill(chunk, start + more), whole)
    assert base <= alone(model, decodes(num_decodes, context + 1 + more).with_prefill(chunk, start), whole)
    assert base <= alone(model, decodes(num_decodes + 1, context + 1).with_prefill(chunk, start), whole)
    assert base <= alone(model, shape.with_prefill(chunk, start).with_prefill(more, 0), whole)


@given(name=names, num_decodes=counts, context=contexts, chunk=st.integers(0, 4096), start=contexts)
@settings(max_examples=200)
def test_more_units_are_never_slower(name: str, num_decodes: int, context: int, chunk: int, start: int) -> None:
    device = DEVICES[name]
    model = CostModel(device, LLAMA)
    shape = decodes(num_decodes, context + 1)
    if chunk or not num_decodes:
        shape = shape.with_prefill(chunk + 1, start)
    ladder = [SlotPartition(units, units, PartitionKind.SPLIT) for units in range(1, device.compute_units + 9)]
    durations = [alone(model, shape, partition) for partition in ladder]
    assert durations == sorted(durations, reverse=True)
    assert durations[-1] == durations[-9] > 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"memory_bytes": 0}, "memory_bytes must be at least 1"),
        ({"flops_per_s": 0.0}, "flops_per_s must be positive"),
        ({"bandwidth_bytes_per_s": float("nan")}, "bandwidth_bytes_per_s must be positive"),
        ({"overhead_ns": -1}, "overhead_ns must not be negative"),
        ({"rate_saturation": 1.5}, "rate_saturation must be from 0 to 1"),
        ({"rows": ()}, "rows has no knots"),
        ({"rows": ((1.0, 2.0), (2.0, 1.0))}, "rows that do not fall"),
        ({"rows": ((2.0, 2.0), (2.0, 3.0))}, "rising tokens"),
    ],
)
def test_impossible_profiles_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        device_profile(**values)


def test_impossible_contention_and_models_are_refused() -> None:
    with pytest.raises(ConfigError, match="decode_split must be at least 1"):
        Contention.uniform(0.5)
    with pytest.raises(ConfigError, match="needs weights, layers and heads"):
        replace(MODEL, num_layers=0)
