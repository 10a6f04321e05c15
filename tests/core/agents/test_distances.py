"""Invocation distances: the rules with numbers, shared blocks, prefetch, preemption, and that outputs never change."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentserve.config import EngineConfig, TierConfig, TieringConfig
from agentserve.core.agents.costs import ForwardCosts
from agentserve.core.agents.distances import DistanceBook
from agentserve.core.agents.policies.invocation_distance import MAX_MOVES, PATIENCE_NS, InvocationDistance
from agentserve.core.agents.policy import PlaceAdapter, Rescore, TurnEvent, TurnKind
from agentserve.core.agents.registry import AgentRegistry, Session
from agentserve.core.batch import BatchShape, OpenPrompts
from agentserve.core.decision_log import describe
from agentserve.core.events import SetDistances, TokenGenerated
from agentserve.core.memory.eviction import EvictionOrder, Rank
from agentserve.core.memory.sharing import MAX_USERS, UserGroup
from agentserve.core.request import Request, SamplingParams, WorkClass
from agentserve.core.transfers import Tier, Transfer, TransferKind
from agentserve.errors import ConfigError
from agentserve.runtime.live import Recorder
from agentserve.runtime.replay import replay
from agentserve.runtime.virtual import VirtualDriver
from tests.core.builders import MS, finished, header, submit, virtual

BLOCK_BYTES = 4000
HOST = TieringConfig(BLOCK_BYTES, (TierConfig("host", 64, 4e6, 4e6),), max_transfer_blocks=2)
"""A block of 4 tokens takes 1 ms each way; to compute it takes 4 ms beside the 8 ms of any batch."""


def session(name: str) -> Session:
    registry = AgentRegistry()
    return registry.open(name, name, None, 0, lambda: EvictionOrder().new_group((Rank.PRIVATE,)))[0]


def put(book: DistanceBook, name: str, distance: float, *, relative: bool = False) -> bool:
    return bool(book.tell([(name, distance)], relative=relative))


def test_distances_are_set_changed_and_used_up() -> None:
    book, anna = DistanceBook(), session("anna")
    assert math.isinf(book.distance("anna"))
    assert not put(book, "anna", -1, relative=True)  # nothing is known that could change
    assert put(book, "anna", 5) and book.distance("anna") == 5
    assert put(book, "anna", -2, relative=True) and book.distance("anna") == 3
    assert put(book, "anna", -7, relative=True) and book.distance("anna") == 0
    put(book, "anna", 4)
    book.began("anna", anna)
    assert book.distance("anna") == 0
    book.ended("anna", 2.5)
    assert book.distance("anna") == 2.5
    book.began("anna", anna)
    book.ended("anna", None)
    assert math.isinf(book.distance("anna"))


def test_what_is_said_during_a_call_holds_after_it() -> None:
    book, anna = DistanceBook(), session("anna")
    book.began("anna", anna)
    book.began("anna", anna)
    put(book, "anna", 6)
    assert book.distance("anna") == 0
    book.ended("anna", 1)
    assert book.distance("anna") == 0  # one of two calls is open
    book.ended("anna", 1)
    assert book.distance("anna") == 6


def test_a_call_moves_the_others_nearer_but_nobody_past_his_turn() -> None:
    book = DistanceBook()
    for name, distance in (("a", 1), ("b", 1), ("c", 3), ("d", 9)):
        put(book, name, distance)
    book.began("a", session("a"))
    assert [book.distance(name) for name in "bcd"] == [0, 2, 8]
    book.began("b", session("b"))  # the second one of the same step: nothing more has passed
    assert [book.distance(name) for name in "cd"] == [2, 8]
    book.began("d", session("d"))  # out of turn, 8 ahead of time: c, the nearest one, is next, not late
    assert book.distance("c") == 0
    book.ended("a", 2)
    book.began("new", session("new"))  # nobody knew when it would come, so nothing follows from it
    assert book.distance("a") == 2


def test_who_is_late_holds_the_others_back_until_too_many_are_early() -> None:
    book = DistanceBook()
    for name, distance in (("now", 1), ("late", 1), ("a", 2), ("b", 2), ("c", 2), ("d", 5)):
        put(book, name, distance)
    book.began("now", session("now"))
    for name in "ab":
        book.began(name, session(name))
        assert book.distance("d") == 4, "they may be early"
    book.began("c", session("c"))  # three are ahead of one: it is he who is late
    assert book.distance("d") == 3 and book.distance("late") == 0
    put(book, "e", 1)
    book.began("e", session("e"))  # nobody waits for him any more
    assert book.distance("d") == 2
    put(book, "late", 1)
    put(book, "f", 2)
    for name in ("late", "f"):
        book.began(name, session(name))  # he is back in the order: 1 has passed, then 1 more
    assert book.distance("d") == 0


def test_one_who_is_always_early_counts_once() -> None:
    book = DistanceBook()
    put(book, "now", 1)
    put(book, "waits", 1)
    put(book, "far", 9)
    book.began("now", session("now"))
    hasty = session("hasty")
    for _ in range(9):
        put(book, "hasty", 5)
        book.began("hasty", hasty)
        book.ended("hasty", None)
    assert book.distance("far") == 8


def test_batches_of_prompts_that_come_at_once() -> None:
    def batch_ns(shape: BatchShape) -> int:
        beside = 6 if shape.num_decodes and shape.num_prefill_tokens else 0
        return 10 + beside + shape.num_decodes + 2 * shape.num_prefill_tokens

    policy = InvocationDistance(2.0, ForwardCosts(10.0, 2.0, 5, batch_ns))
    alone, beside = BatchShape(), BatchShape(4, 40, num_samples=4)
    # A batch of n tokens takes 12 + 2 * (n - 1): sqrt(180^2 * 12 / (370 - 12)) = 32.95
    assert policy.batch_tokens(OpenPrompts(180, 0, alone, num_waiting=7)) == 32
    # Prompts make decodes beside them 22 - 14 = 8 longer, for each of 7: they are read when they have waited for 56.
    assert policy.batch_tokens(OpenPrompts(180, 55, beside, num_waiting=7)) == 0
    assert policy.batch_tokens(OpenPrompts(180, 56, beside, num_waiting=7)) == 44  # sqrt(180^2 * 22 / 358)
    assert policy.batch_tokens(OpenPrompts(180, 0, beside, num_waiting=0)) == 44  # nobody else waits
    assert InvocationDistance(2.0).batch_tokens(OpenPrompts(180, 0, beside, num_waiting=7)) == 180


@pytest.mark.parametrize("policy", ["invocation_distance", "lru"])
def test_the_first_of_many_prompts_do_not_wait_for_the_last(policy: str) -> None:
    driver = virtual(scheduler="chunked", policy=policy)
    for index in range(8):
        driver.at(0, submit(f"r{index}", 8, max_tokens=2))
    results = play(driver)
    batches = [batch for result in results for batch in result.batches]
    prompts = [sum(chunk.work_class is not WorkClass.DECODE for chunk in batch.chunks) for batch in batches]
    first_ns = [end.stats.first_token_ns or 0 for end in finished(results).values()]
    if policy == "lru":
        assert prompts == [8, 0]
    else:
        # A batch takes 8 ms and 1 ms for each token beyond 8: sqrt(64^2 * 8 / 56) = 24 tokens, so 3 of the prompts.
        assert prompts[0] == 3 and sum(prompts) == 8 and max(prompts) == 3
        assert min(first_ns) == pytest.approx(24 * MS, rel=0.01) and sum(first_ns) < 8 * 64 * MS


def open_call(policy: InvocationDistance, found: Session, sequence: int) -> None:
    request = Request(f"r{sequence}", (1,), SamplingParams(max_tokens=1), 0, sequence)
    request.order_key = policy.order_key(found, request, 0)
    found.num_waiting += 1
    policy.observe(TurnEvent(TurnKind.SUBMITTED, found, request, 0))


def test_the_farthest_goes_first_then_who_was_used_longest_ago_and_open_calls_never() -> None:
    policy = InvocationDistance(2.0)
    keys = {}
    for name, distance, last_used in (("near", 1.0, 1), ("far", 7.0, 9), ("farther", 8.0, 5), ("old", 7.0, 2)):
        found = session(name)
        found.last_used_ns = last_used
        policy.set_distances(SetDistances(((name, distance),)), 0)
        keys[name] = policy.score(found, 0)
    keys["unknown"] = policy.score(session("unknown"), 0)
    for sequence, name in enumerate(("first", "second")):
        found = session(name)
        open_call(policy, found, sequence)
        keys[name] = policy.score(found, 0)
    # Of the open calls the one that is served last gives up its memory first.
    order = ["unknown", "farther", "old", "far", "near", "second", "first"]
    assert sorted(keys, key=lambda name: keys[name]) == order


def loads(results: list[Any]) -> list[Transfer]:
    """The transfers up, in order."""
    transfers = [transfer for result in results for transfer in result.transfers]
    return [t for t in transfers if isinstance(t, Transfer) and t.kind is TransferKind.LOAD]


def tell(driver: VirtualDriver, at_ms: int, *, relative: bool = False, **agents: float) -> None:
    driver.at(at_ms * MS, SetDistances(tuple(agents.items()), relative))


def call(driver: VirtualDriver, name: str, at_ms: int, *, prompt: list[int] | None = None, **values: object) -> None:
    tokens = prompt or [1000 * ord(name[0]) + i for i in range(17)]
    driver.at(at_ms * MS, submit(f"{name}/{at_ms}", tokens, max_tokens=1, session_id=name, **values))


def cached(driver: VirtualDriver, name: str) -> int:
    """Tokens of the history of `name` on the device."""
    tokens = [1000 * ord(name) + i for i in range(18)]
    return driver.core.memory.match_prefix(tokens).num_tokens


def play(driver: VirtualDriver, until_ms: int | None = None) -> list[Any]:
    results = []
    while driver.core.has_unfinished or until_ms is None or driver.clock.now_ns() < until_ms * MS:
        result = driver.step()
        if result is None:
            break
        driver.core.check_invariants()
        results.append(result)
    return results


def test_a_shared_block_has_the_smallest_distance_of_its_users() -> None:
    # Agents at 1 and 2 give their shared node 1, as in section 4.2 of the paper.
    driver = virtual(num_blocks=64, policy="invocation_distance")
    shared = list(range(500, 508))
    for index, name in enumerate("ab"):
        call(driver, name, 100 * index, prompt=[*shared, *range(1000 * index, 1000 * index + 5)])
    tell(driver, 400, a=1, b=2)
    play(driver)
    memory = driver.core.memory
    nodes = memory._tree.find(shared, None, 2)
    group = nodes[0].group
    assert isinstance(group, UserGroup) and {user.session_id for user in group.users} == {"a", "b"}
    sessions = driver.core.agents.registry.sessions
    a, b = sessions["a"].blocks.group, sessions["b"].blocks.group
    assert group.key == a.key > b.key
    tell(driver, 2000, b=0.5)
    play(driver)
    assert group.key == b.key > a.key


def test_what_very_many_share_is_an_anchor() -> None:
    driver = virtual(num_blocks=64, policy="invocation_distance")
    names = [chr(ord("a") + index) for index in range(MAX_USERS + 1)]
    for index, name in enumerate(names):
        call(driver, name, 100 * index, prompt=list(range(500, 509)))
    play(driver)
    memory = driver.core.memory
    (node, *_) = memory._tree.find(list(range(500, 509)), None, 1)
    assert node.group is memory.order.shared


def eight_five_seven_four(**values: object) -> VirtualDriver:
    """The paper's example: 8 and 5 are on the device, 7 and 4 below; each has 4 blocks, of 9."""
    driver = virtual(
        num_blocks=9, max_model_len=24, policy="invocation_distance", tiering=HOST, max_num_seqs=1, **values
    )
    for index, name in enumerate("gdhe"):  # d, e, g, h: the 4th, 5th, 7th and 8th letter
        call(driver, name, 200 * index)
    play(driver, 1000)
    assert [cached(driver, name) > 0 for name in "gdhe"] == [False, False, True, True]
    return driver


