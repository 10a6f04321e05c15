"""The default controller: asks the cost model what each way to share the device would do, and takes the best.

Each *option* is a partition with a chunk size. Its predicted time between two tokens must stay under the target; of
those that do, the one with the most prefill progress wins. Options are the splits, the caps, the shared device, and
taking turns (prompts in the batches of the decodes), so a split is made only where it is predicted to pay: aggregate by
default and split on a predicted violation is DuetServe's rule (section 4), of which this is the general form. Short
resumes may ride in the batches of the decodes or go to the prefill lane, which does not have to wait for the end of a
batch that is running.

Predictions are corrected by what was measured, per way of sharing. A change of partition must promise more than the
hysteresis.
"""

from __future__ import annotations

from dataclasses import dataclass

from agentserve.config import EngineConfig
from agentserve.core.batch import Lane
from agentserve.core.controllers import BatchObservation, ControlSignal, Decision
from agentserve.core.controllers.correction import Corrections, Mode
from agentserve.core.costmodel import BatchShape, CostModel
from agentserve.core.slots import PartitionKind, PartitionTable, SlotPartition

_CHUNKS = (16, 32, 48, 64, 96, 128, 160, 192, 256, 320, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
_NEAR_END = 3
"""A chunk of the prefill lane that takes no longer than this multiple of the target is never too long: so near may the
next batch boundary be."""
_FAR_END, _MUCH_BETTER = 6, 1.1
"""Up to this multiple if that promises so much more: a device that is fast only with long chunks gets them."""
_MIN_PREFILL_SHARE = 0.25
"""Options that leave prefill less than this share of its lone rate are not taken while there are others: a queue of
prompts that grows without bound helps nobody's time per token in the end."""
_LEAST_SLOWDOWN = 1.4
"""Decodes may always be slowed down this much: a batch that misses the target by itself is no reason to read nothing."""
_MAX_AGE = 8
"""Decisions for which a plan is kept while the work stays alike."""
_CONTEXT_STEP = 256
"""A plan is kept while the context of the decodes grows by less than this per sequence."""


@dataclass(frozen=True, slots=True)
class Option:
    """A way to share the device, and what is predicted of it."""

    decision: Decision
    tpot_ns: float
    prefill_rate: float
    """Prompt tokens per second."""


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
        slots = config.control.slots
        self._shared = {
            "auto": (*table.splits, *table.caps, table.stream),
            "cap": table.caps or (table.stream,),
            "stream": (table.stream,),
            "off": (),
        }[slots]
        self._corrections = Corrections()
        self._lane_chunks = {p: self._lane_chunk(p, p.kind is not PartitionKind.WHOLE) for p in self._shared}
        self._lone_chunk = self._lane_chunk(table.whole, co_running=False)
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
            return Decision(self._table.whole, self._lone_chunk, self._lone_chunk)
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
        options = self.options(signal)
        needed_rate = self._needed_rate(signal)
        target_ns = self._target_for(signal)
        floor = _MIN_PREFILL_SHARE * self._lone_rate(signal)
        fast_enough = [o for o in options if o.prefill_rate >= floor] or [max(options, key=lambda o: o.prefill_rate)]

        def merit(option: Option) -> tuple[float, float]:
            """Smaller is better: by how much a target is missed, then what matters among those that meet it."""
            missed = max(option.tpot_ns / target_ns, 1.0)
            if self._ttft_target_ns is None:
                return (missed, -option.prefill_rate)
            # In time is early enough: then the smoother stream is the better one.
            return (max(missed, needed_rate / option.prefill_rate), option.tpot_ns)

        best = min(fast_enough, key=merit)
        present = min((o for o in fast_enough if self._is_present(o)), key=merit, default=None)
        if present is None or present is best:
            return best
        missed_alike = merit(present)[0] <= merit(best)[0] * (1.0 + self._hysteresis / 2)
        if missed_alike and best.prefill_rate < present.prefill_rate * (1.0 + self._hysteresis):
            return present
        return best

    def _target_for(self, signal: ControlSignal) -> float:
        """The target, or what prompts may slow these decodes down to in any case, if that is more."""
        alone_ns = self._predict_tpot(signal.decodes, self._table.whole, False)
        return max(float(self._target_ns), _LEAST_SLOWDOWN * alone_ns)

    def _is_present(self, option: Option) -> bool:
        return self._plan is not None and option.decision.partition == self._plan.decision.partition

    def options(self, signal: ControlSignal) -> list[Option]:
        """All ways to share the device with this work."""
        found = [self._turns(signal, chunk) for chunk in self._chunks]
        if signal.num_prefill_tokens > 0:
            found += [self._side_by_side(signal, partition) for partition in self._shared]
        elif signal.num_resume_tokens > 0:
            found += [self._apart(signal, partition) for partition in self._shared]
        return found

    def _turns(self, signal: ControlSignal, chunk: int) -> Option:
        """Everything in one lane, on the whole device."""
        pending = signal.num_prefill_tokens + signal.num_resume_tokens
        chunk_now = min(chunk, max(pending, 1))
        shape = signal.decodes.with_prefill(chunk_now, signal.prefill_start or signal.riding_start)
        tpot_ns = self._predict_tpot(shape, self._table.whole, False)
        rate = self._delayed(signal, chunk_now * 1e9 / tpot_ns, pending)
        return Option(Decision(self._table.whole, chunk, chunk), tpot_ns, rate)

    def _side_by_side(self, signal: ControlSignal, partition: SlotPartition) -> Option:
        """Cold and long prompts in the prefill lane; short resumes, and who waits for that lane, with the decodes."""
        chunk = self._lane_chunks[partition]
        rate = self._lane_rate(partition, min(chunk, signal.num_prefill_tokens), signal.prefill_start)
        budget, tpot_ns = self._resume_budget(signal, partition)
        shares = tpot_ns <= self._target_ns
        riding = signal.num_resume_tokens + (signal.num_waiting_prefill_tokens if shares else 0)
        if riding > 0:
            rate += self._delayed(signal, min(budget, riding) * 1e9 / tpot_ns, riding)
        else:
            tpot_ns = self._predict_tpot(signal.decodes, partition, True)
        return Option(Decision(partition, budget, chunk, shares), tpot_ns, rate)

    def _apart(self, signal: ControlSignal, partition: SlotPartition) -> Option:
        """Short resumes in the prefill lane, which nobody else needs, and nothing but decodes in the other one."""
        chunk = self._lane_chunks[partition]
        rate = self._lane_rate(partition, min(chunk, signal.num_resume_tokens), signal.riding_start)
        return Option(Decision(partition, 0, chunk), self._predict_tpot(signal.decodes, partition, True), rate)

    def _lane_rate(self, partition: SlotPartition, num_tokens: int, start: int) -> float:
        """Prompt tokens per second of the prefill lane beside a busy decode lane."""
        shape = BatchShape().with_prefill(num_tokens, start)
        return num_tokens * 1e9 / self._predict(shape, Lane.PREFILL, partition, True)

    def _delayed(self, signal: ControlSignal, rate: float, num_tokens: int) -> float:
        """The rate of prompts that ride with the decodes, given that they wait for what runs there now."""
        if signal.decode_running_ns is None:
            return rate
        batch_ns = self._predict_tpot(signal.decodes, self._table.whole, False)
        wait_ns = max(0.0, batch_ns - signal.decode_running_ns) + (batch_ns if signal.decode_is_ahead else 0.0)
        return num_tokens * 1e9 / (wait_ns + num_tokens * 1e9 / rate) if num_tokens else rate

    def _resume_budget(self, signal: ControlSignal, partition: SlotPartition) -> tuple[int, float]:
        """The most resume tokens in a decode batch that keep the target, at least the configured minimum."""
        control = self._config.control
        found: tuple[int, float] | None = None
        for budget in (control.min_resume_budget, *self._chunks):
            if not control.min_resume_budget <= budget <= control.max_resume_budget:
                continue
            shape = signal.decodes.with_prefill(budget, signal.riding_start)
            tpot_ns = self._predict_tpot(shape, partition, True)
            if found is not None and tpot_ns > self._target_ns:
                break
            found = (budget, tpot_ns)
        assert found is not None
        return found

    # ---- predictions ----

    def _predict(self, shape: BatchShape, lane: Lane, partition: SlotPartition, co_running: bool) -> float:
        predicted_ns = self._cost.duration_ns(shape, lane, partition, co_running)
        return predicted_ns * self._corrections.factor(self._mode(lane, partition, shape))

    def _predict_tpot(self, shape: BatchShape, partition: SlotPartition, co_running: bool) -> float:
        """Time between two tokens with batches of this shape, as most of them will keep it."""
        predicted_ns = self._cost.duration_ns(shape, Lane.DECODE, partition, co_running)
        mode = self._mode(Lane.DECODE, partition, shape)
        return predicted_ns * self._corrections.high_factor(mode) + self._corrections.gap_ns

    @staticmethod
    def _mode(lane: Lane, partition: SlotPartition, shape: BatchShape) -> Mode:
        """What shares a correction."""
        return (lane.value, partition.kind.value, bool(shape.num_decodes and shape.num_prefill_tokens))

    def _lone_rate(self, signal: ControlSignal) -> float:
        prefill = BatchShape().with_prefill(self._lone_chunk, signal.prefill_start)
        return self._lone_chunk * 1e9 / self._predict(prefill, Lane.PREFILL, self._table.whole, False)

    def _needed_rate(self, signal: ControlSignal) -> float:
        """Prompt tokens per second that bring the first token of the oldest prompt in time."""
        if self._ttft_target_ns is None or signal.oldest_prefill_arrival_ns is None:
            return 0.0
        left_ns = signal.oldest_prefill_arrival_ns + self._ttft_target_ns - signal.now_ns
        pending = signal.num_prefill_tokens + signal.num_resume_tokens
        return pending * 1e9 / max(left_ns, self._target_ns)

    def _lane_chunk(self, partition: SlotPartition, co_running: bool) -> int:
        """The longest chunk whose end is near: longer ones are no slower per token, and need fewer batches."""
        durations = {
            chunk: self._cost.duration_ns(BatchShape().with_prefill(chunk), Lane.PREFILL, partition, co_running)
            for chunk in self._chunks
        }

        def longest(limit: int) -> int:
            within = [chunk for chunk in self._chunks if durations[chunk] <= limit * self._target_ns]
            return max(within, default=self._chunks[0])

        near, far = longest(_NEAR_END), longest(_FAR_END)
        return far if far / durations[far] > _MUCH_BETTER * near / durations[near] else near
