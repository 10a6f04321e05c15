"""Between the engine and the policies: keeps the books, asks, and does what they say.

A policy that raises is out for the rest of the run: the built-in order takes its seat, and an event says so.
"""

from __future__ import annotations

import heapq
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from agentserve.config import EngineConfig
from agentserve.core.agents.factory import Seats
from agentserve.core.agents.fingerprint import fingerprint
from agentserve.core.agents.policy import (
    Action,
    Demote,
    Drop,
    Pin,
    PlaceAdapter,
    Policy,
    Prefetch,
    Rescore,
    RescoreAnchor,
    TurnEvent,
    TurnKind,
)
from agentserve.core.agents.prefetch import PrefetchQueue
from agentserve.core.agents.registry import Session
from agentserve.core.events import (
    EngineEvent,
    PolicyFailed,
    RequestAdmitted,
    RequestPreempted,
    SetDistances,
    SubmitRequest,
)
from agentserve.core.memory.eviction import Key, Rank, lru_key
from agentserve.core.memory.manager import MemoryManager
from agentserve.core.memory.radix import RadixNode
from agentserve.core.request import FinishReason, Request
from agentserve.core.stats import PolicyStats

_FOREVER_NS = sys.maxsize
_NO_KEY: Key = ()
_NO_ACTIONS: tuple[Action, ...] = ()
_T = TypeVar("_T")


class Queues(Protocol):
    """What order policies act on."""

    def reprioritize(self, request: Request, key: Key) -> bool:
        """Gives a request that waits another place; whether it has passed another one by that."""
        ...

    def forget_order(self) -> None:
        """All requests go in the order of their arrival again."""
        ...


@dataclass(slots=True)
class _Call:
    """A request that has not ended."""

    request: Request
    session: Session
    since_ns: int
    """Since when it waits or runs."""
    is_running: bool = False