def test_the_nearer_one_below_the_threshold_takes_the_place_of_one_that_is_farther() -> None:
    driver = eight_five_seven_four(prefetch_distance=7.5)
    tell(driver, 1000, h=8, e=5, g=7)
    results = play(driver, 1100)
    assert loads(results)
    assert cached(driver, "g") == 16 and cached(driver, "e") == 16
    assert cached(driver, "h") < 16  # 8 was farther than 7; 5 was not


def test_above_the_threshold_nothing_is_loaded() -> None:
    driver = eight_five_seven_four(prefetch_distance=7.0)
    tell(driver, 1000, h=8, e=5, g=7)
    play(driver, 1100)
    assert cached(driver, "g") == 0 and cached(driver, "h") == 16


def test_who_is_not_nearer_than_anybody_on_the_device_stays_below() -> None:
    driver = eight_five_seven_four(prefetch_distance=9.0)
    tell(driver, 1000, h=3, e=3, g=3, d=4)
    play(driver, 1100)
    assert cached(driver, "h") == cached(driver, "e") == 16


def test_a_distance_that_shrinks_below_the_threshold_starts_the_prefetch() -> None:
    driver = eight_five_seven_four(prefetch_distance=2.0)
    tell(driver, 1000, h=8, e=5, g=3)
    play(driver, 1050)
    assert cached(driver, "g") == 0
    tell(driver, 1100, relative=True, g=-1.5)
    play(driver, 1200)
    assert cached(driver, "g") == 16


