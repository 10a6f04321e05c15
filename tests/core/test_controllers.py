"""Controllers by themselves: bounds, the direction of their reactions, and that they come to rest."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agentserve.config import ControlConfig, EngineConfig
from agentserve.core.batch import Batch, Lane, ScheduledChunk
from agentserve.core.controllers import BatchObservation, Controller, ControlSignal, Decision
from agentserve.core.controllers.correction import Corrections
from agentserve.core.controllers.factory import build_controller, tpot_target_ns
from agentserve.core.controllers.merit import rate_in_turn
from agentserve.core.controllers.predictive import PredictiveController
from agentserve.core.costmodel import BatchShape, CostModel
from agentserve.core.request import WorkClass
from agentserve.core.slots import PartitionKind, PartitionTable, build_partition_table
from agentserve.errors import ConfigError
from tests.core.builders import MS, config, cost_model

TABLE = build_partition_table(8, 1, 1)
TARGET_NS = 20 * MS


def engine_config(controller: str, *, engine: dict[str, Any] | None = None, **control: Any) -> EngineConfig:
    control = {"tpot_target_ns": TARGET_NS, **control}
    return config(prefill_chunk=64, control=ControlConfig(controller=controller, **control), **(engine or {}))


def make(controller: str, table: PartitionTable = TABLE, cost: CostModel | None = None, **control: Any) -> Controller:
    return build_controller(engine_config(controller, **control), table, cost or cost_model())


def signal(
    now_ns: int = 0, *, decodes: int = 2, context: int = 100, resume: int = 0, prefill: int = 500, waiting: int = 0
) -> ControlSignal:
    shape = BatchShape(num_decodes=decodes, num_decode_context=decodes * context, num_samples=decodes)
    num_prompts = sum(tokens > 0 for tokens in (resume, prefill - waiting, waiting))
    return ControlSignal(now_ns, shape, resume, prefill, waiting, num_prompts, 0, 0, 0 if resume or prefill else None)


def observation(
    decision: Decision, gap_ns: int, *, shape: BatchShape | None = None, lane: Lane = Lane.DECODE
) -> BatchObservation:
    """A batch of the decode lane that took all of the gap, beside a busy prefill lane unless the lanes take turns."""
    turns = decision.partition.kind is PartitionKind.WHOLE
    chunk = ScheduledChunk("r", WorkClass.DECODE, 5, (1,), (0,), None)
    batch = Batch(0, lane, decision.partition, not turns, (chunk,))
    gap = gap_ns if lane is Lane.DECODE else None
    return BatchObservation(batch, shape or signal().decodes, gap_ns, 0, gap, not turns, turns)


# ---- static ----


@pytest.mark.parametrize(
    ("slots", "kind"),
    [
        ("auto", PartitionKind.SPLIT),
        ("cap", PartitionKind.CAP),
        ("stream", PartitionKind.STREAM),
        ("off", PartitionKind.WHOLE),
    ],
)
def test_static_keeps_what_it_was_told(slots: str, kind: PartitionKind) -> None:
    controller = make("static", slots=slots, decode_share=0.25)
    first = controller.decide(signal())
    controller.observe(observation(first, 900 * MS))
    assert controller.decide(signal(10**9, decodes=7, resume=3)) == first
    assert (first.partition.kind, first.resume_budget, first.prefill_chunk) == (kind, 8, 64)
    assert kind is not PartitionKind.SPLIT or first.partition.decode_units == 2  # a quarter of 8


# ---- reactive ----


def react(gaps_ns: list[int], **control: Any) -> list[Decision]:
    """Decisions of a reactive controller that sees one gap in each interval."""
    controller = make("reactive", interval_ns=10 * MS, resume_budget_step=8, min_resume_budget=4, **control)
    decisions = [controller.decide(signal(0))]
    for index, gap_ns in enumerate(gaps_ns):
        controller.observe(observation(decisions[-1], gap_ns))
        decisions.append(controller.decide(signal((index + 1) * 10 * MS)))
    return decisions


def levels(decisions: list[Decision]) -> list[tuple[int, int]]:
    return [(decision.partition.decode_units, decision.resume_budget) for decision in decisions]


def test_reactive_tightens_above_the_band_and_relaxes_below_it() -> None:
    # 25 > 1.0 * 20: one unit more and 8 tokens fewer, until both ends of their ranges are reached.
    assert levels(react([25 * MS] * 4)) == [(4, 8), (5, 4), (6, 4), (7, 4), (7, 4)]
    # 14 < 0.75 * 20 relaxes; 15 to 20 is the dead band.
    assert levels(react([14 * MS] * 4)) == [(4, 8), (3, 16), (2, 24), (1, 32), (1, 40)]
    assert levels(react([15 * MS, 20 * MS, 17 * MS])) == [(4, 8)] * 4


def test_reactive_changes_once_in_an_interval_and_takes_the_mean_of_it() -> None:
    controller = make("reactive", interval_ns=100 * MS)
    first = controller.decide(signal(0))
    for gap_ns in (50 * MS, 10 * MS, 10 * MS):  # mean 23.3 ms, above the target
        controller.observe(observation(first, gap_ns))
        assert controller.decide(signal(99 * MS)) == first
    assert controller.decide(signal(100 * MS)).partition.decode_units == first.partition.decode_units + 1
    # Nothing was measured since: nothing changes.
    assert controller.decide(signal(500 * MS)).partition.decode_units == first.partition.decode_units + 1


@given(st.lists(st.integers(1, 100 * MS), max_size=30))
def test_reactive_stays_within_its_bounds(gaps_ns: list[int]) -> None:
    for units, budget in levels(react(gaps_ns, max_resume_budget=40)):
        assert 1 <= units <= 7
        assert 4 <= budget <= 40


@given(st.lists(st.integers(1, 60 * MS), max_size=20), st.integers(0, 40 * MS))
def test_reactive_gives_decode_no_less_when_tokens_are_slower(gaps_ns: list[int], slower_ns: int) -> None:
    fast, slow = levels(react(gaps_ns)), levels(react([gap + slower_ns for gap in gaps_ns]))
    for (units, budget), (units_slow, budget_slow) in zip(fast, slow, strict=True):
        assert units_slow >= units
        assert budget_slow <= budget


@given(st.integers(1, 100 * MS))
def test_reactive_comes_to_rest_under_a_constant_signal(gap_ns: int) -> None:
    decisions = levels(react([gap_ns] * 80))
    assert decisions[-1] == decisions[-2]
    units = [unit for unit, _ in decisions]
    assert units in (sorted(units), sorted(units, reverse=True)), "it oscillates"


def test_reactive_with_caps_leaves_prefill_less_when_tokens_are_slow() -> None:
    decisions = react([25 * MS] * 3, slots="cap")
    assert {decision.partition.kind for decision in decisions} == {PartitionKind.CAP}
    left = [decision.partition.prefill_units for decision in decisions]
    assert left == [4, 3, 2, 1]  # half of 8 units at first


def test_reactive_without_slots_moves_only_the_budget() -> None:
    for slots, kind in (("stream", PartitionKind.STREAM), ("off", PartitionKind.WHOLE)):
        decisions = react([25 * MS] * 3, slots=slots)
        assert {decision.partition.kind for decision in decisions} == {kind}
        assert [decision.resume_budget for decision in decisions] == [8, 4, 4, 4]


# ---- predictive ----


def predictive(objective: str = "rate", **control: Any) -> PredictiveController:
    controller = make("predictive", objective=objective, **control)
    assert isinstance(controller, PredictiveController)
    return controller


def predicted(controller: PredictiveController, decision: Decision, at: ControlSignal) -> tuple[float, float]:
    """Time per token and prefill rate that the controller expects of its own decision."""
    (option,) = [option for option in controller.options(at) if option.decision == decision]
    return option.tpot_ns, option.prefill_rate


def test_predictive_takes_the_fastest_prefill_that_keeps_the_target() -> None:
    controller = predictive()
    at = signal()
    tpot_ns, rate = predicted(controller, controller.decide(at), at)
    assert tpot_ns <= TARGET_NS
    for option in controller.options(at):
        # A split is kept for what is within the hysteresis.
        assert option.prefill_rate < 1.1 * rate or option.tpot_ns > TARGET_NS


def test_without_a_target_that_somebody_named_it_takes_the_most_prompt_tokens_for_the_delay() -> None:
    at = signal()
    controller = predictive("delay", tpot_target_ns=200 * MS)
    tpot_ns, rate = predicted(controller, controller.decide(at), at)
    for option in controller.options(at):
        assert option.prefill_rate / option.tpot_ns < 1.1 * rate / tpot_ns
    # With 200 ms to spend the fastest way has long batches, which is what a named target is for.
    greedy = predictive("rate", tpot_target_ns=200 * MS)
    greedy_tpot_ns, greedy_rate = predicted(greedy, greedy.decide(at), at)
    assert greedy_rate > 1.1 * rate and greedy_tpot_ns > 1.5 * tpot_ns


def test_the_target_bounds_the_delay_also_where_more_would_have_more_power() -> None:
    controller = predictive("delay", tpot_target_ns=12 * MS)
    at = signal()
    assert predicted(controller, controller.decide(at), at)[0] <= 12 * MS


def test_something_else_than_a_split_must_promise_more_than_the_hysteresis() -> None:
    """Two lanes disturb each other by the same factor in a split and on the shared device, which has more units."""
    at = signal()

    def kind(hysteresis: float) -> PartitionKind:
        return predictive("delay", tpot_target_ns=40 * MS, hysteresis=hysteresis).decide(at).partition.kind

    assert kind(0.0) is not PartitionKind.SPLIT
    assert kind(5.0) is PartitionKind.SPLIT


def test_predictive_takes_turns_when_that_is_better_than_a_split() -> None:
    # A batch with 16 prompt tokens takes 18 ms on the whole device; two lanes would each take 25 % longer.
    assert predictive(tpot_target_ns=200 * MS).decide(signal()).partition.kind is PartitionKind.WHOLE
    # With 12 ms a step there is no room for 16 tokens: only a partition keeps the target.
    assert predictive(tpot_target_ns=12 * MS).decide(signal()).partition.kind is not PartitionKind.WHOLE


def test_a_target_that_is_lost_anyway_does_not_stop_the_prompts() -> None:
    # Eight decodes at 8,000 tokens take 8 ms for the weights and 64 ms for their keys, of a target of 20 ms.
    at = signal(decodes=8, context=8000)
    controller = predictive()
    tpot_ns, rate = predicted(controller, controller.decide(at), at)
    fastest = max(option.prefill_rate for option in controller.options(at) if option.tpot_ns <= 1.4 * 72 * MS)
    assert tpot_ns <= 1.4 * 72 * MS and rate == fastest


def test_predictive_gives_everything_to_prefill_when_nobody_decodes() -> None:
    decision = predictive().decide(signal(decodes=0))
    assert decision.partition.kind is PartitionKind.WHOLE
    assert decision.prefill_chunk == decision.resume_budget >= 16


def test_two_prompts_read_at_once_count_as_what_they_are_worth_one_after_the_other() -> None:
    assert rate_in_turn(100.0, 0.0) == 100.0
    # 300 tokens each. At once at 50 and 50 a second: both after 6 s. In turn at 75: after 4 and 8, 6 in the mean.
    assert rate_in_turn(50.0, 50.0) == 75.0
    # At 80 and 20: the first after 3.75 s, then 225 tokens of the second are left, at 100: after 6; 4.875 in the mean.
    # In turn at r: (300 + 600) / (2 r) = 4.875.
    assert rate_in_turn(80.0, 20.0) == pytest.approx(900 / 2 / 4.875)
    assert rate_in_turn(20.0, 80.0) == rate_in_turn(80.0, 20.0)


def test_a_second_prompt_is_not_read_beside_the_first_where_one_after_the_other_is_as_fast() -> None:
    controller = make("predictive", tpot_target_ns=400 * MS)
    alone = controller.decide(signal(prefill=500))
    with_another = controller.decide(signal(prefill=1000, waiting=500))
    assert alone.partition.kind is with_another.partition.kind
    assert not (with_another.partition.kind is PartitionKind.SPLIT and with_another.shares_budget)


def test_predictive_sends_a_resume_to_the_prefill_lane_rather_than_let_it_wait() -> None:
    """Ten tokens while a decode batch runs, which takes 8 ms and a little."""

    def budget(running_ns: int | None) -> int:
        at = replace(signal(resume=10, prefill=0), decode_running_ns=running_ns)
        return predictive(tpot_target_ns=100 * MS).decide(at).resume_budget

    # At the boundary they ride along: one batch of 18 ms, against 10 tokens on 7 of 8 units beside another lane.
    assert budget(None) > 0
    # It has only just begun.
    assert budget(0) == 0
    # It is all but over.
    assert budget(8 * MS) > 0


def test_a_resume_rides_with_the_decodes_while_the_prefill_lane_has_work_of_its_own() -> None:
    options = predictive().options(signal(resume=10, prefill=500))
    assert all(option.decision.resume_budget > 0 for option in options)


@pytest.mark.parametrize(
    ("slots", "kinds"),
    [
        ("off", {PartitionKind.WHOLE}),
        ("stream", {PartitionKind.WHOLE, PartitionKind.STREAM}),
        ("cap", {PartitionKind.WHOLE, PartitionKind.CAP}),
    ],
)
def test_predictive_uses_only_the_slots_that_are_allowed(slots: str, kinds: set[PartitionKind]) -> None:
    options = predictive(slots=slots).options(signal())
    assert {option.decision.partition.kind for option in options} == kinds


@given(
    st.integers(1, 8),
    st.integers(1, 2000),
    st.integers(0, 400),
    st.integers(0, 4000),
    st.integers(5, 400),
    st.lists(st.floats(0.1, 10.0), max_size=10),
)
def test_predictive_stays_within_its_bounds(
    decodes: int, context: int, resume: int, prefill: int, target_ms: int, ratios: list[float]
) -> None:
    controller = predictive(tpot_target_ns=target_ms * MS)
    at = signal(decodes=decodes, context=context, resume=resume, prefill=prefill)
    for ratio in [1.0, *ratios]:
        decision = controller.decide(at)
        assert decision.partition in TABLE.entries
        assert 1 <= decision.prefill_chunk <= 2048
        # None only where the prefill lane takes the resumes.
        assert decision.resume_budget >= (0 if resume and decision.partition is not TABLE.whole else 1)
        assert decision.resume_budget <= 2048
        controller.observe(observation(decision, round(ratio * 10 * MS), shape=at.decodes))


@given(st.integers(5, 100), st.integers(0, 100), st.integers(1, 6))
def test_predictive_with_a_looser_target_never_reads_prompts_slower(tight_ms: int, more_ms: int, decodes: int) -> None:
    at = signal(decodes=decodes)
    rates = []
    for target_ms in (tight_ms, tight_ms + more_ms):
        controller = predictive(tpot_target_ns=target_ms * MS)
        rates.append(predicted(controller, controller.decide(at), at)[1])
    # A split is kept for what is within the hysteresis.
    assert rates[0] < 1.1 * rates[1]


@example(47, 2.8125, 1)  # turns and the shared device promise almost the same
@given(st.integers(5, 60), st.floats(0.3, 3.0), st.integers(1, 6))
def test_predictive_comes_to_rest_under_a_constant_signal(target_ms: int, ratio: float, decodes: int) -> None:
    controller = predictive(tpot_target_ns=target_ms * MS)
    at = signal(decodes=decodes)
    cost = cost_model()
    decisions = []
    for _ in range(30):  # the stream runs alone for a while before the prompt comes
        alone = Decision(TABLE.whole, 16, 16)
        took_ns = round(ratio * cost.duration_ns(at.decodes, Lane.DECODE, TABLE.whole, False))
        controller.observe(observation(alone, took_ns, shape=at.decodes))
    for _ in range(600):
        decision = controller.decide(at)
        decisions.append(decision)
        turns = decision.partition.kind is PartitionKind.WHOLE
        shape = at.decodes.with_prefill(decision.prefill_chunk) if turns else at.decodes
        took_ns = round(ratio * cost.duration_ns(shape, Lane.DECODE, decision.partition, not turns))
        controller.observe(observation(decision, took_ns, shape=shape))
        if not turns:
            prefill = BatchShape().with_prefill(decision.prefill_chunk)
            took_ns = round(ratio * cost.duration_ns(prefill, Lane.PREFILL, decision.partition, True))
            controller.observe(observation(decision, took_ns, shape=prefill, lane=Lane.PREFILL))
    # A machine that is slower by one factor in everything: once that is known, nothing gives a reason to change.
    assert len(set(decisions[300:])) == 1


def test_predictive_leaves_a_partition_that_turns_out_to_be_slow() -> None:
    controller = predictive(tpot_target_ns=16 * MS)
    at = signal()
    first = controller.decide(at)
    assert first.partition.kind is not PartitionKind.WHOLE
    for _ in range(64):
        decision = controller.decide(at)
        turns = decision.partition.kind is PartitionKind.WHOLE
        # Anything beside another lane takes four times as long as was predicted.
        shape = at.decodes.with_prefill(decision.prefill_chunk) if turns else at.decodes
        factor = 1 if turns else 4
        took_ns = factor * cost_model().duration_ns(shape, Lane.DECODE, decision.partition, not turns)
        controller.observe(observation(decision, took_ns, shape=shape))
    assert controller.decide(at).partition.kind is PartitionKind.WHOLE


def test_predictive_does_not_change_partition_for_a_small_gain() -> None:
    """Along a load that grows slowly the partition changes a few times and never back and forth."""
    controller = predictive()
    chosen = [controller.decide(signal(decodes=2, context=context)).partition for context in range(1, 8000, 20)]
    changes = [b for a, b in itertools.pairwise(chosen) if a != b]
    assert len(changes) == len(set(changes))


def test_a_target_for_the_first_token_trades_smoothness_only_as_far_as_needed() -> None:
    at = signal(prefill=300)
    smooth = predictive(tpot_target_ns=100 * MS, ttft_target_ns=400 * MS, slots="off")
    fast = predictive(tpot_target_ns=100 * MS, ttft_target_ns=310 * MS, slots="off")
    slow_tpot, slow_rate = predicted(smooth, smooth.decide(at), at)
    fast_tpot, fast_rate = predicted(fast, fast.decide(at), at)
    assert slow_rate >= 750 and fast_rate >= 967  # 300 tokens in 0.4 s and in 0.31 s
    assert slow_tpot < fast_tpot <= 100 * MS


# ---- corrections and construction ----


SPLIT, STREAM, TURNS = ("decode", "split", False), ("decode", "stream", False), ("decode", "whole", True)


def test_corrections_are_what_modes_have_in_common_times_what_a_mode_differs_by() -> None:
    corrections = Corrections()
    assert corrections.factor(SPLIT) == 1.0
    corrections.observe(SPLIT, 1.5)
    assert corrections.factor(SPLIT) == pytest.approx(1.5**0.18)
    # Half of it is for all partitions with two lanes, and 5 % of the other half: 0.09 + 0.05 * 0.09.
    assert corrections.factor(STREAM) == pytest.approx(1.5**0.0945)
    assert corrections.factor(TURNS) == 1.0, "what two lanes do to each other says nothing about one"
    corrections.observe(TURNS, 1000.0)
    assert corrections.factor(TURNS) == pytest.approx(2.0**0.18), "an interrupted batch must not count for all"
    assert corrections.factor(STREAM) > 1.5**0.09, "a slow machine is slow in any partition"


def test_a_machine_that_slows_down_is_no_reason_to_change_the_mode() -> None:
    corrections = Corrections()
    for _ in range(200):
        corrections.observe(SPLIT, 1.0)
        corrections.observe(STREAM, 1.0)
    for _ in range(5):
        corrections.observe(SPLIT, 1.5)
    assert corrections.factor(SPLIT) > 1.2
    assert corrections.factor(SPLIT) / corrections.factor(STREAM) < 1.18


def test_what_a_mode_differs_by_is_learned_and_fades() -> None:
    corrections = Corrections()
    for _ in range(300):
        corrections.observe(SPLIT, 2.0)
        corrections.observe(TURNS, 1.0)
    assert corrections.factor(SPLIT) == pytest.approx(2.0, rel=0.15)
    assert corrections.factor(TURNS) == pytest.approx(1.0, rel=0.15)
    for _ in range(5000):
        corrections.observe(TURNS, 1.0)
    assert corrections.factor(SPLIT) == pytest.approx(1.0, rel=0.05), "it is tried again some day"


def test_one_slow_batch_does_not_make_the_mode_that_was_tried_look_worse_than_the_others() -> None:
    corrections = Corrections()
    for _ in range(50):
        corrections.observe(TURNS, 1.0)
    corrections.observe(SPLIT, 1.5)
    assert corrections.high_factor(SPLIT) < 1.1 * corrections.high_factor(STREAM)
    # A mode that is always uneven is known to be so.
    for index in range(200):
        corrections.observe(SPLIT, 1.4 if index % 2 else 0.7)
        corrections.observe(TURNS, 1.0)
    assert corrections.high_factor(SPLIT) > 1.3 * corrections.factor(SPLIT)


def test_the_default_target_is_twice_the_isolated_time_per_token() -> None:
    # One decode: 8 MB of weights and 256 tokens of 1 kB at 1 GB/s are 8.256 ms.
    values = engine_config("predictive", tpot_target_ns=None)
    assert tpot_target_ns(values, TABLE, cost_model()) == pytest.approx(2 * 8.256 * MS, rel=1e-6)


def test_a_controller_without_what_it_needs_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs a profile"):
        build_controller(engine_config("predictive"), TABLE, None)
    with pytest.raises(ConfigError, match="needs a target"):
        build_controller(engine_config("reactive", tpot_target_ns=None), TABLE, None)


@pytest.mark.parametrize(
    "values",
    [
        {"controller": "clever"},
        {"slots": "green"},
        {"objective": "speed"},
        {"tpot_target_ns": 0},
        {"ttft_target_ns": -5},
        {"decode_share": 1.0},
        {"theta_low": 1.0},
        {"theta_low": 0.0},
        {"min_resume_budget": 600},
        {"resume_budget_step": 0},
        {"interval_ns": -1},
        {"hysteresis": -0.1},
    ],
)
def test_what_cannot_work_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ControlConfig(**values)
