"""The predictive controller looks at a part of its options only: it must decide as if it had looked at all of them."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from agentserve.config import OBJECTIVES, SLOTS, ControlConfig
from agentserve.core.batch import Batch, Lane, ScheduledChunk
from agentserve.core.controllers import BatchObservation, ControlSignal, Decision
from agentserve.core.controllers.merit import Merit, Option
from agentserve.core.controllers.outlook import Outlook, Way
from agentserve.core.controllers.predictive import PredictiveController
from agentserve.core.costmodel import BatchShape, CostModel, ModelShape
from agentserve.core.request import WorkClass
from agentserve.core.slots import build_partition_table
from agentserve.profiles import load_profile
from tests.core.builders import MS, config, cost_model


class Exhaustive(PredictiveController):
    """The same controller with all partitions, all chunks for taking turns, and all budgets for resumes.

    It keeps no prediction: each is made anew by the cost model, from the batch's shape.
    """

    def _outlook(self, signal: ControlSignal) -> tuple[Outlook, Merit]:
        _, merit = super()._outlook(signal)
        return Anew(self._cost, self._corrections, signal, self._whole), merit

    def _best_turns(self, outlook: Outlook, *_: Any) -> list[Option]:
        return [self._turns(outlook, chunk) for chunk in self._chunks]

    def _best_two_lanes(self, outlook: Outlook, floor: float, merit: Merit, others: list[Option]) -> list[Option]:
        ways = self._ways if outlook.num_pending else ()
        # With its budget at once.
        return [self._with_budget(self._two_lanes(outlook, way, merit), outlook) for way in ways]

    def _resume_budget(self, outlook: Outlook, way: Way) -> tuple[int, float]:
        found: tuple[int, float] | None = None
        for budget in self._budgets:
            tpot_ns = outlook.decode_ns(way, budget)
            if found is not None and tpot_ns > self._target_ns:
                break
            found = (budget, tpot_ns)
        assert found is not None
        return found


class Anew(Outlook):
    """An outlook that keeps nothing."""

    def decode_ns(self, way: Way, num_riding: int) -> float:
        decodes = self.signal.decodes
        return self._duration_ns(
            decodes.with_prefill(num_riding, self.signal.riding_start) if num_riding else decodes, way
        )

    def turn_ns(self, num_tokens: int) -> float:
        start = self.signal.prefill_start or self.signal.riding_start
        return self._duration_ns(self.signal.decodes.with_prefill(num_tokens, start), self.whole)

    def lane_rate(self, way: Way, num_tokens: int) -> float:
        start = self.signal.prefill_start if self.signal.num_prefill_tokens else self.signal.riding_start
        shape = BatchShape().with_prefill(num_tokens, start)
        predicted_ns = self._cost.duration_ns(shape, Lane.PREFILL, way.partition, True)
        return num_tokens * 1e9 / (predicted_ns * self._corrections.factor((Lane.PREFILL, way.partition.kind, False)))

    def _duration_ns(self, shape: BatchShape, way: Way) -> float:
        predicted_ns = self._cost.duration_ns(shape, Lane.DECODE, way.partition, way is not self.whole)
        mode = (Lane.DECODE, way.partition.kind, shape.num_prefill_tokens > 0)
        return predicted_ns * self._corrections.high_factor(mode) + self._corrections.gap_ns


SMALL = cost_model()
LARGE = CostModel(
    load_profile("rtx-5090"),
    ModelShape(7_000_000_000, 500_000_000, 15_000_000_000, 57_344, 4 * 28 * 3584, 28, 28, 4),
)
SIGNALS = st.builds(
    lambda decodes, context, resume, prefill, waiting, prompts, starts, oldest, running, ahead: ControlSignal(
        now_ns=10**9,
        decodes=BatchShape(num_decodes=decodes, num_decode_context=decodes * context, num_samples=decodes),
        num_resume_tokens=resume,
        num_prefill_tokens=prefill,
        num_waiting_prefill_tokens=min(waiting, prefill),
        num_prompts=prompts,
        prefill_start=starts[0] if prefill else 0,
        riding_start=starts[1],
        oldest_prefill_arrival_ns=oldest,
        decode_running_ns=running,
        decode_is_ahead=ahead,
    ),
    decodes=st.integers(1, 64),
    context=st.integers(1, 8000),
    resume=st.just(0) | st.integers(0, 2000),
    prefill=st.just(0) | st.integers(0, 20_000),
    waiting=st.just(0) | st.integers(0, 10_000),
    prompts=st.integers(0, 20),
    starts=st.tuples(st.integers(0, 4000), st.integers(0, 4000)),
    oldest=st.none() | st.integers(0, 10**9),
    running=st.none() | st.integers(0, 50 * MS),
    ahead=st.booleans(),
)


@settings(max_examples=150)
@given(
    signals=st.lists(st.tuples(SIGNALS, st.floats(0.3, 3.0)), min_size=1, max_size=12),
    large=st.booleans(),
    target_ms=st.integers(3, 120),
    ttft_ms=st.none() | st.integers(50, 3000),
    slots=st.sampled_from(SLOTS),
    hysteresis=st.sampled_from([0.0, 0.1, 0.5]),
    budgets=st.sampled_from([(16, 512), (1, 8192), (300, 300)]),
    objective=st.sampled_from(OBJECTIVES),
)
def test_the_search_decides_as_all_options_and_all_budgets_would(
    signals: list[tuple[ControlSignal, float]],
    large: bool,
    target_ms: int,
    ttft_ms: int | None,
    slots: str,
    hysteresis: float,
    budgets: tuple[int, int],
    objective: str,
) -> None:
    control = ControlConfig(
        slots=slots,
        tpot_target_ns=target_ms * MS,
        ttft_target_ns=None if ttft_ms is None else ttft_ms * MS,
        hysteresis=hysteresis,
        min_resume_budget=budgets[0],
        max_resume_budget=budgets[1],
        objective=objective,
    )
    cost = LARGE if large else SMALL
    units = cost.device.compute_units
    table = build_partition_table(units, cost.device.unit_granularity, cost.device.min_units)
    values = config(max_num_batched_tokens=8192, control=control)
    controllers = [kind(values, table, cost, target_ms * MS) for kind in (PredictiveController, Exhaustive)]
    for at, ratio in signals:
        searched, exhaustive = (controller.decide(at) for controller in controllers)
        assert searched == exhaustive
        for controller in controllers:
            controller.observe(decode_batch(searched, at, cost, ratio))


def decode_batch(decision: Decision, at: ControlSignal, cost: CostModel, ratio: float) -> BatchObservation:
    """A batch with as much of the budget as there is, which takes `ratio` times what is predicted."""
    riding = min(decision.resume_budget, at.num_resume_tokens)
    shape = at.decodes.with_prefill(riding) if riding else at.decodes
    co_running = decision.partition.kind != "whole"
    took_ns = round(ratio * cost.duration_ns(shape, Lane.DECODE, decision.partition, co_running))
    chunk = ScheduledChunk("r", WorkClass.DECODE, 5, (1,), (0,), None)
    batch = Batch(0, Lane.DECODE, decision.partition, co_running, (chunk,))
    return BatchObservation(batch, shape, took_ns, 0, took_ns + MS, co_running, not co_running)


def test_a_plan_costs_few_predictions() -> None:
    """The reason for all this. Of 16 chunks, and 19 partitions with 12 budgets each, few need a prediction."""
    asked = 0

    class Counting(CostModel):
        def work_ns(self, shape: BatchShape, units: int) -> float:
            nonlocal asked
            asked += 1
            return super().work_ns(shape, units)

    cost = Counting(LARGE.device, LARGE.model)
    table = build_partition_table(170, 2, 16)
    values = config(max_num_batched_tokens=2048, control=ControlConfig(tpot_target_ns=25 * MS))
    counts = []
    for kind in (PredictiveController, Exhaustive):
        controller = kind(values, table, cost, 25 * MS)
        for num_decodes in (7, 8):  # what depends on the partition alone is predicted once, with the first plan
            shape = BatchShape(num_decodes=num_decodes, num_decode_context=3000 * num_decodes, num_samples=num_decodes)
            asked = 0
            controller.decide(ControlSignal(0, shape, 0, 5000, 0, 1, 0, 0, None))
        counts.append(asked)
    assert counts[0] * 4 < counts[1], counts
