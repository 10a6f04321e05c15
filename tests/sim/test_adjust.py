"""Traces made to fit one machine."""

from __future__ import annotations

import pytest

from agentserve.errors import WorkloadError
from agentserve.sim.adjust import stretched, without_long_programs
from agentserve.sim.programs import Program, Turn, Workload

LONG = Program("long", (Turn(90, 11),), arrival_ms=10.0)
SHORT = Program("short", (Turn(9, 1, 5.0), Turn(3, 1, arrival_ms=40.0)), arrival_ms=20.0)
LATE = Program("late", (Turn(9, 1),), depends_on=("long", "short"), dependency_gaps_ms=(7.0, 8.0))


def test_arrivals_are_stretched_and_gaps_are_not() -> None:
    found = stretched(Workload("w", (LONG, SHORT, LATE), None, description="d"), 2.5)
    assert [p.arrival_ms for p in found.programs] == [25.0, 50.0, None]
    assert found.programs[1].turns == (Turn(9, 1, 5.0), Turn(3, 1, arrival_ms=100.0))
    assert found.programs[2] == LATE
    assert found.description == "d; arrival times x 2.5"
    with pytest.raises(WorkloadError, match="stretch: expected a positive number, not 0"):
        stretched(found, 0)
    with pytest.raises(WorkloadError, match="is a closed loop and has no arrival times"):
        stretched(Workload("w", (Program("a", (Turn(1, 1),)),), 1), 2.0)


def test_programs_beyond_the_window_are_left_out_and_counted() -> None:
    workload = Workload("w", (LONG, SHORT, LATE), None, notes=("before",))
    found = without_long_programs(workload, 100)
    assert [p.program_id for p in found.programs] == ["short", "late"]
    assert (found.programs[1].depends_on, found.programs[1].dependency_gaps_ms) == (("short",), (8.0,))
    assert found.notes == ("before", "1 programs need more than 100 tokens and are left out")
    assert without_long_programs(workload, 101) is workload
    with pytest.raises(WorkloadError, match="no program fits a window of 5 tokens"):
        without_long_programs(workload, 5)
