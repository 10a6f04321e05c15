"""What follows from calls is spread over steps: a bounded part in each, in order, and all of it at one time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from hypothesis import given, settings
from hypothesis import strategies as st

from agentserve.core.agents import Policy, Seats, TurnEvent
from agentserve.core.agents.policies.evict_always import MAX_BLOCKS
from agentserve.core.agents.policies.transition import Transition
from agentserve.core.agents.policies.ttl import DEFAULT_TTL_NS
from agentserve.core.agents.policy import Action, Rate, RescoreAnchor, TurnKind
from agentserve.core.agents.registry import AgentRegistry, GapSamples, Session
from agentserve.core.engine import EngineCore, StepResult
from agentserve.core.events import EndRequest, RequestFinished
from agentserve.core.memory.eviction import EvictionGroup
from agentserve.core.memory.radix import RadixNode, RadixTree
from agentserve.core.request import FinishReason, Request
from agentserve.core.slots import build_partition_table
from agentserve.runtime.replay import build_core
from agentserve.runtime.virtual import VirtualDriver
from tests.core.builders import config, header, simulated, submit, virtual


class Listener(Policy):
    """Notes what it is told, by `act`, and what it had been told when it was asked for the place of a call."""

    name: ClassVar[str] = "listener"

    def __init__(self) -> None:
        self.told: list[list[tuple[TurnKind, str]]] = [[]]
        self.known: dict[str, list[tuple[TurnKind, str]]] = {}

    def observe(self, event: TurnEvent) -> None:
        self.told[-1].append((event.kind, event.request.request_id))

    def order_key(self, session: Session, request: Request, now_ns: int) -> tuple[float, ...]:
        del session, now_ns
        self.known[request.request_id] = [event for events in self.told for event in events]
        return ()

    def act(self, now_ns: int) -> Iterable[Action]:
        del now_ns
        self.told.append([])
        return ()


def driver_of(policy: Policy, **values: Any) -> VirtualDriver:
    chosen = config(**values)
    core = EngineCore(
        chosen,
        build_partition_table(8, 1, 1),
        build_core(header())._scheduler._controller,
        seats=Seats(AgentRegistry(), retention=policy, order=policy),
    )
    return VirtualDriver(core, simulated(chosen.num_blocks, chosen.block_size))


def step(driver: VirtualDriver) -> StepResult | None:
    result = driver.step()
    driver.core.check_invariants()
    return result


def three_ends_at_once(policy: Policy) -> tuple[VirtualDriver, int]:
    """Calls a, b and c, which wait behind another one, are cancelled at the same time, which is returned."""
    driver, at_ns = driver_of(policy, max_num_seqs=1), 30_000_000
    for name in ("first", *"abc"):
        driver.at(0, submit(name, 8, max_tokens=24, session_id=name))
    for name in "abc":
        driver.at(at_ns, EndRequest(name, FinishReason.CANCELLED))
    while driver.clock.now_ns() < at_ns:
        assert step(driver) is not None
    return driver, at_ns


def ends(told: Iterable[tuple[TurnKind, str]]) -> list[str]:
    return [name for kind, name in told if kind is TurnKind.FINISHED]


def test_one_end_of_a_call_is_told_in_a_step_and_the_others_at_once_in_steps_of_their_own() -> None:
    policy = Listener()
    driver, at_ns = three_ends_at_once(policy)
    for _ in range(2):
        step(driver)
        assert driver.clock.now_ns() == at_ns
    assert [ends(events) for events in policy.told[-4:]] == [["a"], ["b"], ["c"], []]
    step(driver)
    assert driver.clock.now_ns() > at_ns


def test_all_turns_that_end_in_a_step_are_pinned_before_its_admissions() -> None:
    driver = virtual(num_blocks=40, max_num_seqs=4, max_model_len=128, policy="ttl")
    for name in (*"abc", "long"):
        driver.at(0, submit(name, 16, max_tokens=100, session_id=name))
    for name in "abc":
        driver.at(200_000_000, EndRequest(name, FinishReason.CANCELLED))
    # It waits for a place, and then needs 25 of the 40 blocks: the pins of two sessions would leave it enough.
    driver.at(1, submit("d", 100, session_id="d"))
    known = driver.core.agents.registry.sessions
    ended: list[str] = []
    while not ended:
        result = step(driver)
        assert result is not None
        ended = [event.request_id for event in result.events if isinstance(event, RequestFinished)]
    assert ended == ["a", "b", "c"]
    at_ns, num_pinned = driver.clock.now_ns(), driver.core.memory.num_pinned_blocks
    left = [known[name].blocks.group.num_cached for name in "abc"]
    assert num_pinned == sum(left) and min(left) >= 4
    for num_set in range(4):  # the pin of one session is set in a step
        assert driver.clock.now_ns() == at_ns and driver.core.memory.num_pinned_blocks == num_pinned
        ttls = [known[name].pinned_until_ns == at_ns + DEFAULT_TTL_NS for name in "abc"]
        assert ttls == [index < num_set for index in range(3)]
        assert known["d"].num_waiting == 1
        step(driver)


def test_what_a_turn_has_left_is_held_only_until_its_end_was_told() -> None:
    driver = virtual(num_blocks=40, max_num_seqs=3, max_model_len=128, policy="ttl")
    for name in "abc":
        driver.at(0, submit(name, 16, max_tokens=4, session_id=name, is_last_turn=True))
    while step(driver) is not None:
        pass
    assert driver.core.memory.num_pinned_blocks == 0


def test_before_a_call_is_placed_everything_is_told() -> None:
    policy = Listener()
    driver, at_ns = three_ends_at_once(policy)
    assert ends(event for events in policy.told for event in events) == ["a"]
    driver.at(at_ns, submit("d", 8, session_id="d"))
    step(driver)
    assert ends(policy.known["d"]) == ["a", "b", "c"]
    assert (TurnKind.SUBMITTED, "d") in policy.told[-2], "it is told in its own step"


def test_blocks_are_dropped_a_few_in_each_step_at_one_time() -> None:
    driver = virtual(num_blocks=64, max_model_len=256, policy="evict_always")
    driver.at(0, submit("a", 100, max_tokens=2, session_id="a"))
    cached, times = [], []
    while step(driver) is not None:
        cached.append(driver.core.memory.num_cached_blocks)
        times.append(driver.clock.now_ns())
    first = cached.index(max(cached))
    dropped = [before - after for before, after in zip(cached[first:], cached[first + 1 :], strict=False)]
    num_blocks = 100 // driver.core.memory.block_size
    assert num_blocks > 2 * MAX_BLOCKS and cached[-1] == 0
    assert cached[first] == num_blocks == sum(dropped), "none goes in the step in which the turn ended"
    assert max(dropped) == MAX_BLOCKS
    assert len(set(times[first:])) == 1


@settings(max_examples=150)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 1), st.booleans()), min_size=1, max_size=14),
    st.integers(0, 12) | st.none(),
)
def test_a_group_is_evicted_from_the_ends_of_its_branches(plan: list[tuple[int, int, bool]], limit: int | None) -> None:
    """A plan: below which node each one is, in which group, and whether somebody holds it."""
    tree = RadixTree(1)
    groups = [tree.order.new_group((1, 0)) for _ in range(2)]
    nodes: list[RadixNode] = []
    for number, (above, group, _) in enumerate(plan):
        parent = nodes[above - 1] if 0 < above <= len(nodes) else None
        node = tree.insert(parent, None, (number,), number, None)
        node.group = groups[group]
        nodes.append(node)
        if parent is not None:
            parent.num_refs += 1
    for node in reversed(nodes):
        node.num_refs = 0
    tree.num_cached = len(nodes)
    for node in nodes:
        tree.order.count_cached(_group(node), 1)
        if not node.children:
            tree.order.push(node)
    for node, (_, _, is_held) in zip(nodes, plan, strict=True):
        if is_held:
            tree.acquire(node)
    tree.check_invariants()
    expected = _removable(nodes, groups[0])
    evicted = tree.evict_group(groups[0], limit)
    tree.check_invariants()
    places = {node: place for place, node in enumerate(evicted)}
    assert all(places[child] < places[node] for node in evicted for child in nodes if child.parent is node)
    assert set(evicted) <= expected and len(evicted) == min(len(expected), len(nodes) if limit is None else limit)
    assert not any(node.is_in_tree for node in evicted)


def _group(node: RadixNode) -> EvictionGroup:
    assert node.group is not None
    return node.group


def _removable(nodes: list[RadixNode], group: EvictionGroup) -> set[RadixNode]:
    """Nodes of a group that nobody holds and that have only such below them."""
    found: set[RadixNode] = set()
    for node in reversed(nodes):  # children come after their parents
        if node.group is group and not node.num_refs and all(child in found for child in node.children.values()):
            found.add(node)
    return found


def test_what_follows_from_calls_is_worked_out_in_small_pieces() -> None:
    class Counting(Transition):
        most_rated = most_anchors = num_rated = 0

        def act(self, now_ns: int) -> Iterable[Action]:
            actions = list(super().act(now_ns))
            rated = sum(len(action.keys) for action in actions if isinstance(action, Rate))
            self.num_rated += rated
            self.most_rated = max(self.most_rated, rated)
            anchors = sum(isinstance(action, RescoreAnchor) for action in actions)
            self.most_anchors = max(self.most_anchors, anchors)
            return actions

    policy = Counting(prefetches=False)
    driver = driver_of(policy, num_blocks=512)
    for number in range(60):
        name, task = f"agent-{number % 10}", f"task-{number % 2}"
        driver.at(
            number * 50_000_000,
            submit(f"r{number}", 12, max_tokens=2, session_id=f"{task}/{name}", agent_id=name, program_id=task),
        )
    while step(driver) is not None:
        assert policy.is_behind == (driver.core.next_deadline_ns() == driver.clock.now_ns())
    assert not policy.is_behind
    assert (policy.most_rated, policy.most_anchors) == (3, 3)
    assert policy.num_rated > 60


def test_many_gaps_are_worked_out_anew_by_who_asks_or_when_a_quarter_is_new() -> None:
    gaps = GapSamples()
    for _ in range(128):
        gaps.add(10)
    assert gaps.best_wait_ns(20) == 10 and not gaps.is_stale  # all were new
    for _ in range(8):
        gaps.add(1)
    assert gaps.is_stale and gaps.best_wait_ns(20) == 10  # as of the last time: 1 is in 8 of 128, but not known yet
    # 32 of the 128 gaps are candidates: in order first, then eight of them in a piece.
    assert [gaps.refresh_more() for _ in range(5)] == [False] * 4 + [True]
    assert not gaps.is_stale
    # 8/128 * 20 - 1 = 0.25 for 1; 20 - 10 = 10 for 10.
    assert gaps.best_wait_ns(20) == 10
    for _ in range(31):
        gaps.add(1)
    # As of 8 ones: 10 is better from (10 - 1) * 128 / 120 = 9.6 on.
    assert gaps.best_wait_ns(11) == 10
    gaps.add(1)
    # 40 ones of 128: 40/128 * 11 - 1 = 2.4 for 1; 11 - 10 = 1 for 10.
    assert gaps.best_wait_ns(11) == 1
