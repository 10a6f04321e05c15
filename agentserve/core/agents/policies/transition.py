"""CacheSage (arXiv 2605.27744, 2608.14624): keep what the agents need that will be called next."""

# ruff: noqa: ARG002  # a hook gets what any policy may need

from __future__ import annotations

import itertools
import math
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar
from weakref import WeakKeyDictionary

from agentserve.core.agents.policy import Action, Policy, Prefetch, Rescore, RescoreAnchor, TurnEvent, TurnKind
from agentserve.core.agents.registry import Program, Session
from agentserve.core.agents.transitions import Transitions, survival
from agentserve.core.memory.eviction import Key, Rank

FLOOR = 0.05
"""delta of equation 9: what is not expected is worth this much of what is used now."""
DECAY = 0.01
"""lambda of equation 9, for each call that any agent makes."""
MIN_ENTROPY_REDUCTION = 0.3
"""R_min of equation 11: below it nothing is loaded beforehand. Random routing has about 0.1, a selector 0.5."""
MAX_TASKS = 1024
_PATIENCE = 4
"""A task without a call for so many calls of each other one is over as far as predictions go."""
_MIN_TASKS = 8
_MAX_SESSIONS = 32
"""Of one task that are rated anew when it moves on."""
_NO_HOPS: Mapping[str, int] = MappingProxyType({})


@dataclass(slots=True)
class _Task:
    """Where a task stands."""

    agent: str
    """Whose call came last."""
    last_call: int
    hops: Mapping[str, int] = field(default_factory=lambda: _NO_HOPS)
    """How far each agent is from that one."""
    sessions: dict[str, Session] = field(default_factory=dict)
    """By agent."""


class Transition(Policy):
    """Survival of an agent's blocks times their recency, equation 9: in a session by where its own task stands, for an
    anchor by the nearest of all tasks.

    The logarithm of `(survival + FLOOR) * exp(-DECAY * age)` is `ln(survival + FLOOR) + DECAY * last_call`, less the
    same number for all. So a key stays what it is until something happens to the task. (The paper also adds a floor to
    the second factor, with which the order would change with time alone; and blocks are all of one size here.)

    Anchors outlive private history, whatever their scores. An anchor that no task can
    reach is protected for `_PATIENCE` calls of each task, and competes with private history after that.
    """

    name: ClassVar[str] = "transition"
    tracks_agents: ClassVar[bool] = True

    def __init__(self, *, predicts: bool = True, prefetches: bool = True) -> None:
        """Makes one that knows nothing.

        Args:
            predicts: False leaves the recency only, with anchors for each agent.
            prefetches: load the history of the most likely agent from lower tiers between two calls of a task.
        """
        self.transitions = Transitions()
        self._predicts = predicts
        self._prefetches = predicts and prefetches
        self._num_calls = 0
        self._tasks: OrderedDict[Program, _Task] = OrderedDict()
        """By their last call."""
        self._reach: dict[str, Counter[int]] = {}
        """For each agent how many tasks are how many hops away from it."""
        self._last_call: OrderedDict[str, int] = OrderedDict()
        """Of agents whose anchors are protected."""
        self._calls: MutableMapping[Session, int] = WeakKeyDictionary()
        """The number of each session's last call."""
        self._actions: list[Action] = []

    def observe(self, event: TurnEvent) -> None:
        session = event.session
        agent = session.agent_key or session.session_id
        if event.kind is TurnKind.SUBMITTED:
            self._called(session, agent)
        elif event.kind is TurnKind.FINISHED and session.program in self._tasks:
            if session.is_last_turn:
                self._end(session.program)
            elif self._prefetches:
                self._warm(self._tasks[session.program])

    def score(self, session: Session, now_ns: int) -> Key:
        recency = DECAY * self._calls.get(session, 0)
        if not self._predicts:
            return (recency,)
        task = self._tasks.get(session.program)
        hops = None if task is None else task.hops.get(session.agent_key or session.session_id)
        return (math.log(survival(hops) + FLOOR) + recency,)

    def score_anchor(self, agent: str, now_ns: int) -> Key:
        recency = DECAY * self._last_call.get(agent, 0)
        if not self._predicts:
            return (Rank.SHARED, recency)
        reach = self._reach.get(agent)
        rank = Rank.SHARED if agent in self._last_call else Rank.PRIVATE
        return (rank, math.log(survival(min(reach) if reach else None) + FLOOR) + recency)

    def wants_prefetch(self, session: Session) -> bool:
        task = self._tasks.get(session.program)
        return task is not None and self._expected(task) is session

    def act(self, now_ns: int) -> Iterable[Action]:
        actions, self._actions = self._actions, []
        return actions

    # ---- where tasks stand ----

    def _called(self, session: Session, agent: str) -> None:
        self._num_calls += 1
        self._calls[session] = self._num_calls
        self._last_call[agent] = self._num_calls
        self._last_call.move_to_end(agent)
        self._actions.append(RescoreAnchor(agent))
        if not self._predicts:
            return
        task = self._tasks.get(session.program)
        if task is None:
            task = self._tasks[session.program] = _Task(agent, self._num_calls)
        else:
            self.transitions.add(task.agent, agent)
        task.agent, task.last_call = agent, self._num_calls
        self._tasks.move_to_end(session.program)
        task.sessions[agent] = session
        if len(task.sessions) > _MAX_SESSIONS:
            del task.sessions[next(iter(task.sessions))]
        self._move(task, self.transitions.hops_from(agent))
        self._clean_up()

    def _move(self, task: _Task, hops: Mapping[str, int]) -> None:
        """Books that a task is at other distances from the agents now."""
        old, task.hops = task.hops, hops
        if old is hops:
            return
        for agent in {**old, **hops}:
            before, after = old.get(agent), hops.get(agent)
            if before == after:
                continue
            reach = self._reach.setdefault(agent, Counter())
            nearest = min(reach, default=None)
            if after is not None:
                reach[after] += 1
            if before is not None:
                reach[before] -= 1
                if not reach[before]:
                    del reach[before]
            if min(reach, default=None) != nearest:
                self._actions.append(RescoreAnchor(agent))
            if not reach:
                del self._reach[agent]
            if agent in task.sessions:
                self._actions.append(Rescore(task.sessions[agent]))

    def _expected(self, task: _Task) -> Session | None:
        """The session of the agent that most likely calls next in a task, equation 10, if it has one there already."""
        agent = self.transitions.next_agent(task.agent)
        return None if agent is None else task.sessions.get(agent)

    def _warm(self, task: _Task) -> None:
        """Equation 11: only if the present agent tells enough about the next one."""
        session = self._expected(task)
        if session is not None and session.is_idle and self.transitions.entropy_reduction >= MIN_ENTROPY_REDUCTION:
            self._actions.append(Prefetch(session, 1.0))

    def _end(self, program: Program) -> None:
        self._move(self._tasks.pop(program), _NO_HOPS)

    def _clean_up(self) -> None:
        """Ends tasks and stops protecting anchors that were left long ago; a few at a time."""
        oldest = self._num_calls - _PATIENCE * max(_MIN_TASKS, len(self._tasks))
        for program in list(itertools.islice(self._tasks, 2)):
            if self._tasks[program].last_call < oldest or len(self._tasks) > MAX_TASKS:
                self._end(program)
        for agent in list(itertools.islice(self._last_call, 2)):
            if self._last_call[agent] >= oldest:
                break
            if agent in self._reach:
                self._last_call.move_to_end(agent)  # it is expected; its time is looked at again after the others
            else:
                del self._last_call[agent]
                self._actions.append(RescoreAnchor(agent))
