"""CacheSage (arXiv 2605.27744, 2608.14624): keep what the agents need that will be called next."""

# ruff: noqa: ARG002  # a hook gets what any policy may need

from __future__ import annotations

import itertools
import math
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar

from agentserve.core.agents.answers import AnswerReuse
from agentserve.core.agents.policy import (
    Action,
    Policy,
    Prefetch,
    Rate,
    RescoreAnchor,
    Supersede,
    TurnEvent,
    TurnKind,
)
from agentserve.core.agents.registry import Program, Session
from agentserve.core.agents.returns import NO_INDICES, Progress, Returns
from agentserve.core.agents.transitions import Transitions
from agentserve.core.memory.eviction import Key, Rank
from agentserve.core.request import Request

FLOOR = 0.02
"""delta of equation 9: what is not expected is worth this much of what is needed next."""
DECAY = 0.1
"""lambda of equation 9, for each round: as many calls as there are tasks."""
MIN_ENTROPY_REDUCTION = 0.3
"""R_min of equation 11: below it nothing is loaded beforehand. Random routing has about 0.1, a selector 0.5."""
MAX_HOPS = 5
"""E_max of equation 8: an anchor that is so many calls away, or more, is not expected."""
MAX_TASKS = 1024
_PATIENCE = 4
"""A task without a call for so many calls of each other one is over as far as predictions go."""
_MIN_TASKS = 8
_MAX_SESSIONS = 16
"""Of one task that are rated anew when it moves on."""
_MAX_ANCHORS, _SESSIONS_A_PIECE = 3, 3
"""Anchors, or sessions of one task, that are rated anew in one step."""
_AGENTS_A_PIECE = 8
"""Agents of which it is booked in one step that a task is nearer to them, or farther away."""
_NO_HOPS: Mapping[str, int] = MappingProxyType({})


@dataclass(slots=True, eq=False)
class _Task:
    """Where a task stands."""

    agent: str
    """Whose call came last."""
    last_call: int = 0
    last_round: float = 0.0
    progress: Progress = field(default_factory=Progress)
    indices: Mapping[str, float] = field(default_factory=lambda: NO_INDICES)
    """What the memory of each agent is worth to it."""
    hops: Mapping[str, int] = field(default_factory=lambda: _NO_HOPS)
    """How many calls away each agent is, in effect."""
    sessions: dict[str, Session] = field(default_factory=dict)
    """By agent."""


