"""What policies learn of a turn once its answer was read."""

from __future__ import annotations

from agentserve.core.agents.registry import GapStatistics
from agentserve.core.events import HUMAN, NoteTurn
from agentserve.runtime.virtual import VirtualDriver
from tests.core.builders import MS, submit, virtual


def run(driver: VirtualDriver) -> None:
    while driver.step() is not None:
        driver.core.check_invariants()


def gaps_of(driver: VirtualDriver, tool_name: str) -> list[int]:
    found = driver.core.agents.registry.gaps.of(tool_name, 1)
    return [] if found is None else [round(gap / (100 * MS)) for gap in found.ascending]


def test_a_gap_is_that_of_the_tool_that_was_noted() -> None:
    """The calls take less than 50 ms: the gaps are about 500, 1000 and 1500 ms."""
    driver = virtual()
    for index, at_ms in enumerate((0, 500, 1500, 3000)):
        driver.at(at_ms * MS, submit(str(index), 8, session_id="s"))
    driver.at(400 * MS, NoteTurn("0", "grep"))
    driver.at(900 * MS, NoteTurn("1", HUMAN))
    driver.at(1900 * MS, NoteTurn("2", "grep"))
    run(driver)
    assert (gaps_of(driver, "grep"), gaps_of(driver, HUMAN)) == ([5, 15], [10])
    # What people take tells nothing about a tool that nobody has seen.
    assert gaps_of(driver, "sed") == [5, 15]


def test_people_are_a_class_of_their_own() -> None:
    gaps = GapStatistics()
    gaps.add("sed", 1)
    assert gaps.of(HUMAN, 1) is None
    gaps.add(HUMAN, 60)
    found, overall = gaps.of(HUMAN, 1), gaps.of("sed", 2)
    assert found is not None and found.ascending == [60]
    assert overall is None


def test_a_note_that_comes_too_late_is_ignored() -> None:
    driver = virtual()
    driver.at(0, submit("a", 8, session_id="s"))
    driver.at(0, NoteTurn("nobody", "grep"))
    driver.at(500 * MS, submit("b", 8, session_id="s"))
    driver.at(501 * MS, NoteTurn("a", "grep"))
    driver.at(900 * MS, NoteTurn("a", "grep"))
    run(driver)
    assert driver.core.agents.registry.sessions["s"].tool_name is None


def test_of_several_choices_any_one_stands_for_the_turn() -> None:
    """They are calls of one session; which of them ends last, nobody outside knows."""
    driver = virtual()
    driver.at(0, submit("x-0", range(8), session_id="s", max_tokens=9))
    driver.at(0, submit("x-1", range(8), session_id="s", max_tokens=2))
    driver.at(400 * MS, NoteTurn("x-1", "grep"))
    run(driver)
    assert driver.core.agents.registry.sessions["s"].tool_name == "grep"


def test_ttl_pins_for_the_tool_that_was_noted() -> None:
    """As long as nobody knows the tool, two seconds. A tool whose gaps are all a minute is not worth a pin, for a
    prompt of 8 tokens; one that takes 200 ms is. A person, of whom nothing is known, gets the two seconds again."""
    driver = virtual(policy="ttl")
    registry = driver.core.agents.registry
    for _ in range(8):
        registry.gaps.add("slow", 60_000 * MS)
        registry.gaps.add("quick", 20 * MS)
    driver.at(0, submit("a", 8, session_id="s", tool_name="slow"))
    run(driver)
    session = registry.sessions["s"]
    assert session.idle_since_ns is not None and session.pinned_until_ns is None

    def pin_ms_after(tool_name: str) -> int | None:
        driver.at(driver.clock.now_ns(), NoteTurn("a", tool_name))
        driver.step()
        driver.core.check_invariants()
        assert session.idle_since_ns is not None
        return None if session.pinned_until_ns is None else (session.pinned_until_ns - session.idle_since_ns) // MS

    assert [pin_ms_after(tool) for tool in (HUMAN, "slow", "quick", HUMAN, "slow")] == [2000, None, None, 2000, None]
