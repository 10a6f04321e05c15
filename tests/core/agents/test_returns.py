"""How soon agents come back, against sums done by hand."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from random import Random

import pytest

from agentserve.core.agents import returns
from agentserve.core.agents.returns import BACK_OFF, Progress, Returns


def done(work: Iterator[None]) -> None:
    """To its end."""
    deque(work, maxlen=0)


def played(made: Returns, agents: Sequence[str], *, ends: bool = False) -> Progress:
    """One task with these calls."""
    progress = Progress()
    for agent in agents:
        done(made.called(progress, agent))
        done(progress.refresh())
        assert all(0.0 < index <= 1.0 for index in progress.indices.values())
    if ends:
        done(made.ended(progress))
    return progress


def test_who_comes_in_n_calls_for_sure_is_worth_one_nth() -> None:
    made = Returns()
    assert dict(played(made, "a").indices) == {}
    progress = played(made, "abcabcabc")
    assert dict(progress.indices) == {"a": 1.0, "b": 1 / 2, "c": 1 / 3}


def test_the_agent_before_tells_what_the_last_one_does_not() -> None:
    made = Returns()
    for _ in range(30):
        played(made, "sxsysx")
    # After x s always comes y, after y s always x; after s alone both are as likely.
    assert played(made, "sxs").indices["y"] == pytest.approx(1.0, abs=0.1)
    assert played(made, "sxsys").indices["x"] == pytest.approx(1.0, abs=0.1)


def test_tasks_that_end_make_a_return_less_likely() -> None:
    made = Returns()
    played(made, "ab")
    for _ in range(3):
        played(made, "a", ends=True)
    # b came after one of four calls of a: P(T <= 1) = 1/4 whether one agent before is known or none, for one call.
    assert played(made, "a").indices == {"b": pytest.approx(1 / 4)}


def test_the_best_time_to_give_up_counts() -> None:
    made = Returns()
    for route in ("ab", "axxxxb", "axxxxb", "axxxxb"):
        played(made, route, ends=True)
    # By one call 1/4 for 1, by five calls 1 for 1 + 4 * 3/4: both 1/4. With one more that never comes back: 1/5 for 1,
    # and 4/5 for 1 + 4 * 4/5 = 4.2 calls, which is less.
    assert played(made, "a").indices["b"] == pytest.approx(1 / 4)
    played(made, "a", ends=True)
    assert played(made, "a").indices["b"] == pytest.approx(1 / 5)


def test_two_agents_are_backed_off_to_one() -> None:
    made = Returns()
    for route in ("qab", "qab", "rac", "rac", "rac"):
        played(made, route, ends=True)
    # After q a: b twice of two. After a: b twice of five, which counts like two observations.
    assert played(made, "qa").indices["b"] == pytest.approx((2 + BACK_OFF * 2 / 5) / (2 + BACK_OFF))
    played(made, "sac", ends=True)
    # What was met once tells nothing: after a b came twice of six.
    assert played(made, "sa").indices["b"] == pytest.approx(2 / 6)


def test_all_is_bounded_and_what_is_new_counts_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(returns, "MAX_CONTEXTS", 50)
    monkeypatch.setattr(returns, "_MAX_COUNT", 32.0)
    made, random = Returns(), Random(1)
    for _ in range(200):
        played(made, [f"{int(random.expovariate(0.1))}" for _ in range(20)], ends=True)
    assert len(made._contexts) == 50
    assert all(len(context.num_seen) <= returns.MAX_TARGETS for context in made._contexts.values())
    for _ in range(200):
        played(made, "pq")
    for _ in range(200):
        played(made, "pr")
    indices = played(made, "p").indices
    assert indices["r"] > 0.8 and indices.get("q", 0.0) < 0.2
