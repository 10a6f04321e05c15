"""Which slots are planned on which GPU. Pure arithmetic: no driver, no GPU."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentserve.core.batch import Lane
from agentserve.core.slots import build_partition_table
from agentserve.errors import ConfigError
from agentserve.executors.pytorch.devices.green_plan import (
    DeviceFacts,
    GreenPlan,
    SlotMode,
    SlotSpec,
    SplitFacts,
    SplitMethod,
    candidate_group_sizes,
    choose_split,
    decide_mode,
    plan_groups,
    plan_pairs,
)
from tests.executors.fake_cuda import A100, A5000, H200, RTX4090, RTX5090, Gpu


def facts_of(gpu: Gpu, **values: object) -> DeviceFacts:
    known = DeviceFacts(
        name=gpu.name,
        compute_capability=gpu.compute_capability,
        num_sms=gpu.num_sms,
        memory_bytes=gpu.memory_bytes,
        l2_bytes=gpu.l2_bytes,
        driver_version=13000,
        bindings_version=13000,
        min_partition_sms=gpu.min_partition,
        coscheduled_alignment=gpu.alignment,
    )
    return replace(known, **values)  # type: ignore[arg-type]


def numbers_of(plan: GreenPlan, spec: SlotSpec) -> set[int]:
    """The SMs of a slot, numbered group by group, the remainder last."""
    assert plan.split is not None
    group = plan.split.group_sms
    sms = {sm for index in spec.groups for sm in range(index * group, (index + 1) * group)}
    if spec.with_remainder:
        sms |= {plan.split.num_groups * group + i for i in range(plan.split.remainder_sms)}
    return sms


def slots_of(plan: GreenPlan) -> dict[tuple[Lane, int], SlotSpec]:
    slots = {(spec.lane, spec.units): spec for spec in plan.slots}
    assert len(slots) == len(plan.slots)
    return slots


def check_against_the_table(plan: GreenPlan) -> None:
    """Every entry of the table has its slots, of its sizes, and no slot is made for nothing."""
    table = build_partition_table(
        plan.compute_units, plan.unit_granularity, plan.min_units, unused_units=plan.unused_units
    )
    slots = slots_of(plan)
    wanted = {(Lane.DECODE, split.decode_units) for split in table.splits}
    wanted |= {(Lane.PREFILL, entry.prefill_units) for entry in (*table.splits, *table.caps)}
    assert set(slots) == wanted
    assert table.splits
    if plan.method is SplitMethod.PAIRS:
        for split in table.splits:
            decode, prefill = slots[Lane.DECODE, split.decode_units], slots[Lane.PREFILL, split.prefill_units]
            assert decode.pair == prefill.pair == (split.decode_units, split.prefill_units)
            assert (decode.side, prefill.side) == (0, 1)
        return
    for spec in plan.slots:
        assert len(numbers_of(plan, spec)) == spec.units
        assert spec.groups, "no slot is the remainder alone"
    for split in table.splits:
        decode = numbers_of(plan, slots[Lane.DECODE, split.decode_units])
        prefill = numbers_of(plan, slots[Lane.PREFILL, split.prefill_units])
        assert not decode & prefill
        assert len(decode | prefill) == plan.compute_units - plan.unused_units


# ---- sizes of groups ----


@pytest.mark.parametrize(
    ("gpu", "sizes"),
    [
        (A5000, (4, 6, 8)),  # 64 / 4 = 16 groups, 10, 8
        (A100, (6, 8, 10, 12)),  # 108 / 4 = 27 groups are too many
        (RTX4090, (6, 8, 10, 12, 14, 16)),
        (RTX5090, (8, 16)),  # 170 / 8 = 21 groups, 10
        (H200, (8, 16)),  # 132 / 8 = 16 groups, 8
    ],
)
def test_groups_are_asked_for_in_sizes_that_give_a_ladder(gpu: Gpu, sizes: tuple[int, ...]) -> None:
    assert candidate_group_sizes(facts_of(gpu)) == sizes


def test_devices_of_unusual_size_have_one_candidate() -> None:
    small = facts_of(A5000, num_sms=16, min_partition_sms=4)
    assert candidate_group_sizes(small) == (4,)  # 16 / 4 = 4 groups: fewer than wanted, but there is no smaller group
    coarse = facts_of(A5000, num_sms=400, min_partition_sms=2, coscheduled_alignment=200)
    assert candidate_group_sizes(coarse) == (200,)
    with pytest.raises(ConfigError, match="6 SMs do not make two partitions of at least 4"):
        candidate_group_sizes(facts_of(A5000, num_sms=6))
    with pytest.raises(ConfigError, match="does not say"):
        candidate_group_sizes(facts_of(A5000, min_partition_sms=None))


def test_the_split_with_the_least_loss_is_taken() -> None:
    fine, coarse = SplitFacts(8, 15, 12, True), SplitFacts(16, 6, 36, True)
    assert choose_split([fine, coarse]) is fine  # 12 + 4 < 36 + 8
    with_rest, without = SplitFacts(6, 21, 2, True), SplitFacts(8, 16, 0, False)
    assert choose_split([with_rest, without]) is without  # 2 + 3 > 0 + 4
    assert choose_split([SplitFacts(8, 1, 0, False), coarse]) is coarse
    with pytest.raises(ConfigError, match="two groups"):
        choose_split([SplitFacts(8, 1, 0, False), SplitFacts(16, 0, 0, False)])


# ---- plans ----


def test_h200_with_the_remainder() -> None:
    plan = plan_groups(facts_of(H200), SplitFacts(8, 15, 12, remainder_joins=True))
    check_against_the_table(plan)
    # The smallest slot is 16: beside 120 for decode only the remainder of 12 would be left.
    assert (plan.compute_units, plan.unit_granularity, plan.min_units, plan.unused_units) == (132, 8, 16, 0)
    slots = slots_of(plan)
    assert slots[Lane.DECODE, 24].groups == (0, 1, 2)
    # 108 = 12 groups and the remainder.
    assert (slots[Lane.PREFILL, 108].groups, slots[Lane.PREFILL, 108].with_remainder) == (tuple(range(3, 15)), True)
    # 24 SMs as a cap: the last three groups; the remainder does not fit in.
    assert (slots[Lane.PREFILL, 24].groups, slots[Lane.PREFILL, 24].with_remainder) == ((12, 13, 14), False)
    assert "15 groups of 8 SMs, the remainder of 12 joins the prefill slots" in plan.describe()


def test_h200_without_the_remainder() -> None:
    plan = plan_groups(facts_of(H200), SplitFacts(8, 15, 12, remainder_joins=False))
    check_against_the_table(plan)
    assert (plan.compute_units, plan.min_units, plan.unused_units) == (132, 8, 12)
    table = build_partition_table(132, 8, 8, unused_units=12)
    assert {split.decode_units + split.prefill_units for split in table.splits} == {120}
    assert "the remainder of 12 stays unused" in plan.describe()


@pytest.mark.parametrize(
    ("gpu", "split"),
    [
        (A5000, SplitFacts(4, 16, 0, False)),
        (A100, SplitFacts(6, 18, 0, False)),
        (RTX4090, SplitFacts(8, 16, 0, False)),
        (RTX5090, SplitFacts(8, 21, 2, True)),
    ],
)
def test_devices_without_much_of_a_remainder(gpu: Gpu, split: SplitFacts) -> None:
    plan = plan_groups(facts_of(gpu), split)
    check_against_the_table(plan)
    assert plan.unused_units == 0
    assert len([spec for spec in plan.slots if spec.lane is Lane.DECODE]) >= 7


def test_a_remainder_of_whole_groups_is_no_ambiguity() -> None:
    # 8 * 15 + 8: 64 SMs are 8 groups, or 7 and the remainder. Only the latter is disjoint from the first 8 groups.
    facts = facts_of(H200, num_sms=128)
    plan = plan_groups(facts, SplitFacts(8, 15, 8, remainder_joins=True))
    check_against_the_table(plan)
    spec = slots_of(plan)[Lane.PREFILL, 64]
    assert (spec.groups, spec.with_remainder) == (tuple(range(8, 15)), True)


def test_pairs_of_the_same_device() -> None:
    plan = plan_pairs(facts_of(H200), structured_sms=120)
    check_against_the_table(plan)
    assert (plan.unit_granularity, plan.min_units, plan.unused_units) == (8, 16, 0)  # 132 - 120 = 12, up to 16
    # A cap that is no side of a pair is split off alone.
    assert slots_of(plan)[Lane.PREFILL, 24].pair == (24,)
    assert "pairs" in plan.describe()


def test_a_device_that_makes_one_slot_only_is_refused() -> None:
    with pytest.raises(ConfigError, match="do not make two slots"):
        # One group and the remainder are 20 SMs at least, so that no slot is smaller than 16.
        plan_groups(facts_of(H200, num_sms=28), SplitFacts(8, 2, 12, remainder_joins=True))
    with pytest.raises(ConfigError, match="do not make two slots"):
        plan_pairs(facts_of(H200, num_sms=22), structured_sms=8)  # 22 - 8 = 14, up to 16


@given(
    group=st.integers(1, 16),
    num_groups=st.integers(2, 40),
    remainder=st.integers(0, 40),
    joins=st.booleans(),
)
def test_complements_are_disjoint_whatever_the_driver_makes(
    group: int, num_groups: int, remainder: int, joins: bool
) -> None:
    facts = facts_of(H200, num_sms=group * num_groups + remainder, min_partition_sms=group, coscheduled_alignment=group)
    try:
        plan = plan_groups(facts, SplitFacts(group, num_groups, remainder, joins and remainder > 0))
    except ConfigError:
        # Two slots need two groups, and the one at the far end takes the remainder with it.
        assert num_groups < 2 + remainder // group
        return
    check_against_the_table(plan)


@given(data=st.data())
def test_pairs_cover_the_device_whatever_the_driver_makes(data: st.DataObject) -> None:
    alignment = data.draw(st.sampled_from([2, 4, 8]))
    smallest = alignment * data.draw(st.integers(1, 3))
    num_sms = 2 * data.draw(st.integers(smallest, 100))
    structured = alignment * data.draw(st.integers(num_sms // alignment // 2 + 1, num_sms // alignment + 1))
    structured = min(structured, num_sms // alignment * alignment)
    facts = facts_of(H200, num_sms=num_sms, min_partition_sms=smallest, coscheduled_alignment=alignment)
    try:
        plan = plan_pairs(facts, structured)
    except ConfigError:
        return  # too small
    check_against_the_table(plan)
    for spec in plan.slots:
        assert spec.units >= smallest and sum(spec.pair) <= num_sms
        assert spec.pair[0] % alignment == 0 and spec.pair[0] <= structured


# ---- the mode ----


def test_auto_takes_green_contexts_where_they_can_be_had() -> None:
    decision = decide_mode(SlotMode.AUTO, facts_of(H200))
    assert decision.mode is SlotMode.GREEN and "132 SMs" in decision.reason
    assert decide_mode(SlotMode.GREEN, facts_of(H200)).mode is SlotMode.GREEN


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"bindings_version": None}, "cuda-python is not installed"),
        ({"driver_version": None}, "cannot reach the driver"),
        ({"driver_version": 12020}, "the driver is of CUDA 12.2 and they need CUDA 12.4"),
        ({"bindings_version": 12030}, "cuda-python is of CUDA 12.3 and they need CUDA 12.4"),
        ({"min_partition_sms": None}, "does not say"),
        ({"num_sms": 14}, "14 SMs do not make two partitions of at least 8"),
    ],
)
def test_what_stands_in_the_way(values: dict[str, object], reason: str) -> None:
    facts = facts_of(H200, **values)
    decision = decide_mode(SlotMode.AUTO, facts)
    assert decision.mode is SlotMode.STREAM and reason in decision.reason
    with pytest.raises(ConfigError, match=r"Green Contexts cannot be made.*--slots stream"):
        decide_mode(SlotMode.GREEN, facts)
    # Nobody who did not ask for them is bothered.
    assert decide_mode(SlotMode.STREAM, facts).mode is SlotMode.STREAM
    assert decide_mode(SlotMode.OFF, facts).mode is SlotMode.OFF


@pytest.mark.parametrize("values", [{"mps": True}, {"mig": True}])
def test_what_only_auto_avoids(values: dict[str, object]) -> None:
    facts = facts_of(H200, **values)
    assert decide_mode(SlotMode.AUTO, facts).mode is SlotMode.STREAM
    assert decide_mode(SlotMode.GREEN, facts).mode is SlotMode.GREEN


def test_unequal_splits_need_driver_and_bindings() -> None:
    for driver, bindings in itertools.product((13000, 13010), (False, True)):
        facts = facts_of(H200, driver_version=driver, can_split_unequal=bindings)
        assert facts.splits_unequal == (driver == 13010 and bindings)