def test_a_call_that_comes_during_its_prefetch_waits_for_it_and_computes_nothing_twice() -> None:
    driver = eight_five_seven_four(prefetch_distance=7.5)
    tell(driver, 1000, h=8, e=5, g=1)
    driver.at(1001 * MS, submit("early", [1000 * ord("g") + i for i in range(17)], max_tokens=1, session_id="g"))
    ended = finished(play(driver, 1100))
    # The load of 4 blocks takes 4 ms from 1,000 ms on, in two pieces.
    assert ended["early"].stats.num_cached_tokens == 16


def test_a_prefetch_gives_way_to_a_call_that_needs_its_blocks_and_goes_on_later() -> None:
    driver = eight_five_seven_four(prefetch_distance=7.5)
    tell(driver, 1000, h=8, e=9, g=1)
    call(driver, "d", 1001)  # 5 blocks of 9; g holds as many, and is cut at half of them
    results = play(driver, 1100)
    # The first piece of g comes at 1,002 ms. Then d is loaded: 4 blocks, 4 ms; its last block takes 8 ms + 1.
    assert finished(results)["d/1001"].stats.num_cached_tokens == 16
    assert finished(results)["d/1001"].at_ns < 1025 * MS
    assert cached(driver, "g") == 16


def test_a_full_host_tier_keeps_those_who_are_near() -> None:
    host = TieringConfig(BLOCK_BYTES, (TierConfig("host", 8, 4e6, 4e6),), max_transfer_blocks=2)  # two agents' blocks
    driver = virtual(num_blocks=9, max_model_len=24, policy="invocation_distance", tiering=host, max_num_seqs=1)
    for index, name in enumerate("abcd"):
        call(driver, name, 200 * index)
        # `a` was used longest ago, and is next; nobody has asked for its blocks since.
        tell(driver, 200 * index + 100, **{other: 3.0 + (other != "a") * 5 for other in "abcd"[: index + 1]})
    play(driver, 1000)
    prompts = {name: [1000 * ord(name) + i for i in range(17)] for name in "abcd"}
    below = {name: driver.core.memory.locate([(prompt, None)]).num_tier_blocks for name, prompt in prompts.items()}
    assert below["a"][Tier.HOST] == 4
    assert sum(found.get(Tier.HOST, 0) for found in below.values()) == 8