class Transition(Policy):
    """An agent's blocks are worth their chance of being used per call for which they stay, and less with each round in
    which their task was silent (equation 9): in a session by where its own task stands, for an anchor by the nearest
    of all tasks. How far that is was measured: see `returns`.

    The logarithm of `(index + FLOOR) * exp(-DECAY * age)` is `ln(index + FLOOR) + DECAY * last_round`, less the same
    number for all. So a key stays what it is until something happens to the task. (The paper also adds a floor to
    the second factor, with which the order would change with time alone; and blocks are all of one size here.)

    What is known goes before what is predicted. What a call needs that waits stays; the history of tasks that have
    ended goes first, and before that the answers of agents whose next prompts did not go on with their answers.

    In the step in which a call comes or ends, only that is booked. What is learned from it, what the agents' memory is
    worth now, and the new keys follow at once, in steps of their own, a piece in each, in the order of the calls.

    Anchors outlive private history, whatever their scores. An anchor that no task can
    reach is protected for `_PATIENCE` calls of each task, and competes with private history after that.
    """

    name: ClassVar[str] = "transition"
    tracks_agents: ClassVar[bool] = True

    def __init__(self, *, predicts: bool = True, prefetches: bool = True) -> None:
        """Makes one that knows nothing.

        Args:
            predicts: False leaves the recency instead of the chances, with all that is known.
            prefetches: load the history of the most likely agent from lower tiers between two calls of a task.
        """
        self.transitions = Transitions()
        self.returns = Returns()
        self._predicts = predicts
        self._prefetches = predicts and prefetches
        self._num_calls = 0
        self._round = 0.0
        self._tasks: OrderedDict[Program, _Task] = OrderedDict()
        """By their last call."""
        self._reach: dict[str, list[int]] = {}
        """For each agent how many tasks are how many hops away from it."""
        self._last_call: OrderedDict[str, int] = OrderedDict()
        """Of agents whose anchors are protected."""
        self._waiting: dict[str, str] = {}
        """Calls that wait, and their agents."""
        self._num_waiting: Counter[str] = Counter()
        self._answers = AnswerReuse()
        self._work: deque[Iterator[Action | None]] = deque()
        """What is still to be done about calls, in pieces: with what each of them wants done."""
        self._has_news = False
        """Whether something has happened since `act` was called."""
        self._anchors: dict[str, None] = {}
        """Agents whose anchors are worth something else now, in order."""

    def observe(self, event: TurnEvent) -> None:
        kind, session, request = event.kind, event.session, event.request
        agent = session.agent_key or session.session_id
        self._has_news = True
        if kind is TurnKind.SUBMITTED:
            self._wait(request, agent)
            self._called(session, agent, request)
        elif kind is TurnKind.PREEMPTED:
            self._wait(request, agent)
        else:
            self._wait_no_more(request)
            if kind is TurnKind.FINISHED:
                self._finished(session, agent, request)

    def score(self, session: Session, now_ns: int) -> Key:
        if session.num_waiting:
            return (math.inf,)
        task = self._tasks.get(session.program)
        if task is None:
            return (-math.inf, session.last_used_ns)
        if not self._predicts:
            return (session.last_used_ns,)
        index = task.indices.get(session.agent_key or session.session_id, 0.0)
        return (math.log(index + FLOOR) + DECAY * task.last_round, session.last_used_ns)

    def score_anchor(self, agent: str, now_ns: int) -> Key:
        if self._num_waiting[agent]:
            return (Rank.SHARED, math.inf)
        last_call = self._last_call.get(agent, 0)
        if not self._predicts:
            return (Rank.SHARED, last_call)
        hops = _nearest(self._reach.get(agent))
        rank = Rank.SHARED if agent in self._last_call else Rank.PRIVATE
        return (rank, -(MAX_HOPS if hops is None else hops), last_call)

    def wants_prefetch(self, session: Session) -> bool:
        task = self._tasks.get(session.program)
        return task is not None and self._expected(task) is session

    @property
    def is_behind(self) -> bool:
        return bool(self._work or self._anchors)

    def act(self, now_ns: int) -> Iterable[Action]:
        if self._has_news:
            self._has_news = False
        elif self._anchors:
            agents = list(itertools.islice(self._anchors, _MAX_ANCHORS))
            for agent in agents:
                del self._anchors[agent]
            return [RescoreAnchor(agent) for agent in agents]
        elif self._work:
            for action in self._work[0]:
                return () if action is None else (action,)
            self._work.popleft()
        return ()

    # ---- what happens ----

    def _wait(self, request: Request, agent: str) -> None:
        self._waiting[request.request_id] = agent
        self._num_waiting[agent] += 1
        self._anchors[agent] = None

    def _wait_no_more(self, request: Request) -> None:
        agent = self._waiting.pop(request.request_id, None)
        if agent is not None:
            self._num_waiting[agent] -= 1
            if not self._num_waiting[agent]:
                del self._num_waiting[agent]
                self._anchors[agent] = None

    def _called(self, session: Session, agent: str, request: Request) -> None:
        """Books a call; all else follows."""
        self._num_calls += 1
        self._round += 1.0 / max(1, len(self._tasks))
        self._last_call[agent] = self._num_calls
        self._last_call.move_to_end(agent)
        task = self._tasks.get(session.program)
        before: str | None = None
        if task is None:
            task = self._tasks[session.program] = _Task(agent)
        else:
            before = task.agent
            self._tasks.move_to_end(session.program)
        task.agent, task.last_call, task.last_round = agent, self._num_calls, self._round
        task.sessions[agent] = session
        if len(task.sessions) > _MAX_SESSIONS:
            del task.sessions[next(iter(task.sessions))]
        self._work.append(self._follow(task, before, session, request))

    def _finished(self, session: Session, agent: str, request: Request) -> None:
        task = self._tasks.get(session.program)
        if task is not None and session.is_last_turn:
            self._end(session.program)
            task = None
        self._work.append(self._leave(task, session, agent, request))

    # ---- where tasks stand ----

    def _follow(self, task: _Task, before: str | None, session: Session, request: Request) -> Iterator[Action | None]:
        """What follows from a call. `before`: whose call the last one of the task was."""
        agent = session.agent_key or session.session_id
        self._answers.asked(session, agent, request)
        if before is not None and self._prefetches:
            self.transitions.add(before, agent)
        yield None
        self._clean_up()
        if not self._predicts:
            return
        yield None
        for _ in self.returns.called(task.progress, agent):
            yield None
        for _ in task.progress.refresh():
            yield None
        yield from self._move(task, task.progress.indices)

    def _leave(self, task: _Task | None, session: Session, agent: str, request: Request) -> Iterator[Action | None]:
        """What follows from the end of a call. `task`: unless it has ended."""
        self._answers.answered(session, request)
        if not self._answers.come_back(agent):
            yield Supersede(session, request.num_prompt_tokens)
        likely = self._expected(task) if task is not None and self._prefetches else None
        # Equation 11: only if the present agent tells enough about the next one.
        if likely is not None and likely.is_idle and self.transitions.entropy_reduction >= MIN_ENTROPY_REDUCTION:
            yield Prefetch(likely, 1.0)

    def _over(self, task: _Task) -> Iterator[Action | None]:
        """What follows from the end of a task."""
        yield from self._move(task, NO_INDICES)
        for _ in self.returns.ended(task.progress):
            yield None

    def _move(self, task: _Task, indices: Mapping[str, float]) -> Iterator[Action | None]:
        """The agents' memory is worth something else to a task now."""
        yield None
        task.indices = indices
        # What is not in the cache is rated when it comes: that is an event of its own, or a prefetch.
        everything = self._prefetches
        sessions = [s for s in task.sessions.values() if everything or s.blocks.group.num_cached]
        for start in range(0, len(sessions), _SESSIONS_A_PIECE):
            rated = sessions[start : start + _SESSIONS_A_PIECE]
            yield Rate(tuple((session, self.score(session, 0)) for session in rated))
        old = task.hops
        task.hops = new = _hops(indices)
        changed = [(agent, hops, -1) for agent, hops in old.items() if new.get(agent) != hops]
        changed += [(agent, hops, 1) for agent, hops in new.items() if old.get(agent) != hops]
        for index, change in enumerate(changed):
            if index % _AGENTS_A_PIECE == 0:
                yield None
            self._count(*change)

    def _count(self, agent: str, hops: int, change: int) -> None:
        """One task more or less is so far from an agent."""
        reach = self._reach.get(agent)
        if reach is None:
            reach = self._reach[agent] = [0] * MAX_HOPS
        reach[hops] += change
        self._anchors[agent] = None
        if not any(reach):
            del self._reach[agent]

    def _expected(self, task: _Task) -> Session | None:
        """The session of the agent that most likely calls next in a task, equation 10, if it has one there already."""
        agent = self.transitions.next_agent(task.agent)
        return None if agent is None else task.sessions.get(agent)

    def _end(self, program: Program) -> None:
        self._work.append(self._over(self._tasks.pop(program)))

    def _clean_up(self) -> None:
        """Ends tasks and stops protecting anchors that were left long ago; a few at a time."""
        oldest = self._num_calls - _PATIENCE * max(_MIN_TASKS, len(self._tasks))
        for program in list(itertools.islice(self._tasks, 2)):
            if self._tasks[program].last_call < oldest or len(self._tasks) > MAX_TASKS:
                self._end(program)
        if not self._predicts:
            return
        for agent in list(itertools.islice(self._last_call, 2)):
            if self._last_call[agent] >= oldest:
                break
            if agent in self._reach:
                self._last_call.move_to_end(agent)  # it is expected; its time is looked at again after the others
            else:
                del self._last_call[agent]
                self._anchors[agent] = None


def _hops(indices: Mapping[str, float]) -> Mapping[str, int]:
    """Agents that are expected within `MAX_HOPS` calls, in effect: `1 / index`, what a sure call would be away."""
    return {agent: round(1.0 / index) for agent, index in indices.items() if index * (MAX_HOPS - 0.5) > 1.0}


def _nearest(reach: list[int] | None) -> int | None:
    """The hops of the nearest task. None: no task reaches the agent."""
    if reach is not None:
        for hops, num_tasks in enumerate(reach):
            if num_tasks:
                return hops
    return None
