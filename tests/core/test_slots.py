"""The partition table of devices that do not hand out all of their units."""

from __future__ import annotations

import pytest

from agentserve.core.slots import PartitionKind, build_partition_table
from agentserve.errors import ConfigError


def test_what_a_split_cannot_use_is_in_neither_side_but_in_the_whole() -> None:
    table = build_partition_table(132, 8, 8, unused_units=12)
    assert (table.whole.decode_units, table.stream.prefill_units) == (132, 132)
    # 13.2 -> 16, 26.4 -> 24, 39.6 -> 40, 52.8 -> 56, 66 -> 64, 79.2 -> 80, 92.4 -> 96, 105.6 -> 104 or 112;
    # 118.8 -> 120 would leave nothing of the 120 that can be split.
    assert [split.decode_units for split in table.splits] == [16, 24, 40, 56, 64, 80, 96, 104]
    assert [split.prefill_units for split in table.splits] == [104, 96, 80, 64, 56, 40, 24, 16]
    assert all(cap.decode_units == 132 and cap.kind is PartitionKind.CAP for cap in table.caps)


@pytest.mark.parametrize("shape", [(64, 2, 4), (132, 8, 8), (2, 1, 1), (16, 1, 1)])
def test_without_such_units_nothing_changes(shape: tuple[int, int, int]) -> None:
    table = build_partition_table(*shape)
    assert table == build_partition_table(*shape, unused_units=0)
    assert all(split.decode_units + split.prefill_units == shape[0] for split in table.splits)


@pytest.mark.parametrize("unused", [-1, 16, 17])
def test_impossible_numbers_are_refused(unused: int) -> None:
    with pytest.raises(ConfigError, match="unused units"):
        build_partition_table(16, 1, 1, unused_units=unused)


def test_too_little_left_to_split_makes_no_splits() -> None:
    table = build_partition_table(20, 8, 8, unused_units=12)
    assert table.splits == () == table.caps
