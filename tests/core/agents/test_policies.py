"""Policies in a whole engine: they change what is kept and who is next, and nothing else."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentserve.config import ORDER_POLICIES, RETENTION_POLICIES, EngineConfig, resolve
from agentserve.core.agents.factory import POLICIES, PolicyContext
from agentserve.core.agents.policy import Action, Policy, TurnEvent
from agentserve.core.agents.registry import Session
from agentserve.core.batch import Batch
from agentserve.core.decision_log import describe
from agentserve.core.engine import EngineCore
from agentserve.core.events import EndRequest, Foresight, PolicyFailed
from agentserve.core.memory.eviction import Key
from agentserve.core.memory.radix import RadixNode
from agentserve.core.request import Request
from agentserve.errors import ConfigError
from agentserve.runtime.replay import build_core
from agentserve.runtime.virtual import VirtualDriver
from tests.core.builders import MS, finished, header, simulated, submit, virtual

SEATS = [{"policy": name} for name in RETENTION_POLICIES] + [{"order": name} for name in ORDER_POLICIES]
SEATS += [{"policy": "ttl", "order": "plas"}, {"policy": "lru", "protect_anchors": True}]


def sessions(driver: VirtualDriver, seed: int, *, num_sessions: int = 5, named: bool = True) -> VirtualDriver:
    """Conversations on one system prompt, with gaps, cancellations and side branches, in far too little memory."""
    source = random.Random(seed)
    for index in range(num_sessions):
        name = f"s{index}" if named else None
        history = [*range(10), *(1000 * (index + 1) + i for i in range(source.randrange(4, 16)))]
        at_ns = source.randrange(60) * MS
        num_turns = source.randrange(1, 5)
        for number in range(num_turns):
            request_id = f"{index}/{number}"
            driver.at(
                at_ns,
                submit(
                    request_id,
                    history[:60],
                    max_tokens=source.randrange(1, 8),
                    session_id=name,
                    agent_id="even" if named and index % 2 == 0 else None,
                    tool_name=source.choice(["sed", "pip", None]),
                    is_last_turn=source.choice([None, number == num_turns - 1]),
                    foresight=Foresight(source.randrange(10**9), 0, 10, 10),
                ),
            )
            if source.random() < 0.1:
                driver.at(at_ns + source.randrange(90) * MS, EndRequest(request_id))
            at_ns += source.randrange(1, 900) * MS
            if source.random() < 0.2:
                del history[-3:]
            history += [1000 * (index + 1) + 100 * (number + 1) + i for i in range(source.randrange(1, 9))]
    return driver


def run(driver: VirtualDriver) -> list[Any]:
    results = []
    while (result := driver.step()) is not None:
        driver.core.check_invariants()
        results.append(result)
    return results


@settings(max_examples=60)
@given(seat=st.sampled_from(SEATS), seed=st.integers(0, 10**6), named=st.booleans(), lookahead=st.sampled_from([1, 2]))
def test_whatever_the_policy_says_all_calls_end_and_nothing_is_lost(
    seat: dict[str, str], seed: int, named: bool, lookahead: int
) -> None:
    driver = sessions(
        virtual(num_blocks=24, max_model_len=96, max_num_seqs=3, decode_lookahead=lookahead, **seat), seed, named=named
    )
    results = run(driver)
    ended = finished(results)
    assert all(event.error is None for event in ended.values())
    assert not driver.core.has_unfinished
    assert driver.core.memory.num_available_blocks == 24
    assert not any(isinstance(event, PolicyFailed) for result in results for event in result.events)


def test_without_memory_between_turns_only_what_is_shared_is_found_again() -> None:
    hits = {}
    for policy in ("lru", "evict_always"):
        driver = virtual(num_blocks=64, policy=policy)
        history = list(range(24))
        driver.at(0, submit("a1", history, max_tokens=2, session_id="a"))
        driver.at(900 * MS, submit("a2", [*history, 1, 2], max_tokens=2, session_id="a"))
        run(driver)
        hits[policy] = driver.core.stats().num_prefix_hit_tokens
    assert hits == {"lru": 24, "evict_always": 0}


@pytest.mark.parametrize(
    ("num_busy_tokens", "expected"),
    [
        (20, ["old-1", "busy", "new", "old-2"]),  # old was served for about 90 ms, and waits for about 160 ms
        (60, ["old-1", "busy", "old-2", "new"]),  # it has waited for more than 4 * 90 ms
    ],
)
def test_the_program_that_was_served_least_goes_first_until_the_other_has_waited_long_enough(
    num_busy_tokens: int, expected: list[str]
) -> None:
    driver = virtual(max_num_seqs=1, order="plas")
    driver.at(0, submit("old-1", 8, max_tokens=10, session_id="old"))
    driver.at(1 * MS, submit("busy", 8, max_tokens=num_busy_tokens, session_id="busy"))
    driver.at(100 * MS, submit("old-2", 8, max_tokens=2, session_id="old"))
    driver.at(100 * MS, submit("new", 8, max_tokens=2, session_id="new"))
    results = run(driver)
    order = [line.split()[1] for result in results for line in describe(result) if line.startswith("admit")]
    assert order == expected
    assert list(finished(results)) == order


class Raises(Policy):
    """Works for a while, then raises in one of its hooks."""

    name = "lru"

    def __init__(self, hook: str, after: int) -> None:
        self._hook = hook
        self._left = after

    def _may_fail(self, hook: str) -> None:
        if hook == self._hook:
            self._left -= 1
            if self._left < 0:
                raise RuntimeError(f"broken {hook}")

    def observe(self, event: TurnEvent) -> None:
        self._may_fail("observe")

    def score(self, session: Session, now_ns: int) -> Key:
        self._may_fail("score")
        return (-session.last_used_ns,)

    def score_block(self, node: RadixNode) -> Key:
        self._may_fail("score_block")
        return (-node.last_access,)

    def order_key(self, session: Session, request: Request, now_ns: int) -> Key:
        self._may_fail("order_key")
        return (-request.sequence,)

    def act(self, now_ns: int) -> Iterable[Action]:
        self._may_fail("act")
        return ()

    def next_deadline_ns(self) -> int | None:
        self._may_fail("next_deadline_ns")
        return None


def broken(hook: str, after: int, **values: Any) -> VirtualDriver:
    def make(context: PolicyContext) -> Policy:
        del context
        return Raises(hook, after)

    engine: EngineCore = build_core(
        header(num_blocks=24, max_model_len=96, max_num_seqs=3, **values), {**POLICIES, "ttl": make, "plas": make}
    )
    return VirtualDriver(engine, simulated(24))


@pytest.mark.parametrize(
    ("hook", "after"),
    [
        *itertools.product(["observe", "score", "order_key", "act"], [0, 9]),
        # Also called by `check_invariants`, which cannot tell a changed key from a policy that raises.
        ("score_block", 0),
        ("next_deadline_ns", 0),
    ],
)
def test_a_policy_that_raises_loses_its_seat(hook: str, after: int) -> None:
    driver = sessions(broken(hook, after, policy="ttl", order="plas"), seed=4)
    results = run(driver)
    assert all(event.error is None for event in finished(results).values())
    failed = [event for result in results for event in result.events if isinstance(event, PolicyFailed)]
    assert {event.error for event in failed} == {f"RuntimeError: broken {hook}"}
    policies = driver.core.stats().policies
    assert policies is not None and set(policies.failures) <= {"ttl", "plas"}
    assert set(policies.failures.values()) == {f"RuntimeError: broken {hook}"}


def test_from_then_on_it_is_lru_and_fcfs() -> None:
    logs = []
    for driver in (
        sessions(broken("observe", 0, policy="ttl"), seed=4),
        sessions(virtual(num_blocks=24, max_model_len=96, max_num_seqs=3), seed=4),
    ):
        lines = [line for result in run(driver) for line in describe(result)]
        logs.append([line for line in lines if not line.startswith("policy")])
    assert logs[0] == logs[1]


def test_oracles_are_refused_where_nobody_knows_the_future() -> None:
    for option, name in (("policy", "belady"), ("order", "srpt")):
        with pytest.raises(ConfigError, match=f"{name} knows the future: only `agentserve simulate` can run it"):
            resolve({option: name}, {}, {})
    assert resolve({"policy": "ttl"}, {}, {}).config.policy == "ttl"


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="continuum has an order of its own"):
        EngineConfig(num_blocks=8, max_model_len=8, policy="continuum", order="plas")
    with pytest.raises(ConfigError, match="policy must be one of"):
        EngineConfig(num_blocks=8, max_model_len=8, policy="mru")
    with pytest.raises(ConfigError, match="no policy 'ttl'"):
        build_core(header(policy="ttl"), {})


def test_batches_are_plain_data_whatever_the_policy() -> None:
    results = run(sessions(virtual(num_blocks=24, max_model_len=96, policy="continuum"), seed=1))
    assert all(isinstance(batch, Batch) for result in results for batch in result.batches)
