"""The default controller: asks the cost model what each way to share the device would do, and takes the best.

Each *option* is a partition with a chunk size. The one with the most *power* wins: prompt tokens per second over the
time between two tokens, which is throughput over delay (Kleinrock 1979); delay beyond the target counts more. With a
target that somebody asked for it is a limit, and the one with the most prompt tokens per second under it wins, since
the price in delay is named. Options are the splits, the caps, the shared device, and taking turns
(prompts in the batches of the decodes), so the device is split only where that is predicted to pay: aggregate by
default and split on a predicted violation is DuetServe's rule (section 4), of which this is the general form. Short
resumes may ride in the batches of the decodes or go to the prefill lane, which does not have to wait for the end of a
batch that is running.

A longer chunk never makes a batch shorter, so not every option has to be looked at; the plan is the same.

Predictions are corrected by what was measured, per way of sharing. A change of partition must promise more than the
hysteresis, and so must whatever is to be taken instead of a split: in a split the lanes disturb each other least, so
its prediction is the safest.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator

from agentserve.config import EngineConfig
from agentserve.core.batch import Lane
from agentserve.core.controllers import BatchObservation, ControlSignal, Decision
from agentserve.core.controllers.correction import Corrections, Mode
from agentserve.core.controllers.merit import Merit, Option
from agentserve.core.costmodel import BatchShape, CostModel
from agentserve.core.slots import PartitionKind, PartitionTable, SlotPartition

# Looking up a member of an enumeration costs as much as a call.
_PREFILL, _DECODE = Lane.PREFILL, Lane.DECODE
_SPLIT = PartitionKind.SPLIT
_CHUNKS = (16, 32, 48, 64, 96, 128, 160, 192, 256, 320, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
_NEAR_END = 4
"""A chunk of the prefill lane that takes no longer than this multiple of the target is never too long: so near may the
next batch boundary be."""
_FAR_END, _MUCH_BETTER = 6, 1.1
"""Up to this multiple if that promises so much more: a device that is fast only with long chunks gets them."""
_CHUNK_LEVEL = 1.15
"""The chunk is chosen anew when the prefill lane turns out to be so much slower or faster than predicted."""
_LEAST_SLOWDOWN = 1.4
"""Decodes may always be slowed down this much: a batch that misses the target by itself is no reason to read
nothing."""
_MIN_PREFILL_SHARE = 0.25
"""Options that leave prefill less than this share of its lone rate are not taken while there are others: a queue of
prompts that grows without bound helps nobody's time per token in the end."""
_MAX_AGE = 8
"""Decisions for which a plan is kept while the work stays alike."""
_CONTEXT_STEP = 256
"""A plan is kept while the context of the decodes grows by less than this per sequence."""
_UNDECIDED = -1
"""A budget that is not needed to compare an option with others."""


class _DecodeWorks:
    """The work of decode batches with resumes, kept while a plan is made.

    Partitions that give the decode lane the same units differ only in what the other lane does to it.
    """

    def __init__(self, cost: CostModel, signal: ControlSignal) -> None:
        self._cost = cost
        self._decodes = signal.decodes
        self._start = signal.riding_start
        self._known: dict[tuple[int, int], float] = {}

    def get(self, units: int, num_resume_tokens: int) -> float:
        """Nanoseconds, as `CostModel.work_ns` has them."""
        work_ns = self._known.get((units, num_resume_tokens))
        if work_ns is None:
            work_ns = self._cost.work_ns(self._decodes.with_prefill(num_resume_tokens, self._start), units)
            self._known[units, num_resume_tokens] = work_ns
        return work_ns


