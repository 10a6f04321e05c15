"""The default controller: asks the cost model what each way to share the device would do, and takes the best.

Each *option* is a partition with a chunk size. The one wins with which all agents together lose the least time for a
prompt token, those who wait for their first token and those whose streams are slower meanwhile (`merit.gain_of`); delay
beyond the target counts more. With a target that somebody asked for it is a limit, and the one with the most prompt
tokens per second under it wins, since the price in delay is named. Options are the splits, the caps, the shared device,
and taking turns (prompts in the batches of the decodes), so the device is split only where that is predicted to pay:
aggregate by default and split on a predicted violation is DuetServe's rule (section 4), of which this is the general
form. Short resumes may ride in the batches of the decodes or go to the prefill lane, which does not have to wait for
the end of a batch that is running.

A longer chunk never makes a batch shorter, so not every option has to be looked at; the plan is the same.

Predictions are corrected by what was measured, per way of sharing. A change of partition must promise more than the
hysteresis, and so must whatever is to be taken instead of a split: in a split the lanes disturb each other least, so
its prediction is the safest.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right

from agentserve.config import EngineConfig
from agentserve.core.batch import Lane
from agentserve.core.controllers import BatchObservation, ControlSignal, Decision, DecodeSteps, follow_singly
from agentserve.core.controllers.correction import Corrections, Mode
from agentserve.core.controllers.merit import Merit, Option, rate_in_turn
from agentserve.core.controllers.outlook import CHUNK_LEVEL, Outlook, Way
from agentserve.core.costmodel import BatchShape, CostModel, prompt_shape
from agentserve.core.slots import PartitionKind, PartitionTable, SlotPartition

# Looking up a member of an enumeration costs as much as a call.
_PREFILL, _DECODE = Lane.PREFILL, Lane.DECODE
_SPLIT, _WHOLE = PartitionKind.SPLIT, PartitionKind.WHOLE
_CHUNKS = (16, 32, 48, 64, 96, 128, 160, 192, 256, 320, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
_NEAR_END = 4
"""A chunk of the prefill lane that takes no longer than this multiple of the target is never too long: so near may the
next batch boundary be."""
_FAR_END, _MUCH_BETTER = 6, 1.1
"""Up to this multiple if that promises so much more: a device that is fast only with long chunks gets them."""
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
        shared: tuple[SlotPartition, ...] = {
            "auto": (*table.splits, *table.caps, table.stream),
            "cap": table.caps or (table.stream,),
            "stream": (table.stream,),
            "off": (),
        }[slots]
        self._corrections = Corrections()
        self._ways = [Way(cost_model, partition) for partition in shared]
        self._splits = tuple(index for index, partition in enumerate(shared) if partition.kind is _SPLIT)
        self._index_of = {partition: index for index, partition in enumerate(shared)}
        self._whole = Way(cost_model, table.whole, co_running=False)
        self._turn_chunk = self._chunks[0]
        """The best one for taking turns, when that was asked last."""
        self._lone_chunk = self._longest_chunk(table.whole, co_running=False, factor=1.0)
        self._lone_decision = Decision(table.whole, self._lone_chunk, self._lone_chunk)
        self._plan: Option | None = None
        self._planned_for: tuple[int, bool, bool, bool, int, int] | None = None
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
            signal.num_prompts,
            signal.decodes.num_decode_context // (_CONTEXT_STEP * signal.decodes.num_decodes),
        )
        self._age += 1
        if self._plan is None or key != self._planned_for or self._age >= _MAX_AGE or self._ttft_target_ns is not None:
            self._plan = self._choose(signal)
            self._planned_for = key
            self._age = 0
        return self._plan.decision

    def follow(self, steps: DecodeSteps, present: Decision) -> tuple[int, Decision]:
        durations_ns = steps.durations_ns()
        is_odd = steps.is_shared and min(durations_ns, default=1) <= 0  # then it says something else of the other lane
        if self._plan is None or self._ttft_target_ns is not None or is_odd:
            return follow_singly(self, steps, present)
        done, count = 0, len(durations_ns)
        while done < count:
            decision = self.decide(steps.signal_of(done))
            if decision != present:
                return done, decision
            num_more = self._settle(steps, done)
            self._observe_all(steps, done, durations_ns[done : done + num_more])
            done += num_more
        return count, present

    def _settle(self, steps: DecodeSteps, index: int) -> int:
        """For how many batches, from this one on, `decide` says what it has said before this one; counts them."""
        num_left = len(steps.ends_ns) - index
        if not steps.signal.num_resume_tokens + steps.signal.num_prefill_tokens:
            return num_left
        shape = steps.shape_of(index)
        level = _CONTEXT_STEP * shape.num_decodes
        num_alike = -(-(level - shape.num_decode_context % level) // shape.num_decodes)
        num_batches = min(num_alike, _MAX_AGE - self._age, num_left)
        self._age += num_batches - 1
        return num_batches

    def _observe_all(self, steps: DecodeSteps, first: int, durations_ns: list[int]) -> None:
        """What `observe` does for each of these batches, from the one with this index on."""
        batch, shape, count = steps.batch, steps.shape_of(first), len(durations_ns)
        if batch.co_running == steps.is_shared:
            predicted_ns = self._cost.decode_durations(shape, batch.partition, steps.is_shared, count)
            durations_ns = [max(1, duration_ns) for duration_ns in durations_ns]
            self._corrections.observe_all(self._mode(batch.lane, batch.partition, shape), durations_ns, predicted_ns)
        self._corrections.observe_no_gaps(count)

    # ---- options ----

    def _choose(self, signal: ControlSignal) -> Option:
        outlook, merit = self._outlook(signal)
        floor = _MIN_PREFILL_SHARE * self._lone_rate(signal)
        options = self._best_turns(outlook, floor, merit)
        options += self._best_two_lanes(outlook, floor, merit, [o for o in options if o.prefill_rate >= floor])
        fast_enough = [option for option in options if option.prefill_rate >= floor]
        if not fast_enough:
            # Then nothing was left out.
            fast_enough = [max(options, key=lambda option: option.prefill_rate)]
        return self._with_budget(self._best(fast_enough, merit), outlook)

    def _outlook(self, signal: ControlSignal) -> tuple[Outlook, Merit]:
        outlook = Outlook(self._cost, self._corrections, signal, self._whole)
        # The target, or what prompts may slow these decodes down to in any case, if that is more.
        target_ns = max(float(self._target_ns), _LEAST_SLOWDOWN * outlook.alone_ns)
        merit = Merit(
            target_ns,
            self._config.control.objective,
            needed_rate=self._needed_rate(signal),
            alone_ns=outlook.alone_ns,
            num_decodes=signal.decodes.num_decodes,
            num_prompts=signal.num_prompts,
        )
        return outlook, merit

    def _best(self, options: list[Option], merit: Merit) -> Option:
        """The one with the most merit, unless a split or the present partition has hardly less."""
        best = min(options, key=merit)
        alike = [option for option in options if self._is_alike(option, best, merit)]
        splits = [option for option in alike if option.decision.partition.kind is _SPLIT]
        present = [option for option in splits or alike if self._is_present(option.decision.partition)]
        return min(present or splits or [best], key=merit)

    def _is_alike(self, option: Option, best: Option, merit: Merit) -> bool:
        """Whether an option has hardly less merit than the best one."""
        most_missed = merit(best)[0] * (1.0 + self._hysteresis / 2)
        return merit(option)[0] <= most_missed and merit.gain(option) > merit.gain(best) / (1.0 + self._hysteresis)

    def _is_present(self, partition: SlotPartition) -> bool:
        return self._plan is not None and partition == self._plan.decision.partition

    def options(self, signal: ControlSignal) -> list[Option]:
        """All ways to share the device with this work."""
        outlook, merit = self._outlook(signal)
        turns = [self._turns(outlook, chunk) for chunk in self._chunks]
        lanes = [self._two_lanes(outlook, way, merit) for way in self._ways] if outlook.num_pending else []
        return [self._with_budget(option, outlook) for option in (*turns, *lanes)]

    def _best_turns(self, outlook: Outlook, floor: float, merit: Merit) -> list[Option]:
        """Taking turns, without chunks that cannot be better than another one."""
        pending = outlook.num_pending
        most_tokens = min(pending, self._chunks[-1])
        # Chunks longer than all that is pending make the same batch.
        chunks = self._chunks[: bisect_left(self._chunks, pending) + 1]
        found: list[Option] = []
        best: Option | None = None
        known: Option | None = None
        if merit.weighs_delay:
            # What was best the last time is so again, mostly: then few others need be looked at.
            known = self._turns(outlook, min(self._turn_chunk, chunks[-1]))
            best = known if known.prefill_rate >= floor else None
        for chunk in chunks:
            if known is not None and chunk == known.decision.prefill_chunk:
                option = known
            elif best is not None and found and self._reads_little(outlook, chunk, found[-1], merit, best):
                continue
            else:
                option = self._turns(outlook, chunk)
            if best is not None and merit.is_hopeless(option, most_tokens, best, self._hysteresis):
                break  # nor is any longer one better
            found.append(option)
            if option.prefill_rate >= floor and (best is None or merit(option) < merit(best)):
                best = option
        if best is not None:
            self._turn_chunk = best.decision.prefill_chunk
        return found

    @staticmethod
    def _reads_little(outlook: Outlook, chunk: int, shorter: Option, merit: Merit, best: Option) -> bool:
        """Whether a chunk would be worse than the best one even if it took no longer than a shorter one."""
        if not merit.weighs_delay:
            return False
        pending = outlook.num_pending
        rate = outlook.delayed(min(chunk, max(pending, 1)) * 1e9 / shorter.tpot_ns, pending)
        return merit.is_beaten(shorter.tpot_ns, rate, best, 0.0)

    def _best_two_lanes(self, outlook: Outlook, floor: float, merit: Merit, others: list[Option]) -> list[Option]:
        """Two lanes at once, without partitions that cannot be chosen whatever becomes of their details.

        `others`: options that are there anyway, and fast enough.
        """
        if not outlook.num_pending:
            return []
        best = min(others, key=merit, default=None)
        options: dict[int, Option] = {}
        present = None if self._plan is None else self._index_of.get(self._plan.decision.partition)
        # What is in place is looked at first: it will mostly be the best again, and then others are soon beaten.
        order = range(len(self._ways)) if present is None else (present, *range(len(self._ways)))
        # Only splits, and what is in place, are ever chosen with less merit than the best one.
        for margin, indices in ((0.0, order), (self._hysteresis, self._splits)):
            if margin and present in self._splits and merit.weighs_delay and best is not None:
                kept = options.get(present)
                if kept is not None and kept.prefill_rate >= floor and self._is_alike(kept, best, merit):
                    break  # it stays, whatever other splits promise
            for index in indices:
                way, least_gain = self._ways[index], self._hysteresis if index == present else margin
                if index in options or (best is not None and self._is_beaten(outlook, way, merit, best, least_gain)):
                    continue
                option = options[index] = self._two_lanes(outlook, way, merit)
                if option.prefill_rate >= floor and (best is None or merit(option) < merit(best)):
                    best = option
        return [options[index] for index in sorted(options)]

    def _is_beaten(self, outlook: Outlook, way: Way, merit: Merit, best: Option, margin: float) -> bool:
        """Whether a way is worse than this option by more than the margin, judged by how fast its lanes are at most."""
        signal = outlook.signal
        num_resume_tokens, num_prefill_tokens = signal.num_resume_tokens, signal.num_prefill_tokens
        chunk = self._lane_chunk(outlook, way)
        # A prompt that ends within the chunk: its rate is as easily told as a limit to it.
        num_tokens = min(chunk, num_prefill_tokens or num_resume_tokens)
        rate = outlook.most_lane_rate(way, chunk) if num_tokens == chunk else outlook.lane_rate(way, num_tokens)
        if not merit.is_beaten(outlook.decode_ns(way, 0), rate, best, margin):
            return False
        num_riding = num_resume_tokens + signal.num_waiting_prefill_tokens
        if not num_prefill_tokens or not num_riding:
            return True
        least_ns = outlook.decode_ns(way, self._budgets[0])
        rate += outlook.delayed(min(self._budgets[-1], num_riding) * 1e9 / least_ns, num_riding)
        return merit.is_beaten(least_ns, rate, best, margin)

    def _two_lanes(self, outlook: Outlook, way: Way, merit: Merit) -> Option:
        """What a partition does with this work, at its best."""
        if outlook.signal.num_prefill_tokens > 0:
            return self._side_by_side(outlook, way, merit)
        # Short resumes in the prefill lane, which nobody else needs, and nothing but decodes in the other one.
        chunk = self._lane_chunk(outlook, way)
        rate = outlook.lane_rate(way, min(chunk, outlook.signal.num_resume_tokens))
        return Option(Decision(way.partition, 0, chunk), outlook.decode_ns(way, 0), rate)

    def _turns(self, outlook: Outlook, chunk: int) -> Option:
        """Everything in one lane, on the whole device."""
        pending = outlook.num_pending
        chunk_now = min(chunk, max(pending, 1))
        tpot_ns = outlook.turn_ns(chunk_now)
        rate = outlook.delayed(chunk_now * 1e9 / tpot_ns, pending)
        return Option(Decision(self._table.whole, chunk, chunk), tpot_ns, rate)

    def _side_by_side(self, outlook: Outlook, way: Way, merit: Merit) -> Option:
        """Cold and long prompts in the prefill lane; short resumes, and who waits for that lane, with the decodes."""
        signal = outlook.signal
        num_resume_tokens, num_waiting_tokens = signal.num_resume_tokens, signal.num_waiting_prefill_tokens
        chunk = self._lane_chunk(outlook, way)
        lane_rate = outlook.lane_rate(way, min(chunk, signal.num_prefill_tokens))
        best_ns, best_rate, best_budget, best_shares = outlook.decode_ns(way, 0), lane_rate, _UNDECIDED, False
        is_first = num_resume_tokens > 0  # some resume rides, whatever the target says
        for budget in self._budgets if num_resume_tokens + num_waiting_tokens else ():
            tpot_ns = outlook.decode_ns(way, budget)
            shares = tpot_ns <= self._target_ns
            if not (shares or is_first):
                break
            riding = num_resume_tokens + (num_waiting_tokens if shares else 0)
            riding_rate = outlook.delayed(min(budget, riding) * 1e9 / tpot_ns, riding)
            guest_rate = riding_rate * max(0, min(budget, riding) - num_resume_tokens) / min(budget, riding)
            rate = rate_in_turn(lane_rate, guest_rate) + riding_rate - guest_rate
            if not is_first:
                # The first riders disturb the decodes: they must promise more than the hysteresis.
                least = merit.gain_of(best_ns, best_rate) * (1.0 if best_shares else 1.0 + self._hysteresis)
                if merit.gain_of(tpot_ns, rate) < least or merit.of(tpot_ns, rate)[0] > merit.of(best_ns, best_rate)[0]:
                    break  # with the next budget a little more rides, and every token takes longer
            best_ns, best_rate, best_budget, best_shares, is_first = tpot_ns, rate, budget, shares, False
        return Option(Decision(way.partition, best_budget, chunk, best_shares), best_ns, best_rate)

    def _with_budget(self, option: Option, outlook: Outlook) -> Option:
        """The option with the budget for resumes that may come, which did not matter as long as there are none."""
        partition, chunk = option.decision.partition, option.decision.prefill_chunk
        if option.decision.resume_budget != _UNDECIDED:
            return option
        budget, tpot_ns = self._resume_budget(outlook, self._ways[self._index_of[partition]])
        decision = Decision(partition, budget, chunk, tpot_ns <= self._target_ns)
        return Option(decision, option.tpot_ns, option.prefill_rate)

    def _resume_budget(self, outlook: Outlook, way: Way) -> tuple[int, float]:
        """The most resume tokens in a decode batch that keep the target, at least the configured minimum.

        And the time between two tokens with so many.
        """

        def tpot_ns(budget: int) -> float:
            return outlook.decode_ns(way, budget)

        budget = self._budgets[bisect_right(self._budgets, float(self._target_ns), lo=1, key=tpot_ns) - 1]
        return budget, tpot_ns(budget)

    # ---- predictions ----

    @staticmethod
    def _mode(lane: Lane, partition: SlotPartition, shape: BatchShape) -> Mode:
        """What shares a correction."""
        return (lane, partition.kind, bool(shape.num_decodes and shape.num_prefill_tokens))

    def _lone_rate(self, signal: ControlSignal) -> float:
        prefill = prompt_shape(self._lone_chunk, signal.prefill_start)
        predicted_ns = self._cost.duration_ns(prefill, _PREFILL, self._table.whole, False)
        return self._lone_chunk * 1e9 / (predicted_ns * self._corrections.factor((_PREFILL, _WHOLE, False)))

    def _needed_rate(self, signal: ControlSignal) -> float | None:
        """Prompt tokens per second that bring the first token of the oldest prompt in time; None: no such target."""
        if self._ttft_target_ns is None:
            return None
        if signal.oldest_prefill_arrival_ns is None:
            return 0.0
        left_ns = signal.oldest_prefill_arrival_ns + self._ttft_target_ns - signal.now_ns
        return (signal.num_prefill_tokens + signal.num_resume_tokens) * 1e9 / max(left_ns, self._target_ns)

    def _lane_chunk(self, outlook: Outlook, way: Way) -> int:
        """The chunk of the prefill lane beside a busy decode lane, as long as measured times suggest."""
        level = outlook.prefill_level(way.kind)
        chunk = way.chunks.get(level)
        if chunk is None:
            chunk = way.chunks[level] = self._longest_chunk(way.partition, True, CHUNK_LEVEL**level)
        return chunk

    def _longest_chunk(self, partition: SlotPartition, co_running: bool, factor: float) -> int:
        """The longest chunk whose end is near: longer ones are no slower per token, and need fewer batches."""

        def duration_ns(chunk: int) -> float:
            shape = prompt_shape(chunk)
            return self._cost.duration_ns(shape, _PREFILL, partition, co_running) * factor

        def longest(limit: int) -> int:
            within = bisect_right(self._chunks, float(limit * self._target_ns), key=duration_ns)
            return self._chunks[max(0, within - 1)]

        near, far = longest(_NEAR_END), longest(_FAR_END)
        return far if far / duration_ns(far) > _MUCH_BETTER * near / duration_ns(near) else near
