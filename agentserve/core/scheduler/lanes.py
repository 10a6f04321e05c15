"""Our scheduler: two lanes and a controller.

The decode lane takes every running decode plus resume-prefill chunks within the budget; the prefill lane takes cold
and long resume prefills in chunks. A lane that runs alone gets the whole device; while both kinds of work are present
the controller's partition holds (AgentServe, section 4). If that is the whole device, the lanes take turns: prompts are
computed in the batches of the decode lane, as in Sarathi-Serve, and no batch of the prefill lane is started.
"""

from __future__ import annotations

from collections.abc import Sequence

from agentserve.config import EngineConfig
from agentserve.core.batch import Batch, Lane, ScheduledChunk
from agentserve.core.classify import classify, lane_of
from agentserve.core.controllers import Controller, ControlSignal, Decision, DecodeSteps
from agentserve.core.costmodel import BatchShape
from agentserve.core.events import ControlDecided, EngineEvent
from agentserve.core.memory.manager import MemoryManager
from agentserve.core.request import Request, RequestStatus
from agentserve.core.scheduler.runs import RunScheduler
from agentserve.core.slots import PartitionKind, PartitionTable, SlotPartition

# Looking up a member of an enumeration costs as much as a call.
_PREFILL = Lane.PREFILL
_DECODE = Lane.DECODE
_WHOLE = PartitionKind.WHOLE
_SHORT = 4
"""A prompt that needs less than one part in so many of a chunk shares its batch up to that part only."""


