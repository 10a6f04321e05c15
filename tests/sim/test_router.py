"""Routing policies: where calls go, by hand and against a naive model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentserve.errors import ConfigError
from agentserve.sim.router import Loads, Placement, Reason, build_router


def router(name: str, overload: str = "wait", overload_calls: int = 2):
    return build_router(name, overload=overload, overload_calls=overload_calls)


def loads_of(*num_calls: int) -> Loads:
    """So many calls of 10 tokens at each instance."""
    loads = Loads(len(num_calls))
    for instance, count in enumerate(num_calls):
        for _ in range(count):
            loads.sent(instance, 10)
    return loads


@given(
    st.integers(1, 5),
    st.lists(st.tuples(st.booleans(), st.integers(0, 4), st.integers(1, 100)), max_size=300),
)
def test_the_least_loaded_is_that_of_a_search(num_instances: int, changes: list[tuple[bool, int, int]]) -> None:
    loads = Loads(num_instances)
    in_flight: list[list[int]] = [[] for _ in range(num_instances)]
    for is_sent, at, num_tokens in changes:
        instance = at % num_instances
        if is_sent:
            loads.sent(instance, num_tokens)
            in_flight[instance].append(num_tokens)
        elif in_flight[instance]:
            loads.ended(instance, in_flight[instance].pop())
        expected = min(range(num_instances), key=lambda i: (len(in_flight[i]), sum(in_flight[i]), i))
        assert loads.least_loaded() == expected
        assert loads.num_calls(instance) == len(in_flight[instance])


def test_round_robin_counts_calls_not_sessions() -> None:
    one, loads = router("round_robin"), loads_of(0, 5, 0)
    assert [one.route(session, loads).instance for session in "aabca"] == [0, 1, 2, 0, 1]


def test_least_loaded_counts_calls_then_tokens_then_numbers() -> None:
    one, loads = router("least_loaded"), Loads(3)
    assert one.route("a", loads) == Placement(0, Reason.LEAST_LOADED)
    loads.sent(0, 1)
    assert one.route("a", loads).instance == 1
    loads.sent(1, 500)
    loads.sent(2, 400)
    assert one.route("a", loads).instance == 0  # one call each: 1, 500 and 400 tokens
    loads.sent(0, 1)
    assert one.route("a", loads).instance == 2


@pytest.mark.parametrize(
    ("overload", "expected"),
    [
        ("wait", Placement(0, Reason.WAIT)),
        ("re-prefill", Placement(1, Reason.RE_PREFILL)),
        ("move", Placement(1, Reason.MOVE, source=0)),
    ],
)
def test_affinity_and_an_overloaded_home(overload: str, expected: Placement) -> None:
    one = router("session_affinity", overload)
    assert one.route("a", loads_of(0, 0)) == Placement(0, Reason.NEW_SESSION)
    assert one.route("a", loads_of(1, 0)) == Placement(0, Reason.HOME)
    # Everybody is overloaded: going away would help nobody.
    assert one.route("a", loads_of(2, 2)) == Placement(0, Reason.HOME)
    assert one.route("a", loads_of(2, 1)) == expected
    # Where it went is its home from now on.
    assert one.route("a", loads_of(1, 1)) == Placement(expected.instance, Reason.HOME)


def test_new_sessions_go_to_the_least_loaded() -> None:
    one = router("session_affinity")
    assert [one.route(session, loads_of(1, 0, 2)).instance for session in ("a", "b")] == [1, 1]


def test_wrong_names_and_numbers_are_refused() -> None:
    with pytest.raises(ConfigError, match="router must be one of round_robin, least_loaded, session_affinity"):
        router("random")
    with pytest.raises(ConfigError, match="overload must be one of wait, re-prefill, move"):
        router("session_affinity", "panic")
    with pytest.raises(ConfigError, match="overload_calls must be at least 1"):
        router("session_affinity", overload_calls=0)
