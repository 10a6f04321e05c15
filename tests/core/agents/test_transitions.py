"""What the counts of transitions say, against sums done by hand, and what the policy makes of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from random import Random

import pytest

from agentserve.config import TierConfig, TieringConfig
from agentserve.core.agents import transitions
from agentserve.core.agents.fingerprint import NUM_TOKENS, fingerprint
from agentserve.core.agents.transitions import Transitions
from agentserve.core.events import RequestFinished, TokenGenerated
from agentserve.runtime.virtual import VirtualDriver
from tests.core.builders import submit, virtual


def seen(*pairs: str) -> Transitions:
    made = Transitions()
    for pair in pairs:
        made.add(pair[0], pair[1])
    return made


def test_the_most_likely_agent() -> None:
    made = seen("ac", "ab", "ab", "aa", "aa", "aa")
    assert (made.next_agent("a"), made.next_agent("z")) == ("b", None)


def test_a_fixed_order_tells_everything_and_a_random_one_nothing() -> None:
    assert seen(*["ab", "bc", "ca"] * 4).entropy_reduction == pytest.approx(1.0)
    # From each of two agents to each of two: H(next) = ln 2, and H(next | current) is the same.
    assert seen("ac", "ad", "bc", "bd").entropy_reduction == pytest.approx(0.0, abs=1e-9)
    # a -> c three times and d once, b -> d: H(next) = -(3 ln .6 + 2 ln .4) / 5, given a: -(3 ln .75 + ln .25) / 4.
    marginal = -(3 * math.log(0.6) + 2 * math.log(0.4)) / 5
    conditional = 4 / 5 * -(3 * math.log(0.75) + math.log(0.25)) / 4
    assert seen("ac", "ac", "ac", "ad", "bd").entropy_reduction == pytest.approx(1 - conditional / marginal)


def test_the_sums_are_those_of_the_counts_and_all_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transitions, "MAX_AGENTS", 5)
    monkeypatch.setattr(transitions, "MAX_SUCCESSORS", 4)
    monkeypatch.setattr(transitions, "_MAX_ROW_COUNT", 40)
    made, random = Transitions(), Random(3)
    for _ in range(2000):
        made.add(f"{int(random.expovariate(0.3))}", f"{int(random.expovariate(0.3))}")
        assert len(made._rows) <= 5 and all(len(row) <= 5 for row in made._rows.values())
    rows = made._rows
    columns = sum((Counter(row) for row in rows.values()), Counter[str]())
    num = sum(columns.values())
    marginal = -sum(n / num * math.log(n / num) for n in columns.values())
    conditional = -sum(n / num * math.log(n / sum(row.values())) for row in rows.values() for n in row.values())
    assert made.entropy_reduction == pytest.approx(max(0.0, 1 - conditional / marginal))
    assert made._columns == columns


def test_fingerprints_are_of_the_beginning() -> None:
    anchor = list(range(NUM_TOKENS))
    assert fingerprint(anchor) == fingerprint([*anchor, 5, 6]) != fingerprint([1, *anchor])
    assert fingerprint(anchor[:-1]) is None


def calls(*plan: tuple[str, str, str], **values: object) -> list[int]:
    """One after the other; returns for each how many of its tokens were cached. A plan: task, agent, own
    tokens; a task ends with the call whose own tokens are z."""
    return played(plan, **values)[0]


def prefetched(plan: Sequence[tuple[str, str, str]], tiering: TieringConfig, **values: object) -> int:
    """How many blocks were loaded before they were asked for."""
    policies = played(plan, tiering=tiering, **values)[1].core.stats().policies
    assert policies is not None and not policies.failures
    return policies.counts["blocks_prefetched"]


def played(plan: Sequence[tuple[str, str, str]], **values: object) -> tuple[list[int], VirtualDriver]:
    driver = virtual(**{"num_blocks": 24, "max_model_len": 96, "policy": "transition", **values})
    found = []
    for index, (task, agent, own) in enumerate(plan):
        anchor = [50 + sum(map(ord, agent))] * 16
        prompt = [*anchor, *([ord(own)] * 16)]
        names = {"session_id": f"{task}/{agent}", "program_id": task, "agent_id": agent}
        command = submit(f"r{index}", prompt, max_tokens=1, is_last_turn=own == "z", **names)
        driver.at(driver.clock.now_ns(), command)
        for result in driver.run():
            driver.core.check_invariants()
            found += [e.stats.num_cached_tokens for e in result.events if isinstance(e, RequestFinished)]
    return found, driver


def test_anchors_outlive_private_history() -> None:
    # 24 blocks of 4 tokens: an anchor is 4 of them, a history 4. The anchor of A is shared once two tasks have used it.
    plan = [("t1", "A", "a"), ("t2", "A", "b"), *[(f"u{i}", f"{i}", "c") for i in range(5)], ("t3", "A", "d")]
    assert calls(*plan)[-1] == 16
    assert calls(*plan, protect_anchors=False)[-1] == 0


def test_what_is_expected_next_stays() -> None:
    # P and Q take turns. Task t is at P, so its history with Q is one call away; that of s, which is at Q, was used
    # later, but is two calls away. Anchors take 8 of 24 blocks, histories 4 each: l and t fill the rest, s, u and v
    # evict three of four.
    learn = [("l", "P", "l"), ("l", "Q", "l"), ("l", "P", "l"), ("l", "Q", "l")]
    plan = [
        *learn,
        ("t", "Q", "t"),
        ("t", "P", "t"),
        ("s", "Q", "s"),
        ("u", "P", "u"),
        ("v", "P", "v"),
        ("t", "Q", "t"),
    ]
    assert calls(*plan)[-1] == 28  # all whole blocks but the last one
    assert calls(*plan, prediction=False)[-1] == 16  # the anchor


def test_the_history_of_a_task_that_has_ended_goes_first() -> None:
    # Each call needs 8 of 24 blocks. The task of B is the oldest, but that of A has ended.
    plan = [("b", "B", "b"), ("a", "A", "z"), ("c", "C", "c"), ("d", "D", "d"), ("b", "B", "b")]
    assert calls(*plan)[-1] == calls(*plan, prediction=False)[-1] == 28
    assert calls(*plan, policy="lru")[-1] == 0


@pytest.mark.parametrize("prediction", [True, False])
def test_what_a_call_needs_that_waits_stays(prediction: bool) -> None:
    # The histories of x and z take 16 of 24 blocks. One call runs at a time: w takes the rest, and v, before x in the
    # queue, takes the place of z although x was used before it.
    _, driver = played([("x", "X", "x"), ("z", "Z", "y")], prediction=prediction, max_num_seqs=1)
    for index, name in enumerate("WVX"):
        prompt = [50 + ord(name)] * 16 + [ord(name.lower())] * 16
        names = {"session_id": f"{name.lower()}/{name}", "program_id": name.lower(), "agent_id": name}
        driver.at(driver.clock.now_ns(), submit(f"s{index}", prompt, max_tokens=1, **names))
    events = [event for result in driver.run() for event in result.events]
    cached = [event.stats.num_cached_tokens for event in events if isinstance(event, RequestFinished)]
    assert cached == [0, 0, 28]


def test_answers_that_do_not_come_back_go_first() -> None:
    def num_superseded(*, come_back: bool) -> int:
        driver = virtual(num_blocks=64, max_model_len=256, policy="transition")
        prompt = [5] * 16
        for index in range(10):
            driver.at(driver.clock.now_ns(), submit(f"r{index}", prompt, max_tokens=9, session_id="s", agent_id="a"))
            events = [event for result in driver.run() for event in result.events]
            driver.core.check_invariants()
            answer = [event.sample.token_id for event in events if isinstance(event, TokenGenerated)]
            prompt = [*prompt, *(answer if come_back else [6] * 12), *[7] * 8]
        policies = driver.core.stats().policies
        assert policies is not None and not policies.failures
        return policies.counts.get("blocks_superseded", 0)

    # Rates: 1, 3/4, 9/16, 27/64, .32, .24, .18: from the seventh call on, two blocks of each of four answers.
    assert num_superseded(come_back=False) == 8
    assert num_superseded(come_back=True) == 0


def test_the_next_agent_is_loaded_from_the_tier_if_the_order_is_known() -> None:
    tiering = TieringConfig(1000, (TierConfig("host", 64, 1e9, 1e9),))
    learn = [("l", "P", "l"), ("l", "Q", "l")] * 3
    # Anchors take 8 of 24 blocks, and five tasks wait for Q with 4 each: the first one's go. Then two tasks end: when
    # the first one calls P once more, there is room for what it needs next.
    tasks = [(f"t{i}", agent, f"{i}") for i in range(5) for agent in "QP"]
    plan = [*learn, *tasks, ("t3", "Q", "z"), ("t4", "Q", "z"), ("t0", "P", "0")]
    loaded = [prefetched(plan, tiering, prefetch_distance=distance) for distance in (2.0, 0.0)]
    assert loaded[0] > 0 == loaded[1]


def test_agents_of_one_session_without_names_are_told_apart() -> None:
    driver = virtual(num_blocks=200, max_model_len=256, policy="transition")
    one, other = [1] * NUM_TOKENS, [2] * NUM_TOKENS
    for index, prompt in enumerate([[*one, 7], [*other, 7], [*one, 8], [*other, 8]]):
        driver.at(driver.clock.now_ns(), submit(f"r{index}", prompt, max_tokens=1, session_id="task"))
        driver.run()
        driver.core.check_invariants()
    sessions = driver.core.agents.registry.sessions.values()
    assert [session.agent_key for session in sessions] == [fingerprint(one), fingerprint(other)]
    assert {session.program.program_id for session in sessions} == {"task"}