class LaneScheduler(RunScheduler):
    """See the module. The controller is asked at every step at which a lane is idle."""

    def __init__(
        self, config: EngineConfig, memory: MemoryManager, table: PartitionTable, controller: Controller
    ) -> None:
        super().__init__(config, memory, table, controller)
        self._decide = controller.decide
        self._decided: Decision | None = None
        """What the controller has said already at this step."""

    def _co_partition(self) -> SlotPartition:
        assert self.decision is not None
        partition = self.decision.partition
        # Taking turns, but the other lane is still busy from before: both have everything until that batch is done.
        return self._table.stream if partition.kind is _WHOLE else partition

    def _compose(self, now_ns: int, events: list[EngineEvent]) -> dict[Lane, list[ScheduledChunk]]:
        prefilling = self._prefilling()
        decision = self._decided or self._decide(self._signal(now_ns, prefilling))
        self._decided = None
        if decision != self.decision:
            self.decision = decision
            events.append(ControlDecided(now_ns, decision))
        short, long = self._by_lane(prefilling, decision.resume_budget)
        takes_turns = decision.partition.kind is _WHOLE
        chunks: dict[Lane, list[ScheduledChunk]] = {}
        looks_ahead = self._may_look_ahead()
        if looks_ahead or _DECODE not in self.in_flight:
            decodes = [*(self._continued() if looks_ahead else ()), *self._decodes(now_ns, events)]
            # A preemption may have taken blocks away.
            short, long = self._still_running(short), self._still_running(long)
            if takes_turns and (decodes or short) and _PREFILL not in self.in_flight:
                # All in one order: short ones that keep coming must not starve a long one.
                prompts = self._prompts(
                    now_ns, self._still_running(prefilling), self._room(decision.prefill_chunk, decodes), decodes
                )
            else:
                # Nobody's next token is delayed when nobody decodes: then the budget would only slow the resume down.
                budget = decision.resume_budget if decodes else max(decision.resume_budget, decision.prefill_chunk)
                # The first of the long ones is for the prefill lane, if that is idle.
                waiting = long if _PREFILL in self.in_flight else long[1:]
                guests = waiting if decision.shares_budget and decodes else []
                prompts = self._prompts(now_ns, [*short, *guests], self._room(budget, decodes), decodes)
            chunks[_DECODE] = decodes + prompts
        decode_lane_busy = _DECODE in self.in_flight or bool(chunks.get(_DECODE))
        if _PREFILL not in self.in_flight and not (takes_turns and decode_lane_busy):
            long = [request for request in long if not request.in_flight]
            chunks[_PREFILL] = self._prompts(now_ns, long, self._room(self._near_end(long, decision.prefill_chunk), []))
        return chunks

    # ---- runs ----

    def _continues_alone(self) -> bool:
        if (self.ahead is not None) != (self._config.decode_lookahead > 1):
            return False
        prefilling = self._prefilling()
        if not prefilling:
            return True
        decision = self.decision
        if decision is None or _PREFILL not in self.in_flight:
            return False
        short, long = self._by_lane(prefilling, decision.resume_budget)
        may_ride = short or (long if decision.shares_budget else [])
        room = min(decision.resume_budget, self._config.max_num_batched_tokens - len(self._decoding))
        return not may_ride or room <= 0

    def _agree(self, batch: Batch, shape: BatchShape, started_ns: int, ends_ns: Sequence[int]) -> int:
        assert self._controller is not None and self.decision is not None, "decodes run, but nobody has decided how"
        signal = self._signal(started_ns, self._prefilling(), shape)
        steps = DecodeSteps(batch, shape, started_ns, ends_ns, _PREFILL in self.in_flight, signal)
        num_batches, decision = self._controller.follow(steps, self.decision)
        if num_batches < len(ends_ns):
            self._decided = decision
        return num_batches

    # ---- batches ----

    @staticmethod
    def _near_end(prompts: list[Request], chunk: int) -> int:
        """The chunk, or a part of it for a first prompt that is done sooner: it must not wait for those behind it."""
        return max(chunk // _SHORT, min(chunk, prompts[0].num_remaining_prefill_tokens)) if prompts else chunk

    def _room(self, budget: int, decodes: list[ScheduledChunk]) -> int:
        return min(budget, self._config.max_num_batched_tokens - len(decodes))

    @staticmethod
    def _still_running(requests: list[Request]) -> list[Request]:
        return [request for request in requests if request.status is RequestStatus.RUNNING]

    def _by_lane(self, prefilling: list[Request], budget: int) -> tuple[list[Request], list[Request]]:
        """Requests whose prompts belong to the decode lane with this resume budget, and the others, each in order."""
        limit = budget * self._config.resume_max_steps
        short: list[Request] = []
        long: list[Request] = []
        for request in prefilling:
            work_class = classify(request, self._config.resume_min_cached_tokens)
            (short if lane_of(request, work_class, limit) is _DECODE else long).append(request)
        return short, long

    def _signal(self, now_ns: int, prefilling: list[Request], decodes: BatchShape | None = None) -> ControlSignal:
        """What the controller may know; `decodes` is given where the requests do not have their newest tokens yet."""
        if decodes is None:
            num_decodes, num_context = len(self._decoding), sum([len(request.token_ids) for request in self._decoding])
            decodes = BatchShape(num_decodes, num_context, num_samples=num_decodes)
        # Whoever decodes has its first token.
        waiting_since = [request.arrival_ns for request in self._reading if request.first_token_ns is None]
        # Who belongs to which lane is a matter of the budget, which is about to be decided: who may ride with the most.
        short, long = self._by_lane(prefilling, self._config.control.max_resume_budget)
        in_prefill_lane = self.in_flight.get(_PREFILL)
        waiting = long if in_prefill_lane else long[1:]
        assert self._observer is not None, "there is a controller"
        decode_since_ns = self._observer.running_since_ns(_DECODE)
        return ControlSignal(
            now_ns=now_ns,
            decodes=decodes,
            num_resume_tokens=_remaining(short),
            num_prefill_tokens=_remaining(long) + (in_prefill_lane.num_tokens if in_prefill_lane else 0),
            num_waiting_prefill_tokens=_remaining(waiting),
            num_prompts=len(self._reading),
            prefill_start=long[0].num_computed_tokens if long else 0,
            riding_start=next((request.num_computed_tokens for request in (*short, *waiting)), 0),
            oldest_prefill_arrival_ns=min(waiting_since, default=None),
            decode_running_ns=None if decode_since_ns is None else now_ns - decode_since_ns,
            decode_is_ahead=self.ahead is not None,
        )


def _remaining(prompts: list[Request]) -> int:
    return sum([request.num_remaining_prefill_tokens for request in prompts])