class PredictiveController:
    """See the module."""

    def __init__(self, config: EngineConfig, table: PartitionTable, cost_model: CostModel, tpot_target_ns: int) -> None:
        self._config = config
        self._table = table
        self._cost = cost_model
        self._target_ns = tpot_target_ns
        self._ttft_target_ns = config.control.ttft_target_ns
        self._hysteresis = config.control.hysteresis
        limit = config.max_num_batched_tokens
        self._chunks = tuple(c for c in _CHUNKS if c <= limit) or (limit,)
        least, most = config.control.min_resume_budget, config.control.max_resume_budget
        self._budgets = (least, *(c for c in self._chunks if least < c <= most))
        slots = config.control.slots
        self._shared = {
            "auto": (*table.splits, *table.caps, table.stream),
            "cap": table.caps or (table.stream,),
            "stream": (table.stream,),
            "off": (),
        }[slots]
        self._corrections = Corrections()
        self._lane_chunks = {(p, 0): self._longest_chunk(p, co_running=True, factor=1.0) for p in self._shared}
        self._lone_chunk = self._longest_chunk(table.whole, co_running=False, factor=1.0)
        self._lone_decision = Decision(table.whole, self._lone_chunk, self._lone_chunk)
        self._plan: Option | None = None
        self._planned_for: tuple[int, bool, bool, bool, int] | None = None
        self._age = 0

    def observe(self, observation: BatchObservation) -> None:
        batch = observation.batch
        if not (observation.co_running or observation.alone):
            return  # neither the one nor the other: it says nothing about either
        predicted_ns = self._cost.duration_ns(observation.shape, batch.lane, batch.partition, observation.co_running)
        mode = self._mode(batch.lane, batch.partition, observation.shape)
        if batch.co_running == observation.co_running:
            self._corrections.observe(mode, observation.duration_ns / max(1, predicted_ns))
        if observation.since_previous_decode_ns is not None:
            self._corrections.observe_gap(observation.since_previous_decode_ns - observation.duration_ns)

    def decide(self, signal: ControlSignal) -> Decision:
        if signal.decodes.num_decodes == 0:
            # Nobody waits for a next token.
            self._planned_for = None
            return self._lone_decision
        if self._plan is not None and signal.num_resume_tokens + signal.num_prefill_tokens == 0:
            return self._plan.decision  # there is nothing to share the device with
        key = (
            signal.decodes.num_decodes,
            signal.num_resume_tokens > 0,
            signal.num_prefill_tokens > 0,
            signal.num_waiting_prefill_tokens > 0,
            signal.decodes.num_decode_context // (_CONTEXT_STEP * signal.decodes.num_decodes),
        )
        self._age += 1
        if self._plan is None or key != self._planned_for or self._age >= _MAX_AGE or self._ttft_target_ns is not None:
            self._plan = self._choose(signal)
            self._planned_for = key
            self._age = 0
        return self._plan.decision

    # ---- options ----

    def _choose(self, signal: ControlSignal) -> Option:
        merit = Merit(self._target_for(signal), self._needed_rate(signal), self._config.control.objective)
        floor = _MIN_PREFILL_SHARE * self._lone_rate(signal)
        wait_ns = self._wait_ns(signal)
        options = [*self._best_turns(signal, wait_ns, floor, merit), *self._two_lanes(signal, wait_ns, merit)]
        fast_enough = [option for option in options if option.prefill_rate >= floor]
        if not fast_enough:
            fast_enough = [max(self.options(signal), key=lambda option: option.prefill_rate)]
        return self._with_budget(self._best(fast_enough, merit), signal)

    def _best(self, options: list[Option], merit: Merit) -> Option:
        """The one with the most merit, unless a split or the present partition has hardly less."""
        best = min(options, key=merit)
        most_missed = merit(best)[0] * (1.0 + self._hysteresis / 2)
        least_gain = merit.gain(best) / (1.0 + self._hysteresis)
        alike = [o for o in options if merit(o)[0] <= most_missed and merit.gain(o) > least_gain]
        splits = [option for option in alike if option.decision.partition.kind is _SPLIT]
        present = [option for option in splits or alike if self._is_present(option)]
        return min(present or splits or [best], key=merit)

    def _is_present(self, option: Option) -> bool:
        return self._plan is not None and option.decision.partition == self._plan.decision.partition

    def _target_for(self, signal: ControlSignal) -> float:
        """The target, or what prompts may slow these decodes down to in any case, if that is more."""
        alone_ns = self._predict_tpot(signal.decodes, self._table.whole, False)
        return max(float(self._target_ns), _LEAST_SLOWDOWN * alone_ns)

    def options(self, signal: ControlSignal) -> list[Option]:
        """All ways to share the device with this work."""
        wait_ns = self._wait_ns(signal)
        turns = [self._turns(signal, chunk, wait_ns) for chunk in self._chunks]
        merit = Merit(self._target_for(signal), self._needed_rate(signal), self._config.control.objective)
        return [self._with_budget(option, signal) for option in (*turns, *self._two_lanes(signal, wait_ns, merit))]

    def _best_turns(self, signal: ControlSignal, wait_ns: float | None, floor: float, merit: Merit) -> list[Option]:
        """Taking turns, without chunks that cannot be better than a shorter one."""
        found: list[Option] = []
        best: Option | None = None
        pending = _pending(signal)
        for chunk in self._chunks:
            option = self._turns(signal, chunk, wait_ns)
            if best is not None and merit.is_hopeless(option, min(pending, self._chunks[-1]), best):
                break
            found.append(option)
            if option.prefill_rate >= floor and (best is None or merit(option) < merit(best)):
                best = option
            if chunk >= pending:
                break  # longer ones make the same batch
        return found

    def _two_lanes(self, signal: ControlSignal, wait_ns: float | None, merit: Merit) -> list[Option]:
        if signal.num_prefill_tokens > 0:
            works = _DecodeWorks(self._cost, signal)
            return [self._side_by_side(signal, partition, wait_ns, works, merit) for partition in self._shared]
        if signal.num_resume_tokens > 0:
            return [self._apart(signal, partition) for partition in self._shared]
        return []

    def _turns(self, signal: ControlSignal, chunk: int, wait_ns: float | None) -> Option:
        """Everything in one lane, on the whole device."""
        pending = _pending(signal)
        chunk_now = min(chunk, max(pending, 1))
        shape = signal.decodes.with_prefill(chunk_now, signal.prefill_start or signal.riding_start)
        tpot_ns = self._predict_tpot(shape, self._table.whole, False)
        rate = _delayed(wait_ns, chunk_now * 1e9 / tpot_ns, pending)
        return Option(Decision(self._table.whole, chunk, chunk), tpot_ns, rate)

    def _side_by_side(
        self,
        signal: ControlSignal,
        partition: SlotPartition,
        wait_ns: float | None,
        works: _DecodeWorks,
        merit: Merit,
    ) -> Option:
        """Cold and long prompts in the prefill lane; short resumes, and who waits for that lane, with the decodes."""
        chunk = self._lane_chunk(partition)
        lane_rate = self._lane_rate(partition, min(chunk, signal.num_prefill_tokens), signal.prefill_start)
        best: Option | None = None
        if signal.num_resume_tokens == 0:
            tpot_ns = self._predict_tpot(signal.decodes, partition, True)
            best = Option(Decision(partition, _UNDECIDED, chunk), tpot_ns, lane_rate)
        may_ride = signal.num_resume_tokens + signal.num_waiting_prefill_tokens > 0
        for budget, tpot_ns in self._riding_times(partition, works) if may_ride else ():
            shares = tpot_ns <= self._target_ns
            riding = signal.num_resume_tokens + (signal.num_waiting_prefill_tokens if shares else 0)
            if best is not None and not shares:
                break
            rate = lane_rate + _delayed(wait_ns, min(budget, riding) * 1e9 / tpot_ns, riding)
            option = Option(Decision(partition, budget, chunk, shares), tpot_ns, rate)
            if best is not None and not self._is_better(option, best, merit):
                break  # with the next budget a little more rides, and every token takes longer
            best = option
        assert best is not None, "some resume rides, whatever the target says"
        return best

    def _is_better(self, riding: Option, best: Option, merit: Merit) -> bool:
        """Whether more riders pay. The first ones disturb the decodes: they must promise more than the hysteresis."""
        least = merit.gain(best) * (1.0 if best.decision.shares_budget else 1.0 + self._hysteresis)
        return merit(riding)[0] <= merit(best)[0] and merit.gain(riding) >= least

    def _with_budget(self, option: Option, signal: ControlSignal) -> Option:
        """The option with the budget for resumes that may come, which did not matter as long as there are none."""
        partition, chunk = option.decision.partition, option.decision.prefill_chunk
        if option.decision.resume_budget != _UNDECIDED:
            return option
        budget, tpot_ns = self._resume_budget(partition, _DecodeWorks(self._cost, signal))
        decision = Decision(partition, budget, chunk, tpot_ns <= self._target_ns)
        return Option(decision, option.tpot_ns, option.prefill_rate)

    def _apart(self, signal: ControlSignal, partition: SlotPartition) -> Option:
        """Short resumes in the prefill lane, which nobody else needs, and nothing but decodes in the other one."""
        chunk = self._lane_chunk(partition)
        rate = self._lane_rate(partition, min(chunk, signal.num_resume_tokens), signal.riding_start)
        return Option(Decision(partition, 0, chunk), self._predict_tpot(signal.decodes, partition, True), rate)

    def _lane_rate(self, partition: SlotPartition, num_tokens: int, start: int) -> float:
        """Prompt tokens per second of the prefill lane beside a busy decode lane."""
        shape = BatchShape().with_prefill(num_tokens, start)
        return num_tokens * 1e9 / self._predict(shape, _PREFILL, partition, True)

    def _wait_ns(self, signal: ControlSignal) -> float | None:
        """How long prompts that ride with the decodes wait for what runs there now; None if that lane is idle."""
        if signal.decode_running_ns is None:
            return None
        batch_ns = self._predict_tpot(signal.decodes, self._table.whole, False)
        return max(0.0, batch_ns - signal.decode_running_ns) + (batch_ns if signal.decode_is_ahead else 0.0)

    def _resume_budget(self, partition: SlotPartition, works: _DecodeWorks) -> tuple[int, float]:
        """The most resume tokens in a decode batch that keep the target, at least the configured minimum.

        And the time between two tokens with so many.
        """
        tpot_ns = self._riding_time(partition, works)
        budget = self._budgets[bisect_right(self._budgets, float(self._target_ns), lo=1, key=tpot_ns) - 1]
        return budget, tpot_ns(budget)

    def _riding_times(self, partition: SlotPartition, works: _DecodeWorks) -> Iterator[tuple[int, float]]:
        """Budgets for resumes in decode batches, and the time between two tokens with so many; shortest first."""
        tpot_ns = self._riding_time(partition, works)
        return ((budget, tpot_ns(budget)) for budget in self._budgets)

    def _riding_time(self, partition: SlotPartition, works: _DecodeWorks) -> Callable[[int], float]:
        """The time between two tokens as a function of the resume tokens in each decode batch."""
        contention = self._cost.contention(_DECODE, partition)
        factor = self._corrections.high_factor((_DECODE, partition.kind, True))
        gap_ns, units = self._corrections.gap_ns, partition.decode_units

        def tpot_ns(budget: int) -> float:
            return self._cost.stretched_ns(works.get(units, budget), contention) * factor + gap_ns

        return tpot_ns

    # ---- predictions ----

    def _predict(self, shape: BatchShape, lane: Lane, partition: SlotPartition, co_running: bool) -> float:
        predicted_ns = self._cost.duration_ns(shape, lane, partition, co_running)
        return predicted_ns * self._corrections.factor(self._mode(lane, partition, shape))

    def _predict_tpot(self, shape: BatchShape, partition: SlotPartition, co_running: bool) -> float:
        """Time between two tokens with batches of this shape, as most of them will keep it."""
        predicted_ns = self._cost.duration_ns(shape, _DECODE, partition, co_running)
        mode = self._mode(_DECODE, partition, shape)
        return predicted_ns * self._corrections.high_factor(mode) + self._corrections.gap_ns

    @staticmethod
    def _mode(lane: Lane, partition: SlotPartition, shape: BatchShape) -> Mode:
        """What shares a correction."""
        return (lane, partition.kind, bool(shape.num_decodes and shape.num_prefill_tokens))

    def _lone_rate(self, signal: ControlSignal) -> float:
        prefill = BatchShape().with_prefill(self._lone_chunk, signal.prefill_start)
        return self._lone_chunk * 1e9 / self._predict(prefill, _PREFILL, self._table.whole, False)

    def _needed_rate(self, signal: ControlSignal) -> float | None:
        """Prompt tokens per second that bring the first token of the oldest prompt in time; None: no such target."""
        if self._ttft_target_ns is None:
            return None
        if signal.oldest_prefill_arrival_ns is None:
            return 0.0
        left_ns = signal.oldest_prefill_arrival_ns + self._ttft_target_ns - signal.now_ns
        return _pending(signal) * 1e9 / max(left_ns, self._target_ns)

    def _lane_chunk(self, partition: SlotPartition) -> int:
        """The chunk of the prefill lane beside a busy decode lane, as long as measured times suggest."""
        level = round(math.log(self._corrections.factor((_PREFILL, partition.kind, False)), _CHUNK_LEVEL))
        chunk = self._lane_chunks.get((partition, level))
        if chunk is None:
            chunk = self._longest_chunk(partition, True, _CHUNK_LEVEL**level)
            self._lane_chunks[partition, level] = chunk
        return chunk

    def _longest_chunk(self, partition: SlotPartition, co_running: bool, factor: float) -> int:
        """The longest chunk whose end is near: longer ones are no slower per token, and need fewer batches."""
        durations = {
            chunk: self._cost.duration_ns(BatchShape().with_prefill(chunk), _PREFILL, partition, co_running) * factor
            for chunk in self._chunks
        }

        def longest(limit: int) -> int:
            within = [chunk for chunk in self._chunks if durations[chunk] <= limit * self._target_ns]
            return max(within, default=self._chunks[0])

        near, far = longest(_NEAR_END), longest(_FAR_END)
        return far if far / durations[far] > _MUCH_BETTER * near / durations[near] else near


def _pending(signal: ControlSignal) -> int:
    """Prompt tokens that wait for any lane."""
    return signal.num_prefill_tokens + signal.num_resume_tokens


def _delayed(wait_ns: float | None, rate: float, num_tokens: int) -> float:
    """The rate of `num_tokens` that wait so long before they go at `rate`."""
    return num_tokens * 1e9 / (wait_ns + num_tokens * 1e9 / rate) if num_tokens and wait_ns is not None else rate