class AgentRuntime:
    """The seats of the policies in one engine. Costs O(log n) per event of a call, and nothing per token."""

    def __init__(self, config: EngineConfig, memory: MemoryManager, seats: Seats) -> None:
        self.registry = seats.registry
        self._memory = memory
        self._retention = seats.retention
        self._order = seats.order
        self._policy_name, self._order_name = config.policy, config.order
        self._calls: dict[str, _Call] = {}
        self._expiries: list[tuple[int, int, Session]] = []
        self._num_anonymous = 0
        self._num_pins = 0
        self._failures: dict[str, str] = {}
        self._failed: dict[str, Policy] = {}
        """By name; out of their seats at the end of the step."""
        self.counts: Counter[str] = Counter()
        if self._retention is not None:
            memory.use_policy(
                self._block_key(self._retention),
                protects_anchors=config.protects_anchors,
                max_pinned_blocks=int(config.pin_share * memory.num_blocks),
            )
            if self._retention.rates_by_users:
                memory.rate_by_users()
        self._prefetches = PrefetchQueue(memory, self.registry)

    @property
    def is_active(self) -> bool:
        """Whether there is a policy, or has been one."""
        return self._retention is not None or self._order is not None or bool(self._failures)

    # ---- what the engine tells ----

    def submitted(self, request: Request, command: SubmitRequest, now_ns: int) -> None:
        """A call has come. Stamps its place and to whom its blocks will belong; it is not queued yet."""
        session = self._session_of(command, now_ns)
        if session.idle_since_ns is not None:
            self.registry.gaps.add(session.tool_name, now_ns - session.idle_since_ns)
        if session.is_pinned(now_ns):
            # It stays pinned until its call is admitted: the blocks are needed now (Continuum, section 5).
            session.pinned_until_ns = _FOREVER_NS
            self.counts["pins_held"] += 1
        session.num_waiting += 1
        session.blocks.is_transient = False
        session.last_used_ns = now_ns
        session.idle_since_ns = None
        session.is_last_turn = command.is_last_turn
        session.tool_name = command.tool_name
        session.foresight = command.foresight
        session.adapter = request.adapter
        session.next_distance = command.distance
        self._calls[request.request_id] = _Call(request, session, now_ns)
        if self._retention is not None:
            request.session_blocks = session.blocks
        order = self._order
        if order is not None:
            request.order_key = self._ask(order, _NO_KEY, order.order_key, session, request, now_ns)
        self._happened(TurnEvent(TurnKind.SUBMITTED, session, request, now_ns))

    def set_distances(self, command: SetDistances, now_ns: int) -> None:
        """Somebody said how far agents are from their next calls. Policies that do not care ignore it."""
        for policy in self._policies():
            self._ask(policy, None, policy.set_distances, command, now_ns)

    def scheduled(self, events: Sequence[EngineEvent]) -> None:
        """Takes the admissions and preemptions among the events of a step."""
        for event in events:
            if isinstance(event, RequestAdmitted):
                self._moved(event.request_id, event.at_ns, TurnKind.ADMITTED)
            elif isinstance(event, RequestPreempted):
                self._moved(event.request_id, event.at_ns, TurnKind.PREEMPTED)

    def finished(self, request: Request, reason: FinishReason, now_ns: int) -> None:
        """A call has ended, and its blocks are back or will be when its last batch is."""
        call = self._calls.pop(request.request_id)
        session = call.session
        lasted_ns = self._leave(call, now_ns)
        session.num_turns += 1
        session.program.num_turns += 1
        session.context_tokens = len(request.token_ids)
        session.last_used_ns = now_ns
        if session.is_idle:
            session.idle_since_ns = now_ns
            self._unpin(session)
        self._happened(TurnEvent(TurnKind.FINISHED, session, request, now_ns, lasted_ns, reason))

    def act(self, now_ns: int, queues: Queues) -> None:
        """Lets the policies act. To be called after what happened in a step, before the lanes are filled."""
        while self._expiries and self._expiries[0][0] <= now_ns:
            until_ns, pin_id, session = heapq.heappop(self._expiries)
            if session.pin_id == pin_id and session.pinned_until_ns == until_ns:
                self.counts["pins_expired"] += 1
                self._unpin(session)
                self._rescore(session, now_ns)
        for policy in self._policies():
            for action in self._ask(policy, _NO_ACTIONS, self._actions, policy, now_ns):
                self._do(action, now_ns, queues)
        retention = self._retention
        if retention is not None and self._prefetches:
            wants = retention.wants_prefetch
            self._prefetches.start(lambda session: self._ask(retention, False, wants, session), len(self._calls))

    def settle(self, now_ns: int, queues: Queues) -> list[EngineEvent]:
        """Replaces policies that have raised; returns what the world must know of that. To be called last in a step."""
        events: list[EngineEvent] = []
        for name, policy in self._failed.items():
            events.append(PolicyFailed(now_ns, name, self._failures[name]))
            if policy is self._retention:
                self._replace_retention()
            if policy is self._order:
                self._order = None
                queues.forget_order()
        self._failed.clear()
        return events

    def next_deadline_ns(self) -> int | None:
        """When `act` must be called while calls wait."""
        asked = [self._ask(policy, None, policy.next_deadline_ns) for policy in self._policies()]
        dues = [due for due in asked if due is not None]
        while self._expiries:
            until_ns, pin_id, session = self._expiries[0]
            if session.pin_id == pin_id and session.pinned_until_ns == until_ns:
                dues.append(until_ns)
                break
            heapq.heappop(self._expiries)
        return min(dues, default=None)

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
        return PolicyStats(self._policy_name, self._order_name, counts, dict(self._failures))

    def check_invariants(self) -> None:
        """Raises AssertionError if the books of sessions and calls disagree."""
        waiting: Counter[str] = Counter()
        running: Counter[str] = Counter()
        for call in self._calls.values():
            (running if call.is_running else waiting)[call.session.session_id] += 1
        for session_id, session in self.registry.sessions.items():
            assert session.num_waiting == waiting[session_id], f"{session_id}: wrong number of calls that wait"
            assert session.num_running == running[session_id], f"{session_id}: wrong number of calls that run"
            assert session.blocks.group.is_pinned == (session.pinned_until_ns is not None), f"{session_id}: wrong pin"

    # ---- the books ----

    def _session_of(self, command: SubmitRequest, now_ns: int) -> Session:
        session_id = command.session_id or command.agent_id
        if session_id is None:
            owner = None
            if self._retention is not None:
                owner = self._memory.session_of(command.prompt_token_ids, salt=command.cache_salt)
            if owner is not None and owner.session_id in self.registry.sessions:
                session_id = owner.session_id
            else:
                self._num_anonymous += 1
                session_id = f"~{self._num_anonymous}"
        order, retention = self._memory.order, self._retention
        competes = retention is not None and not retention.scores_blocks
        group = order.new_group((Rank.PRIVATE,)) if competes else order.common
        program_id, agent_key = command.program_id or session_id, None
        if retention is not None and retention.tracks_agents:
            session_id, agent_key = self._agent_session(session_id, command)
        session, forgotten = self.registry.open(session_id, program_id, command.agent_id, now_ns, group)
        if agent_key is not None and session.agent_key is None:
            session.agent_key = agent_key
            session.blocks.anchors = self.registry.anchor(
                agent_key, lambda: order.new_group((Rank.SHARED,), is_shared=True)
            )
        for other in forgotten:
            self._unpin(other)
            self._rescore(other, now_ns)
        return session

    def _agent_session(self, session_id: str, command: SubmitRequest) -> tuple[str, str | None]:
        """The session of the agent that calls, if several share a session, and the name of that agent."""
        known = self.registry.sessions.get(session_id)
        agent = command.agent_id or fingerprint(command.prompt_token_ids)
        if known is None or known.agent_key in (None, agent) or agent is None:
            return session_id, agent
        return f"{session_id}\x1f{agent}", agent

    def _moved(self, request_id: str, now_ns: int, kind: TurnKind) -> None:
        call = self._calls[request_id]
        session = call.session
        lasted_ns = self._leave(call, now_ns)
        call.since_ns = now_ns
        call.is_running = kind is TurnKind.ADMITTED
        if call.is_running:
            session.num_running += 1
            if session.num_waiting == 0:
                self._unpin(session)
        else:
            session.num_waiting += 1
        self._happened(TurnEvent(kind, session, call.request, now_ns, lasted_ns))

    def _leave(self, call: _Call, now_ns: int) -> int:
        """Books the time that a call has waited or run."""
        lasted_ns = now_ns - call.since_ns
        if call.is_running:
            call.session.num_running -= 1
            call.session.program.attained_ns += lasted_ns
            return lasted_ns
        call.session.num_waiting -= 1
        call.session.program.waited_ns += lasted_ns
        return lasted_ns

    # ---- asking and doing ----

    def _policies(self) -> Iterable[Policy]:
        if self._retention is not None:
            yield self._retention
        if self._order is not None and self._order is not self._retention:
            yield self._order

    def _happened(self, event: TurnEvent) -> None:
        for policy in self._policies():
            self._ask(policy, None, policy.observe, event)
        self._rescore(event.session, event.at_ns)

    def _rescore(self, session: Session, now_ns: int) -> None:
        policy = self._retention
        if policy is None or policy.scores_blocks:
            return
        is_pinned = session.pinned_until_ns is not None
        rank = Rank.PINNED if is_pinned else Rank.PRIVATE
        key = self._ask(policy, _NO_KEY, policy.score, session, now_ns)
        self._memory.rekey(session.blocks, (rank, *key), is_pinned=is_pinned)

    def _rescore_anchor(self, agent: str, now_ns: int) -> None:
        policy, group = self._retention, self.registry.anchors.get(agent)
        if policy is not None and group is not None:
            self._memory.order.rekey(group, self._ask(policy, group.key, policy.score_anchor, agent, now_ns))

    def _do(self, action: Action, now_ns: int, queues: Queues) -> None:
        if isinstance(action, Pin):
            self._pin(action.session, action.until_ns, now_ns)
        elif isinstance(action, Drop):
            self._drop(action.session)
        elif isinstance(action, Demote):
            if action.session.is_idle:
                self.counts["blocks_demoted"] += self._memory.demote(action.session.blocks)
        elif isinstance(action, Rescore):
            self._rescore(action.session, now_ns)
        elif isinstance(action, RescoreAnchor):
            self._rescore_anchor(action.agent, now_ns)
        elif isinstance(action, Prefetch):
            self._prefetches.add(action.session, action.distance)
        elif isinstance(action, PlaceAdapter):
            if self._memory.adapters is not None:
                limit = math.inf if action.is_wanted else -math.inf
                self._memory.adapters.set_distances({action.adapter: action.distance}, prefetch_below=limit)
        else:
            call = self._calls.get(action.request_id)
            if call is not None and not call.is_running and queues.reprioritize(call.request, action.key):
                self.counts["reorders"] += 1

    def _drop(self, session: Session) -> None:
        """What a batch in flight still writes to is dropped when it is done."""
        if session.is_idle:
            session.blocks.is_transient = True
            self._memory.drop(session.blocks)

    def _pin(self, session: Session, until_ns: int, now_ns: int) -> None:
        """Only an idle session is pinned: what an open call needs is held."""
        if not session.is_idle or until_ns <= now_ns:
            return
        self._num_pins += 1
        session.pin_id = self._num_pins
        session.pinned_until_ns = until_ns
        heapq.heappush(self._expiries, (until_ns, session.pin_id, session))
        self.counts["pins_set"] += 1
        self._rescore(session, now_ns)

    def _unpin(self, session: Session) -> None:
        session.pinned_until_ns = None
        group = session.blocks.group
        if group.is_pinned:
            self._memory.rekey(session.blocks, (Rank.PRIVATE, session.last_used_ns))

    # ---- isolation ----

    @staticmethod
    def _actions(policy: Policy, now_ns: int) -> tuple[Action, ...]:
        """What a policy wants done; a generator runs to its end here, where it may raise."""
        return tuple(policy.act(now_ns))

    def _ask(self, policy: Policy, default: _T, question: Callable[..., _T], *arguments: object) -> _T:
        """What a policy answers, or `default` if it raises."""
        try:
            return question(*arguments)
        except Exception as error:  # noqa: BLE001  # whatever it is: it is not the engine's
            self._fail(policy, error)
            return default

    def _block_key(self, policy: Policy) -> Callable[[RadixNode], Key]:
        score = policy.score_block

        def key(node: RadixNode) -> Key:
            try:
                return score(node)
            except Exception as error:  # noqa: BLE001  # as above
                self._fail(policy, error)
                return lru_key(node)

        return key if type(policy).score_block is not Policy.score_block else lru_key

    def _fail(self, policy: Policy, error: Exception) -> None:
        self.counts["failures"] += 1
        name = self._policy_name if policy is self._retention else self._order_name
        if name not in self._failures:
            self._failures[name] = f"{type(error).__name__}: {error}"
            self._failed[name] = policy

    def _replace_retention(self) -> None:
        self._retention = None
        self.registry.anchors.clear()
        self._memory.use_lru()
        for call in self._calls.values():
            call.request.session_blocks = None
        for session in self.registry.sessions.values():
            session.pinned_until_ns = None
            session.blocks.group = self._memory.order.common
            session.blocks.anchors = None