def test_an_urgent_load_goes_before_the_rest_of_a_prefetch() -> None:
    driver = eight_five_seven_four(prefetch_distance=7.5)
    tell(driver, 1000, h=8, e=9, g=1)
    call(driver, "d", 1001, prompt=[1000 * ord("d") + i for i in range(9)])  # 3 blocks, of which 2 are loaded
    results = play(driver, 1100)
    history = {name: set(driver.core.agents.registry.sessions[name].blocks.path) for name in "dg"}
    owners = [
        next(name for name, path in history.items() if any(node.block_id in t.destination_ids for node in path))
        for t in loads(results)
    ]
    # A transfer has two blocks. After the first one of g, d calls, and goes before the other one.
    assert owners == ["g", "d", "g"]
    assert finished(results)["d/1001"].stats.num_cached_tokens == 8
    assert cached(driver, "g") == 16


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), threshold=st.sampled_from([0.0, 2.0, 50.0]), share=st.booleans())
def test_whatever_the_distances_outputs_are_the_same_and_nothing_is_lost(
    seed: int, threshold: float, share: bool
) -> None:
    def outputs(**values: object) -> dict[str, list[int]]:
        source = random.Random(seed)
        driver = virtual(num_blocks=24, max_model_len=64, max_num_seqs=3, **values)
        for index in range(30):
            name = f"s{source.randrange(6)}"
            start = 500 if share else 1000 * int(name[1:])
            prompt = [
                *range(start, start + 9),
                *(7000 + 100 * int(name[1:]) + i for i in range(source.randrange(1, 20))),
            ]
            at_ns = source.randrange(1500) * MS
            distance = source.choice([None, 0.0, float(source.randrange(9))])
            driver.at(at_ns, submit(f"r{index}", prompt, max_tokens=4, seed=index, session_id=name, distance=distance))
            told = tuple((f"s{source.randrange(8)}", float(source.randrange(-3, 12))) for _ in range(4))
            driver.at(at_ns + source.randrange(400) * MS, SetDistances(told, source.random() < 0.4))
        results = play(driver)
        assert driver.core.memory.num_available_blocks == 24
        assert len(finished(results)) == 30
        tokens: dict[str, list[int]] = {}
        for result in results:
            for event in result.events:
                if isinstance(event, TokenGenerated):
                    tokens.setdefault(event.request_id, []).append(event.sample.token_id)
        return tokens

    plain = outputs()
    assert outputs(policy="invocation_distance", prefetch_distance=threshold, tiering=HOST) == plain
    assert outputs(policy="invocation_distance", prefetch_distance=threshold) == plain


