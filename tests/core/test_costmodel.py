"""The roofline: what costs more takes longer, what saturates saturates, and shipped profiles are usable."""

from __future__ import annotations

import pytest

from agentserve.core.batch import Batch, Lane, SampleSpec, ScheduledChunk
from agentserve.core.costmodel import BatchShape
from agentserve.core.request import SamplingParams, WorkClass
from agentserve.core.slots import build_partition_table
from agentserve.errors import ConfigError
from agentserve.profiles import available_profiles, load_profile
from tests.core.builders import MS, cost_model, device_profile


def shape(num_tokens: int, num_context_tokens: int = 0) -> BatchShape:
    return BatchShape(num_tokens, 0, num_context_tokens, 0)


def test_the_shape_of_a_batch() -> None:
    spec = SampleSpec(SamplingParams(max_tokens=1), 0, (), 0)
    chunks = (
        ScheduledChunk("a", WorkClass.COLD_PREFILL, 4, (1, 2, 3), (0, 1), None),
        ScheduledChunk("b", WorkClass.DECODE, 9, (1,), (2, 3, 4), spec),
    )
    batch = Batch(0, Lane.DECODE, build_partition_table(4, 1, 1).whole, False, chunks)
    # Pairs: 3 * 4 before the chunk and 1 + 2 + 3 within; 9 + 1 for the decode.
    assert BatchShape.of(batch) == BatchShape(4, 1, 7 + 10, 12 + 6 + 10)


def test_decode_is_bound_by_bandwidth_and_prefill_by_compute() -> None:
    model = cost_model()
    # 8 MB of weights and 1000 tokens of 1 kB at 1 GB/s.
    assert model.duration_ns(shape(1, 1000), 8, False) == 9 * MS
    # 100 tokens of 2 * 1e6 flops at 2e9 flops/s.
    assert model.duration_ns(shape(100), 8, False) == 100 * MS
    # Half of the units: prefill takes twice as long, decode a fifth more (0.5 * 1.25 / 0.75 of the bandwidth).
    assert model.duration_ns(shape(100), 4, False) == 200 * MS
    assert model.duration_ns(shape(1), 4, False) == pytest.approx(8 * MS * 1.2, rel=1e-9)
    assert model.duration_ns(shape(100), 8, True) == 125 * MS


def test_bandwidth_rises_and_saturates() -> None:
    device = device_profile()
    curve = [device.bandwidth(units) for units in range(1, 9)]
    gains = [b - a for a, b in zip([0.0, *curve], curve, strict=False)]
    assert all(gain > 0 for gain in gains)
    assert gains == sorted(gains, reverse=True)
    assert curve[-1] == device.bandwidth_bytes_per_s == device.bandwidth(99)


@pytest.mark.parametrize("name", available_profiles())
def test_shipped_profiles_can_be_loaded_and_split(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert profile.provenance.split(":")[0] in {"measured", "fitted", "estimated"}
    assert build_partition_table(profile.compute_units, profile.unit_granularity, profile.min_units).splits


def test_profile_names_are_forgiving_but_not_guessed() -> None:
    assert load_profile("RTX 5090").compute_units == 170
    with pytest.raises(ConfigError, match="did you mean rtx-4090"):
        load_profile("rtx-4091")


@pytest.mark.parametrize("values", [{"memory_bytes": 0}, {"flops_per_s": 0.0}, {"contention": 0.5}])
def test_impossible_profiles_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        device_profile(**values)
