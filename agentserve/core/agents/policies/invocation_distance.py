"""ScaleSim (arXiv 2601.21473): the application says who is next, so keep and load memory by that."""

# ruff: noqa: ARG002  # a hook gets what any policy may need

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterable
from typing import ClassVar

from agentserve.core.agents.costs import ForwardCosts
from agentserve.core.agents.distances import DistanceBook, Place, add_places
from agentserve.core.agents.policy import Action, PlaceAdapter, Policy, Prefetch, Rescore, TurnEvent, TurnKind
from agentserve.core.agents.registry import Session
from agentserve.core.batch import OpenPrompts
from agentserve.core.events import SetDistances
from agentserve.core.memory.eviction import Key
from agentserve.core.request import Request

PATIENCE_NS = 1_000_000_000
"""A call whose memory has to be loaded lets those go first whose memory is there, if they come within this time."""
MAX_MOVES = 3
"""Agents that are placed anew in one step of the engine, the nearest ones first; the others follow at once. Calls
that come or end go before, one in a step, from the step after their own on."""


class InvocationDistance(Policy):
    """The largest distance goes first, calls that are open never; what several agents use has their smallest distance.

    An agent below the threshold whose blocks are in a lower tier is loaded, into free memory or in place of agents that
    are farther away (section 4.3 of the paper). The same for its LoRA adapter. Agents without a distance go before all
    others, and among themselves those used longest ago.

    The paper does not say what happens when more calls are open than there is memory for. Here those go first whose
    memory is on the device: in first come, first served the first call without memory would take that of a call behind
    it, which then has to be loaded, too. And of the open calls that wait, the last one in this order gives up its
    memory first.
    """

    name: ClassVar[str] = "invocation_distance"
    rates_by_users: ClassVar[bool] = True

    def __init__(self, threshold: float, costs: ForwardCosts | None = None) -> None:
        """Makes a policy that knows of nobody.

        Args:
            threshold: distances below it are near enough to load; 0: nothing is loaded before a call needs it.
            costs: of a forward pass; None: unknown, and batches are as large as they can be.
        """
        self._batch_ns = None if costs is None else costs.batch_ns
        self.book = DistanceBook()
        self._threshold = threshold
        self._moved: list[Place] = []
        """A heap of agents that are somewhere else than the memory knows."""
        self._crossing: list[Place] = []
        """A heap of agents that were too far to load when the memory was told."""
        self._actions: list[Action] = []
        self._open: dict[Session, Key] = {}
        """What the blocks of sessions are worth whose calls are open."""
        self._users: dict[str, list[Place]] = {}
        """Adapter: a heap of the agents that use it."""
        self._calls: deque[tuple[Session, bool, float | None]] = deque()
        """What is not in the book yet, in order: whose call has begun or else ended, with the distance that it gave."""
        self._has_news = False
        """Whether something has happened to a call since `act` was called."""

    # ---- what happens ----

    def set_distances(self, command: SetDistances, now_ns: int) -> None:
        while self._calls:
            self._book_next()
        add_places(self._moved, self.book.tell(command.agents, relative=command.relative))

    def observe(self, event: TurnEvent) -> None:
        session, request = event.session, event.request
        self._has_news = True
        if event.kind is TurnKind.SUBMITTED:
            self._open.setdefault(session, _key_of(request))
            self._calls.append((session, True, None))
        elif event.kind is TurnKind.PREEMPTED and request.num_slices:
            # It comes after others now.
            self._open[session] = _key_of(request)
            self._actions.append(Rescore(session))
        elif event.kind is TurnKind.FINISHED:
            self._calls.append((session, False, session.next_distance))

    def _book_next(self) -> None:
        """Books the beginning or the end of a call, the first one that is not booked yet."""
        session, has_begun, next_distance = self._calls.popleft()
        if has_begun:
            self.book.began(agent_of(session), session)
            if session.adapter is not None:
                self._rate_adapter(session.adapter)
            return
        if session.is_idle:
            self._open.pop(session, None)
            self._actions.append(Rescore(session))
        here = self.book.ended(agent_of(session), next_distance)
        if here is not None:
            self._place(here, scored=session)

    # ---- what follows from it ----

    def score(self, session: Session, now_ns: int) -> Key:
        key = self._open.get(session)
        return key or (-self.book.position(agent_of(session)), session.last_used_ns)

    def order_key(self, session: Session, request: Request, now_ns: int) -> Key:
        return (now_ns if is_on_device(session) else now_ns + PATIENCE_NS,)

    def batch_tokens(self, prompts: OpenPrompts) -> int:
        """Calls that were loaded beforehand come all at once. In batches of n tokens, N tokens of prompts take N / n
        times base + n * token, and the mean prompt waits for half of that: least for n = sqrt(N * base / token).

        While calls wait for memory, each batch that reads prompts makes them wait longer, for decodes are slower beside
        prompts. Prompts are read together when they have waited for as long as that costs the others (the economic
        order quantity of Harris 1913: where holding costs as much as ordering, the sum is least).
        """
        if self._batch_ns is None:
            return prompts.num_tokens
        num_tokens, decodes = prompts.num_tokens, prompts.decodes
        base_ns, full_ns = self._batch_ns(decodes.with_prefill(1)), self._batch_ns(decodes.with_prefill(num_tokens))
        if decodes.num_decodes and prompts.waited_ns < (base_ns - self._batch_ns(decodes)) * prompts.num_waiting:
            return 0
        return math.isqrt(num_tokens * num_tokens * base_ns // max(1, full_ns - base_ns))

    def wants_prefetch(self, session: Session) -> bool:
        return self._is_near(self.book.position(agent_of(session)))

    @property
    def is_behind(self) -> bool:
        return bool(self._calls or self._moved) or self._has_crossed()

    def act(self, now_ns: int) -> Iterable[Action]:
        if self._has_news:
            self._has_news = False
        elif self._calls:
            self._book_next()
        else:
            for _ in range(MAX_MOVES):
                if not self._place_next():
                    break
        if not self._actions:
            return ()
        actions, self._actions = self._actions, []
        return actions

    def _place_next(self) -> bool:
        """Tells the memory of the nearest agent that has moved, or is near now; whether there was one."""
        while self._moved:
            place = heapq.heappop(self._moved)
            if self.book.is_at(place) and self.book.sessions_of(place[1]):
                self._place(place)
                return True
        # The point that has been reached may have moved: who was far is near now, at the same position.
        while self._has_crossed():
            place = heapq.heappop(self._crossing)
            if self.book.is_at(place):
                self._approach(place)
                return True
        return False

    def _place(self, place: Place, scored: Session | None = None) -> None:
        """Tells the memory where an agent without open calls is. `scored`: the session of which it knows."""
        for session in self.book.sessions_of(place[1]):
            if session is not scored:
                self._actions.append(Rescore(session))
            if session.adapter is not None:
                self.book.push(self._users.setdefault(session.adapter, []), place)
        self._approach(place)

    def _approach(self, place: Place) -> None:
        """Lets an agent be loaded that is near, now or when it is."""
        is_near = self._is_near(place[0])
        for session in self.book.sessions_of(place[1]):
            if session.adapter is not None:
                self._rate_adapter(session.adapter)
            if is_near:
                self._actions.append(Prefetch(session, max(place[0], self.book.reached)))
        if not is_near:
            self.book.push(self._crossing, place)

    def _has_crossed(self) -> bool:
        return bool(self._crossing) and self._is_near(self._crossing[0][0])

    def _is_near(self, position: float) -> bool:
        return position - self.book.reached < self._threshold

    def _rate_adapter(self, adapter: str) -> None:
        """An adapter is as near as the nearest of the agents that use it."""
        users = self._users.get(adapter, [])
        while users and not self.book.is_at(users[0]):
            heapq.heappop(users)
        nearest = max(users[0][0], self.book.reached) if users else math.inf
        self._actions.append(PlaceAdapter(adapter, nearest, self._is_near(nearest)))


def _key_of(request: Request) -> Key:
    """What the blocks of an open call are worth: more than those of idle sessions, and the less the later it comes."""
    place = (request.priority, request.num_slices, *request.order_key, request.sequence)
    return (math.inf, *(-number for number in place))


def agent_of(session: Session) -> str:
    """The name by which distances are told: the agent's, else the session's."""
    return session.agent_id or session.session_id


def is_on_device(session: Session) -> bool:
    """Whether at least half of what a session used last is still on the device: the end of a path is evicted first."""
    path = session.blocks.path
    return bool(path) and path[len(path) // 2].is_in_tree