def test_a_recording_with_distances_replays(tmp_path: Path) -> None:
    values = {"num_blocks": 9, "max_model_len": 24, "policy": "invocation_distance", "tiering": HOST, "max_num_seqs": 1}
    driver = virtual(**values, prefetch_distance=7.5)
    recorder = Recorder(tmp_path / "r.jsonl", header(**values, prefetch_distance=7.5))
    core, step = driver.core, driver.core.step

    def recorded(now_ns, completions, commands):  # type: ignore[no-untyped-def]
        result = step(now_ns, completions, commands)
        recorder.write(now_ns, completions, commands, result)
        return result

    core.step = recorded  # type: ignore[method-assign]
    for index, name in enumerate("gdhe"):
        call(driver, name, 200 * index, distance=float(index))
    tell(driver, 1000, h=8, e=5, g=7)
    tell(driver, 1020, relative=True, g=-1)
    lines = [line for result in play(driver, 1200) for line in describe(result)]
    recorder.close()
    report = replay(tmp_path / "r.jsonl")
    assert report.identical and report.num_decisions == len(lines)


@pytest.mark.parametrize(
    "values", [{"prefetch_distance": -1.0}, {"prefetch_distance": math.inf}, {"protect_anchors": True}]
)
def test_what_cannot_be_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        EngineConfig(num_blocks=8, max_model_len=16, policy="invocation_distance", **values)  # type: ignore[arg-type]


def test_an_adapter_is_as_near_as_the_nearest_agent_that_uses_it() -> None:
    policy = InvocationDistance(2.0)
    anna, bert = session("anna"), session("bert")
    for found in (anna, bert):
        found.adapter = "both"
        policy.book.began(found.session_id, found)
        policy.book.ended(found.session_id, None)
    policy.set_distances(SetDistances((("anna", 5.0), ("bert", 3.0))), 0)
    assert [a for a in policy.act(0) if isinstance(a, PlaceAdapter)] == [
        PlaceAdapter("both", 4.0, False),  # positions: distances from 1.0 on; the nearest agent comes first
        PlaceAdapter("both", 4.0, False),
    ]
    policy.set_distances(SetDistances((("bert", 9.0), ("anna", 1.0))), 0)
    assert [a for a in policy.act(0) if isinstance(a, PlaceAdapter)] == [PlaceAdapter("both", 2.0, True)] * 2


