"""Between the engine and the policies: keeps the books, asks, and does what they say.

A policy that raises is out for the rest of the run: the built-in takes its seat, and an event says so.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial

from agentserve.config import EngineConfig
from agentserve.core.agents.calls import OpenCall
from agentserve.core.agents.factory import Seats
from agentserve.core.agents.held import HeldCalls
from agentserve.core.agents.hooks import SeatedHooks
from agentserve.core.agents.isolation import Isolation
from agentserve.core.agents.policy import (
    Action,
    Admit,
    Policy,
    Prefetch,
    Reprioritize,
    TurnEvent,
    TurnKind,
)
from agentserve.core.agents.ports import IdleLanes, Queues
from agentserve.core.agents.prefetch import PrefetchQueue
from agentserve.core.agents.registry import Session
from agentserve.core.agents.retention import RetentionSeat
from agentserve.core.agents.sessions import SessionFinder
from agentserve.core.agents.speculation import SpeculationQueue
from agentserve.core.agents.untold import UntoldEvents
from agentserve.core.batch import OpenPrompts
from agentserve.core.events import (
    EngineEvent,
    NoteTurn,
    PolicyFailed,
    RequestAdmitted,
    RequestPreempted,
    SetDistances,
    Speculate,
    SubmitRequest,
)
from agentserve.core.memory.eviction import Key
from agentserve.core.memory.manager import MemoryManager
from agentserve.core.request import FinishReason, Request
from agentserve.core.stats import PolicyStats

_FOREVER_NS = sys.maxsize
_NO_KEY: Key = ()
# It takes some time to look a member up, and these are needed in each event of a call.
_SUBMITTED, _ADMITTED, _FINISHED = TurnKind.SUBMITTED, TurnKind.ADMITTED, TurnKind.FINISHED
_OF_CALLS = (Admit, Reprioritize)


class AgentRuntime:
    """The seats of the policies in one engine. Costs O(log n) per event of a call, and nothing per token."""

    def __init__(self, config: EngineConfig, memory: MemoryManager, seats: Seats) -> None:
        self.registry = seats.registry
        self._memory = memory
        self._order = seats.order
        self._admission = seats.admission
        self._speculation = seats.speculation
        self._shaping = seats.shaping
        self._config = config
        self._calls: dict[str, OpenCall] = {}
        self._finder = SessionFinder(self.registry, memory)
        self._ended: dict[str, Session] = {}
        """Sessions by those of their calls that have ended since the last one came."""
        self.held = HeldCalls()
        self._has_held = False
        """Whether a call was ever held back."""
        self.counts: Counter[str] = Counter()
        self._isolation = Isolation(self._name_of, self.counts)
        self._ask = self._isolation.ask
        self.is_behind = False
        """Whether the policies have more to do at once: the next step is due now."""
        self._retention = RetentionSeat(
            seats.retention, config, memory, self.registry, isolation=self._isolation, counts=self.counts
        )
        self._untold = UntoldEvents(self._isolation, self._retention)
        self._prefetches = None if memory.residency is None else PrefetchQueue(memory, self.registry)
        self._pieces: SpeculationQueue | None = None
        if self._speculation is not None:
            ask = partial(self._ask, self._speculation, 0, self._speculation.speculates)
            self._pieces = SpeculationQueue(memory, config.speculate_tokens, ask)
        self._seat()

    @property
    def is_active(self) -> bool:
        """Whether there is a policy, or has been one."""
        return bool(self._hooks.policies) or bool(self._isolation.failures)

    # ---- what the engine tells ----

    def submitted(self, request: Request, command: SubmitRequest, now_ns: int) -> None:
        """A call has come. Stamps its place and to whom its blocks will belong; it is not queued yet."""
        session, forgotten = self._finder.find(command, self._retention.policy, now_ns)
        if forgotten:
            self._forget(forgotten)
        self._untold.tell_all()
        if session.idle_since_ns is not None:
            self.registry.gaps.add(session.tool_name, now_ns - session.idle_since_ns)
        if session.pinned_until_ns is not None and now_ns < session.pinned_until_ns:
            # It stays pinned until its call is admitted: the blocks are needed now (Continuum, section 5).
            session.pinned_until_ns = _FOREVER_NS
            self.counts["pins_held"] += 1
        if session.ended_ids:
            self._forget_ended(session)
        session.num_waiting += 1
        session.blocks.is_transient = False
        session.last_used_ns = now_ns
        session.idle_since_ns = None
        session.is_last_turn = command.is_last_turn
        session.tool_name = command.tool_name
        session.foresight = command.foresight
        session.adapter = request.adapter
        session.next_distance = command.distance
        self._calls[request.request_id] = OpenCall(request, session, now_ns)
        if self._retention.policy is not None:
            request.session_blocks = session.blocks
        order = self._order
        if order is not None:
            request.order_key = self._ask(order, _NO_KEY, order.order_key, session, request, now_ns)
        if self._has_listeners:
            self._happened(TurnEvent(_SUBMITTED, session, request, now_ns))
            self._untold.tell_all()

    def holds(self, request: Request, now_ns: int) -> bool:
        """Whether a call that has come is held back here; else it is to be queued. To be asked once."""
        policy = self._admission
        session = self._calls[request.request_id].session
        if policy is None or not self._ask(policy, False, policy.holds, session, request, now_ns):
            return False
        self.held.hold(request)
        self._has_held = True
        self.counts["calls_held"] += 1
        return True

    def note_turn(self, command: NoteTurn, now_ns: int) -> None:
        """The answer of a call that has ended was read: it is known which tool runs."""
        session = self._ended.get(command.request_id)
        if session is None or not session.is_idle:
            return
        session.tool_name = command.tool_name
        self._untold.tell_all()
        for policy, tool_called in self._hooks.tool_called:
            self._ask(policy, None, tool_called, session, now_ns)
        self._retention.rescore(session)

    @property
    def shapes_batches(self) -> bool:
        """Whether `batch_tokens` has an opinion."""
        return self._shaping is not None

    def batch_tokens(self, prompts: OpenPrompts) -> int:
        """How many tokens of prompts a batch is to read."""
        policy, most = self._shaping, prompts.num_tokens
        return most if policy is None else self._ask(policy, most, policy.batch_tokens, prompts)

    def predicted(self, command: Speculate) -> None:
        """Somebody said what the next prompt of a session begins with."""
        if self._pieces is not None:
            session = self._ended.get(command.request_id)
            self._pieces.predicted(command, session, is_open=command.request_id in self._calls)

    def speculated(self, start: int, end: int) -> None:
        """Tokens were computed that nobody waits for."""
        assert self._pieces is not None, "nobody speculates"
        self._pieces.computed(start, end)

    def may_speculate(self, lanes: IdleLanes) -> bool:
        """Whether `act` may find something to compute that nobody waits for."""
        return self._pieces is not None and self._pieces.has_due and lanes.may_speculate

    def set_distances(self, command: SetDistances, now_ns: int) -> None:
        """Somebody said how far agents are from their next calls. Policies that do not care ignore it."""
        self._untold.tell_all()
        for policy, set_distances in self._hooks.set_distances:
            self._ask(policy, None, set_distances, command, now_ns)

    def scheduled(self, events: Sequence[EngineEvent]) -> None:
        """Takes the admissions and preemptions among the events of a step."""
        for event in events:
            if isinstance(event, RequestAdmitted):
                self._moved(event.request_id, event.at_ns, _ADMITTED)
            elif isinstance(event, RequestPreempted):
                self._moved(event.request_id, event.at_ns, TurnKind.PREEMPTED)

    def finished(self, request: Request, reason: FinishReason, now_ns: int) -> None:
        """A call has ended, and its blocks are back or will be when its last batch is."""
        call = self._calls.pop(request.request_id)
        session = call.session
        if self._has_held and request in self.held:
            self.held.drop(request)
        session.ended_ids.append(request.request_id)
        self._ended[request.request_id] = session
        lasted_ns = call.leave(now_ns)
        session.num_turns += 1
        session.program.num_turns += 1
        session.context_tokens = len(request.token_ids)
        session.last_used_ns = now_ns
        if session.is_idle:
            session.idle_since_ns = now_ns
            if session.pinned_until_ns is not None:
                self._retention.unpin(session)
        if self._has_listeners:
            self._happened(TurnEvent(_FINISHED, session, request, now_ns, lasted_ns, reason))

    def act(self, now_ns: int, queues: Queues) -> None:
        """Lets the policies act. To be called after what happened in a step, before the lanes are filled."""
        retention = self._retention
        self._untold.tell_more()
        self.is_behind = bool(self._untold)
        retention.expire_pins(now_ns)
        for policy, act in self._hooks.act:
            for action in self._isolation.actions(policy, act, now_ns):
                self._do(action, now_ns, queues)
        for policy in self._hooks.falls_behind:
            try:
                self.is_behind |= policy.is_behind
            except Exception as error:  # noqa: BLE001  # see `Isolation.ask`
                self._isolation.raised(policy, error, None)
        retention.settle(now_ns)
        rating = retention.policy
        if rating is not None and self._prefetches:
            wants = partial(self._ask, rating, False, rating.wants_prefetch)
            self._prefetches.start(wants, len(self._calls), queues.num_claimed_blocks)
        if self._pieces is not None:
            self._pieces.start(now_ns, queues, has_sessions=rating is not None)
        if self._has_held and self.held and len(self.held) == len(self._calls) and self._policy_deadline_ns() is None:
            # Nothing else would ever wake us.
            self.held.release(next(iter(self.held)))

    def settle(self, now_ns: int, queues: Queues) -> list[EngineEvent]:
        """Replaces policies that have raised; returns what the world must know of that. To be called last in a step."""
        self._retention.settle(now_ns)
        self._untold.end_step()
        events: list[EngineEvent] = []
        isolation = self._isolation
        if not isolation.failed:
            return events
        for name, policy in isolation.failed.items():
            events.append(PolicyFailed(now_ns, name, isolation.failures[name]))
            if policy is self._retention.policy:
                self._retention.replace()
                for call in self._calls.values():
                    call.request.session_blocks = None
            if policy is self._order:
                self._order = None
                queues.forget_order()
                self.held.forget_order()
            if policy is self._admission:
                self._admission = None
                self.held.release_all()
            if policy is self._shaping:
                self._shaping = None
            if policy is self._speculation and self._pieces is not None:
                self._speculation = None
                self._pieces.stop()
        self._seat()
        isolation.failed.clear()
        return events

    def next_deadline_ns(self) -> int | None:
        """When `act` must be called while calls wait."""
        due_ns, policies_ns = self._retention.next_pin_ns(), self._policy_deadline_ns()
        return policies_ns if due_ns is None or (policies_ns is not None and policies_ns < due_ns) else due_ns

    def _policy_deadline_ns(self) -> int | None:
        due_ns: int | None = None
        for policy, deadline_ns in self._hooks.next_deadline_ns:
            found_ns = self._ask(policy, None, deadline_ns)
            if found_ns is not None and (due_ns is None or found_ns < due_ns):
                due_ns = found_ns
        return due_ns

    def stats(self) -> PolicyStats:
        """What the policies have done, and what the memory did for them."""
        memory = self._memory
        counts = {
            **self.counts,
            "blocks_prefetched": memory.prefetches.num_blocks,
            "blocks_dropped": memory.num_dropped_blocks,
            "evictions_unlike_lru": memory.order.num_unlike_lru,
            "admissions_held_back": memory.num_pin_refusals,
            "pins_yielded": memory.num_pin_yields,
        }
        if self._pieces is not None:
            counts |= self._pieces.counts()
        config = self._config
        failures = dict(self._isolation.failures)
        return PolicyStats(config.policy, config.order, counts, failures, config.admission, config.speculate)

    def check_invariants(self) -> None:
        """Raises AssertionError if the books of sessions and calls disagree."""
        waiting: Counter[str] = Counter()
        running: Counter[str] = Counter()
        for call in self._calls.values():
            (running if call.is_running else waiting)[call.session.session_id] += 1
        if self._pieces is not None:
            self._pieces.check_invariants()
        for request in self.held:
            assert not self._calls[request.request_id].is_running, f"{request.request_id} runs although it is held"
        for session_id, session in self.registry.sessions.items():
            assert session.num_waiting == waiting[session_id], f"{session_id}: wrong number of calls that wait"
            assert session.num_running == running[session_id], f"{session_id}: wrong number of calls that run"
            assert session.blocks.group.is_pinned == (session.pinned_until_ns is not None), f"{session_id}: wrong pin"

    # ---- the books ----

    def _forget(self, sessions: Iterable[Session]) -> None:
        """Nothing is known any more of sessions that the registry has dropped."""
        for session in sessions:
            self._forget_ended(session)
            self._retention.unpin(session)
            self._retention.rescore(session)

    def _forget_ended(self, session: Session) -> None:
        for request_id in session.ended_ids:
            del self._ended[request_id]
        session.ended_ids.clear()

    def _moved(self, request_id: str, now_ns: int, kind: TurnKind) -> None:
        call = self._calls[request_id]
        session = call.session
        lasted_ns = call.move(now_ns, is_admitted=kind is _ADMITTED)
        if session.pinned_until_ns is not None and session.num_waiting == 0:
            self._retention.unpin(session)
        if self._has_listeners:
            self._happened(TurnEvent(kind, session, call.request, now_ns, lasted_ns))

    # ---- asking and doing ----

    def _seats(self) -> tuple[tuple[Policy | None, str], ...]:
        """Who sits where, and under which name."""
        config = self._config
        return (
            (self._retention.policy, config.policy),
            (self._order, config.order),
            (self._admission, config.admission),
            (self._speculation, config.speculate),
            (self._shaping, config.policy),
        )

    def _seat(self) -> None:
        """Takes the policies that are in the seats now."""
        self._hooks = SeatedHooks(policy for policy, _ in self._seats())
        self._untold.seat(self._hooks.observe)
        self._has_listeners = self._pieces is not None or self._untold.has_listeners

    def _happened(self, event: TurnEvent) -> None:
        if self._pieces is not None:
            self._pieces.observe(event)
        self._untold.add(event)

    def _do(self, action: Action, now_ns: int, queues: Queues) -> None:
        if isinstance(action, _OF_CALLS):
            self._move(action, queues)
        elif not isinstance(action, Prefetch):
            self._retention.do(action, now_ns)
        elif self._prefetches is not None:
            self._prefetches.add(action.session, action.distance)

    def _move(self, action: Admit | Reprioritize, queues: Queues) -> None:
        call = self._calls.get(action.request_id)
        if call is None or call.is_running:
            return
        request, is_held = call.request, call.request in self.held
        if isinstance(action, Admit):
            if is_held:
                self.held.release(request)
        elif is_held:
            self.held.reprioritize(request, action.key)
        elif queues.reprioritize(request, action.key):
            self.counts["reorders"] += 1

    def _name_of(self, policy: Policy) -> str:
        return next(name for seat, name in self._seats() if seat is policy)
