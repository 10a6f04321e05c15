"""Calls that are held back although there is memory: who goes on when, that nobody starves and nothing is lost."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentserve.config import EngineConfig
from agentserve.core.agents.factory import POLICIES, Seats
from agentserve.core.agents.policies.working_set import AWAY_NS, PATIENCE_NS
from agentserve.core.agents.policy import Action, Admit, Policy, Reprioritize
from agentserve.core.agents.registry import AgentRegistry, Session
from agentserve.core.engine import EngineCore
from agentserve.core.events import HUMAN, EndRequest, NoteTurn, PolicyFailed, RequestAdmitted
from agentserve.core.request import FinishReason, Request
from agentserve.core.slots import build_partition_table
from agentserve.errors import ConfigError
from agentserve.runtime.replay import build_core
from agentserve.runtime.virtual import VirtualDriver
from tests.core.builders import MS, config, finished, header, simulated, submit, virtual


class OneAtATime(Policy):
    """Lets one call run at a time, the last one to come first. It names no deadline."""

    def __init__(self) -> None:
        self.waiting: list[str] = []
        self.running: set[str] = set()

    def holds(self, session: Session, request: Request, now_ns: int) -> bool:
        if not self.running:
            self.running.add(request.request_id)
            return False
        self.waiting.append(request.request_id)
        return True

    def observe(self, event: Any) -> None:
        if event.kind == "finished":
            self.running.discard(event.request.request_id)
            if event.request.request_id in self.waiting:
                self.waiting.remove(event.request.request_id)

    def act(self, now_ns: int) -> Iterable[Action]:
        if self.waiting and not self.running:
            request_id = self.waiting.pop()
            self.running.add(request_id)
            yield Admit(request_id)


class Forgetful(Policy):
    """Holds everything and never says any more of it."""

    def holds(self, session: Session, request: Request, now_ns: int) -> bool:
        return True


class Broken(Policy):
    """Holds everything, and raises once something runs."""

    def holds(self, session: Session, request: Request, now_ns: int) -> bool:
        return request.request_id != "a"

    def act(self, now_ns: int) -> Iterable[Action]:
        if now_ns >= 20 * MS:
            raise LookupError("lost")
        return ()


class Shuffling(OneAtATime):
    """Moves a held call in the queue that it is going to be in."""

    def act(self, now_ns: int) -> Iterable[Action]:
        yield from [Reprioritize(request_id, (-1.0,)) for request_id in self.waiting]
        yield from super().act(now_ns)


def driver_of(policy: Policy, **values: Any) -> VirtualDriver:
    engine_config: EngineConfig = config(**values)
    table = build_partition_table(8, 1, 1)
    core = EngineCore(
        engine_config,
        table,
        build_core(header())._scheduler._controller,
        seats=Seats(AgentRegistry(), admission=policy),
    )
    return VirtualDriver(core, simulated(engine_config.num_blocks, engine_config.block_size))


def run(driver: VirtualDriver) -> list[Any]:
    results = []
    while (result := driver.step()) is not None:
        driver.core.check_invariants()
        results.append(result)
    assert not driver.core.has_unfinished
    return results


def admissions(results: Iterable[Any]) -> list[str]:
    """Requests in the order in which they were admitted."""
    return [e.request_id for result in results for e in result.events if isinstance(e, RequestAdmitted)]


@pytest.mark.parametrize("policy", [OneAtATime(), Shuffling()])
def test_a_policy_says_who_goes_on_and_when(policy: Policy) -> None:
    driver = driver_of(policy)
    for name in "abcd":
        driver.at(0, submit(name, 8))
    results = run(driver)
    assert admissions(results) == ["a", "d", "c", "b"]
    assert {event.reason for event in finished(results).values()} == {FinishReason.LENGTH}


def test_a_held_call_counts_as_waiting_and_can_be_cancelled() -> None:
    driver = driver_of(OneAtATime())
    for name in "abc":
        driver.at(0, submit(name, 8))
    driver.at(1, EndRequest("c"))
    driver.step()
    assert (driver.core.stats().num_running, driver.core.stats().num_waiting) == (1, 2)
    results = run(driver)
    assert finished(results)["c"].reason is FinishReason.CANCELLED
    assert admissions(results) == ["b"]


def test_a_prompt_that_is_too_long_is_refused_at_once_and_not_held() -> None:
    driver = driver_of(OneAtATime())
    driver.at(0, submit("a", 8))
    driver.at(0, submit("long", 300))
    first = driver.step()
    assert first is not None and finished([first])["long"].reason is FinishReason.ERROR
    run(driver)


def test_a_policy_that_forgets_its_calls_holds_nobody_for_ever() -> None:
    """With nothing else to do and no deadline the first one goes on, then the next."""
    driver = driver_of(Forgetful())
    for name in "abc":
        driver.at(0, submit(name, 8))
    assert admissions(run(driver)) == ["a", "b", "c"]


def test_a_policy_that_raises_holds_nobody_any_more() -> None:
    driver = driver_of(Broken())
    for name in "abc":
        driver.at(0, submit(name, 8))
    results = run(driver)
    failures = [e for result in results for e in result.events if isinstance(e, PolicyFailed)]
    assert [(failure.error, failure.policy) for failure in failures] == [("LookupError: lost", "none")]
    assert admissions(results) == ["a", "b", "c"]


# ---- working sets ----

ROOM: dict[str, Any] = {"num_blocks": 16, "max_model_len": 64, "admission": "working_set"}
"""64 tokens, or 96 while nothing runs. As long as no program has ended, a first prompt of 36 tokens counts as 54: two
such programs never fit. One of 28 counts as 42: two fit while nothing runs."""


def program(driver: VirtualDriver, name: str, at_ns: int, *, first: int = 36, num_turns: int = 2) -> None:
    """Calls of `first` tokens, then 4 more each, that come 600 ms after each other; each takes less than 100 ms."""
    base = 1000 * (1 + sum(name.encode()))
    for index in range(num_turns):
        prompt = range(base, base + first + 4 * index)
        is_last = index + 1 == num_turns
        driver.at(at_ns, submit(f"{name}{index}", prompt, session_id=name, is_last_turn=is_last))
        at_ns += 600 * MS


def times(results: Iterable[Any]) -> dict[str, int]:
    """When requests were admitted, in milliseconds."""
    return {e.request_id: e.at_ns // MS for result in results for e in result.events if isinstance(e, RequestAdmitted)}


def test_a_new_program_waits_for_the_end_of_another_and_not_for_that_of_its_call() -> None:
    driver = virtual(**ROOM)
    for name in "abc":
        program(driver, name, 0, num_turns=3)
    results = run(driver)
    assert admissions(results)[:4] == ["a0", "a1", "a2", "b0"]
    # The later calls of b came long ago: a program is let in as a whole.
    assert sorted(admissions(results)[4:6]) == ["b1", "b2"]
    stats = driver.core.stats()
    assert stats.policies is not None and stats.policies.counts["calls_held"] == 6
    free = virtual(**{**ROOM, "admission": "none"})
    for name in "abc":
        program(free, name, 0, num_turns=3)
    assert admissions(run(free))[:2] == ["a0", "b0"]


def test_while_nothing_runs_half_as_much_again_fits() -> None:
    driver = virtual(**ROOM)
    program(driver, "a", 0, first=28)
    program(driver, "b", 0, first=28)
    driver.at(0, submit("c", 36, is_last_turn=True))
    admitted = times(run(driver))
    # b goes on when the first call of a has ended, c not before both of them have: 42 + 42 + 54 > 96
    assert 0 < admitted["b0"] < 100
    assert admitted["c"] >= 600


def test_priorities_go_before_arrivals() -> None:
    driver = virtual(**ROOM)
    program(driver, "a", 0, num_turns=1)
    driver.at(1, submit("late", 36, priority=1, is_last_turn=True))
    driver.at(2, submit("early", 36, priority=0, is_last_turn=True))
    assert admissions(run(driver)) == ["a0", "early", "late"]


@pytest.mark.parametrize(("note", "expected_ms"), [(NoteTurn("a", HUMAN), 500), (None, AWAY_NS // MS)])
def test_a_program_has_ended_when_a_person_is_asked_or_it_stays_away(note: NoteTurn | None, expected_ms: int) -> None:
    driver = virtual(**ROOM)
    driver.at(0, submit("a", 36))
    driver.at(150 * MS, submit("b", 36))
    if note is not None:
        driver.at(500 * MS, note)
    assert expected_ms <= times(run(driver))["b"] <= expected_ms + 100


def test_nobody_waits_for_ever() -> None:
    """A program that never ends and always calls: the others are let in without room, one each time of patience."""
    driver = virtual(**ROOM)
    for index in range(900):
        driver.at(index * 80 * MS, submit(f"a{index}", 36, session_id="a"))
    driver.at(1, submit("b", 36, session_id="b"))
    driver.at(2, submit("c", 36, session_id="c"))
    admitted, patience_ms = times(run(driver)), PATIENCE_NS // MS
    assert patience_ms <= admitted["b"] <= patience_ms + 500
    assert 2 * patience_ms <= admitted["c"] <= 2 * patience_ms + 1000


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), policy=st.sampled_from(["lru", "ttl"]), order=st.sampled_from(["default", "plas"]))
def test_whoever_is_held_ends_and_nothing_is_lost(seed: int, policy: str, order: str) -> None:
    source = random.Random(seed)
    tight: dict[str, Any] = {"num_blocks": 24, "max_model_len": 96, "max_num_seqs": 3}
    driver = virtual(**tight, admission="working_set", policy=policy, order=order)
    for index in range(8):
        history = [*range(8), *(1000 * (index + 1) + i for i in range(source.randrange(4, 16)))]
        at_ns = source.randrange(60) * MS
        for number in range(num_turns := source.randrange(1, 5)):
            request_id = f"{index}/{number}"
            is_last = source.choice([None, number == num_turns - 1])
            session, program = source.choice([(f"s{index}", None), (f"s{index}", f"p{index // 2}")])
            driver.at(
                at_ns,
                submit(
                    request_id,
                    history[:60],
                    max_tokens=source.randrange(1, 8),
                    session_id=session,
                    program_id=program,
                    is_last_turn=is_last,
                ),
            )
            if source.random() < 0.2:
                driver.at(at_ns + source.randrange(90) * MS, EndRequest(request_id))
            at_ns += source.randrange(1, 900) * MS
            if source.random() < 0.7:
                driver.at(at_ns - 1, NoteTurn(request_id, source.choice([HUMAN, "sed", "pip"])))
            history += [1000 * (index + 1) + 100 * (number + 1) + i for i in range(source.randrange(1, 9))]
    results = run(driver)
    assert all(event.error is None for event in finished(results).values())
    assert not any(isinstance(event, PolicyFailed) for result in results for event in result.events)
    assert driver.core.memory.num_available_blocks == 24


def test_of_a_cancelled_call_nothing_is_left() -> None:
    """Neither its place nor what would have been kept for it."""
    driver = virtual(**ROOM)
    program(driver, "a", 0)
    driver.at(1, submit("b0", 36, session_id="b", is_last_turn=True))
    driver.at(2, EndRequest("b0"))
    driver.at(3, submit("c0", 36, session_id="c", is_last_turn=True))
    driver.at(4, submit("b1", 36, session_id="b", is_last_turn=True))
    assert admissions(run(driver)) == ["a0", "a1", "c0", "b1"]


def test_only_policies_that_there_are() -> None:
    with pytest.raises(ConfigError, match="admission must be one of none, working_set"):
        config(admission="first")
    assert "working_set" in POLICIES