def test_a_world_that_steps_by_one_changes_nothing() -> None:
    book = DistanceBook()
    world = [(f"a{index}", float(1 + index % 7)) for index in range(70)]
    assert len(book.tell(world)) == 70
    book.began("a0", session("a0"))  # one step has passed
    assert book.tell([(name, distance - 1) for name, distance in world[1:]]) == []
    assert book.tell([("a1", 3.0), ("a2", 2.0)]) == [(5.0, "a1")]  # 1 + 1 has been reached; a2 is where it was


def test_many_agents_are_placed_in_several_steps_the_nearest_first() -> None:
    policy, sessions = InvocationDistance(2.0), {}
    for index in range(2 * MAX_MOVES + 1):
        found = sessions[f"a{index}"] = session(f"a{index}")
        policy.book.began(f"a{index}", found)
        policy.book.ended(f"a{index}", None)
    policy.set_distances(SetDistances(tuple((name, float(9 - int(name[1:]))) for name in sessions)), 0)
    placed = []
    while policy.is_behind:
        actions = [a for a in policy.act(0) if isinstance(a, Rescore)]
        assert 1 <= len(actions) <= MAX_MOVES
        placed += [action.session.session_id for action in actions]
    assert placed == [f"a{index}" for index in range(2 * MAX_MOVES, -1, -1)]
    assert list(policy.act(0)) == []


def test_an_engine_comes_back_at_once_until_all_agents_are_placed() -> None:
    driver = virtual(num_blocks=200, policy="invocation_distance")
    names = [chr(ord("a") + index) for index in range(2 * MAX_MOVES)]
    for index, name in enumerate(names):
        call(driver, name, 100 * index)
    play(driver)
    tell(driver, 5000, **{name: 1.0 + index for index, name in enumerate(names)})
    times = []
    while (result := driver.step()) is not None:
        driver.core.check_invariants()
        times.append(driver.clock.now_ns())
        assert not result.batches
    assert times == [5000 * MS, 5000 * MS]
    groups = [driver.core.agents.registry.sessions[name].blocks.group for name in names]
    assert [group.key[1] for group in groups] == sorted((group.key[1] for group in groups), reverse=True)


def test_calls_whose_memory_is_there_go_first_but_not_for_ever() -> None:
    # 9 blocks: h and e have 4 each on the device, g and d theirs below. All call at once, one runs at a time.
    driver = eight_five_seven_four(prefetch_distance=0.0)
    for name in "gdeh":
        call(driver, name, 1000)
    results = play(driver)
    ended = sorted(finished(results).values(), key=lambda event: event.at_ns)
    assert [event.request_id[0] for event in ended if event.at_ns > 1000 * MS] == ["e", "h", "g", "d"]
    policy = InvocationDistance(2.0)
    on_device = driver.core.agents.registry.sessions["d"]
    keys = [
        policy.order_key(session("below"), Request("r0", (1,), SamplingParams(max_tokens=1), 0, 0), 0),
        policy.order_key(on_device, Request("r1", (1,), SamplingParams(max_tokens=1), 0, 1), PATIENCE_NS - 1),
        policy.order_key(on_device, Request("r2", (1,), SamplingParams(max_tokens=1), 0, 2), PATIENCE_NS + 1),
    ]
    assert keys[1] < keys[0] < keys[2]


def test_a_prefetch_takes_what_the_calls_that_wait_leave() -> None:
    # One call runs, for 9 ms, the next one waits for it: of 9 blocks the two need 10, so g gets none yet.
    driver = eight_five_seven_four(prefetch_distance=7.5)
    call(driver, "e", 1000)
    call(driver, "d", 1000)
    tell(driver, 1000, g=1, h=8)
    results = play(driver, 1009)
    first = min(transfer.transfer_id for transfer in loads(results))
    started = next(result for result in results if first in {t.transfer_id for t in result.transfers})
    assert finished([started]).keys() == {"e/1000"}  # what is loaded then is for d
    play(driver, 1200)
    assert cached(driver, "g") == 16
