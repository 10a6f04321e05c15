"""The retention seat: what its policy says of sessions and anchors, as keys in the memory."""

from __future__ import annotations

import math
import sys
from collections import Counter

from agentserve.config import EngineConfig
from agentserve.core.agents.isolation import Isolation
from agentserve.core.agents.pins import PinTimers
from agentserve.core.agents.policy import (
    Demote,
    Drop,
    Pin,
    PlaceAdapter,
    Policy,
    Rate,
    Rescore,
    RescoreAnchor,
    RetentionAction,
    Supersede,
)
from agentserve.core.agents.registry import AgentRegistry, Session
from agentserve.core.memory.eviction import Key, Rank
from agentserve.core.memory.manager import MemoryManager

_NO_KEY: Key = ()
_PINNED, _PRIVATE = Rank.PINNED, Rank.PRIVATE
_HELD_NS = sys.maxsize - 1
"""`Session.pinned_until_ns` of those that are pinned until the policy has been told that their turns have ended."""


class RetentionSeat:
    """Keeps the worth of what is cached as the policy has it. Without one, sessions are of no interest here."""

    def __init__(
        self,
        policy: Policy | None,
        config: EngineConfig,
        memory: MemoryManager,
        registry: AgentRegistry,
        *,
        isolation: Isolation,
        counts: Counter[str],
    ) -> None:
        self.policy = policy
        self._memory = memory
        self._registry = registry
        self._isolation = isolation
        self._counts = counts
        self._pins = PinTimers()
        self._changed: dict[Session, None] = {}
        """Sessions to which something has happened: they are rated once in a step."""
        if policy is not None:
            memory.use_policy(
                isolation.block_key(policy),
                protects_anchors=config.protects_anchors,
                max_pinned_blocks=int(config.pin_share * memory.num_blocks),
            )
            if policy.rates_by_users:
                memory.rate_by_users()

    def replace(self) -> None:
        """The policy has failed: blocks belong to no session any more, and those used longest ago go first."""
        self.policy = None
        self._changed.clear()
        self._registry.anchors.clear()
        self._memory.use_lru()
        for session in self._registry.sessions.values():
            session.pinned_until_ns = None
            session.blocks.group = self._memory.order.common
            session.blocks.anchors = None

    # ---- worth ----

    @property
    def rates_sessions(self) -> bool:
        """Whether sessions compete by what the policy says of them."""
        return self.policy is not None and not self.policy.scores_blocks

    def rescore(self, session: Session) -> None:
        """A session may be worth something else now: `settle` asks what."""
        policy = self.policy
        if policy is not None and not policy.scores_blocks:
            self._changed[session] = None

    def settle(self, now_ns: int) -> None:
        """Moves the blocks of sessions that are worth something else to their places. To be called before anything is
        evicted, and at the end of a step."""
        if self._changed:
            for session in self._changed:
                self._rate_anew(session, now_ns)
            self._changed.clear()

    def _rate_anew(self, session: Session, now_ns: int) -> None:
        policy = self.policy
        assert policy is not None, "sessions are rated without a policy"
        try:
            key = policy.score(session, now_ns)
        except Exception as error:  # noqa: BLE001  # see `Isolation.ask`: a call less for each session
            key = self._isolation.raised(policy, error, _NO_KEY)
        self.rate(session, key)

    def rate(self, session: Session, key: Key) -> None:
        """Takes what a session is worth."""
        blocks, is_pinned = session.blocks, session.pinned_until_ns is not None
        worth, group = (_PINNED if is_pinned else _PRIVATE, *key), blocks.group
        if worth != group.key or is_pinned != group.is_pinned:
            self._memory.rekey(blocks, worth, is_pinned=is_pinned)

    def rescore_anchor(self, agent: str, now_ns: int) -> None:
        """Asks what the calls of an agent have in common is worth."""
        policy, group = self.policy, self._registry.anchors.get(agent)
        if policy is not None and group is not None:
            self._memory.order.rekey(group, self._isolation.ask(policy, group.key, policy.score_anchor, agent, now_ns))

    def do(self, action: RetentionAction, now_ns: int) -> None:
        """Does what a policy wants done with the memory."""
        if isinstance(action, Pin):
            self.pin(action.session, action.until_ns, now_ns)
        elif isinstance(action, Rate):
            for session, key in action.keys:
                self.rate(session, key)
        elif isinstance(action, Rescore):
            self.rescore(action.session)
        elif isinstance(action, RescoreAnchor):
            self.rescore_anchor(action.agent, now_ns)
        elif not isinstance(action, PlaceAdapter):
            self.give_up(action, now_ns)
        elif self._memory.adapters is not None:
            limit = math.inf if action.is_wanted else -math.inf
            self._memory.adapters.set_distances({action.adapter: action.distance}, prefetch_below=limit)

    def give_up(self, action: Drop | Demote | Supersede, now_ns: int) -> None:
        """Frees blocks of a session, or lets them go first or down to the next tier."""
        session, memory = action.session, self._memory
        if isinstance(action, Supersede):
            self._counts["blocks_superseded"] += memory.supersede(session.blocks, action.num_tokens)
        elif not session.is_idle:
            return
        elif isinstance(action, Demote):
            if session in self._changed:
                self._rate_anew(session, now_ns)  # it is worth the same below
            self._counts["blocks_demoted"] += memory.demote(session.blocks)
        else:
            # What a batch in flight still writes to is dropped when it is done.
            session.blocks.is_transient = True
            memory.drop(session.blocks, action.max_blocks)

    # ---- pins ----

    def hold(self, session: Session, now_ns: int) -> bool:
        """A turn has ended. If the policy sets pins, what the turn has left is pinned until the policy is told, in a
        step to come, for this step's admissions must not take what is to stay. Whether that is so."""
        policy = self.policy
        if policy is None or not policy.pins or session.is_last_turn:
            return False
        if session.is_idle:
            session.pinned_until_ns = _HELD_NS
            self._rate_anew(session, now_ns)  # among pins that have to yield it has its place
        return True

    def hold_no_more(self, session: Session) -> None:
        """The policy is told now."""
        if session.pinned_until_ns == _HELD_NS:
            self.unpin(session)

    def next_pin_ns(self) -> int | None:
        """When the next pin ends."""
        return self._pins.next_ns()

    def expire_pins(self, now_ns: int) -> None:
        """Ends the pins whose time is over."""
        for session in self._pins.pop_expired(now_ns):
            self._counts["pins_expired"] += 1
            self.unpin(session)

    def pin(self, session: Session, until_ns: int, now_ns: int) -> None:
        """Only an idle session is pinned: what an open call needs is held."""
        if not session.is_idle:
            return
        if until_ns > now_ns:
            self._counts["pins_set"] += session.pinned_until_ns is None
            self._pins.start(session, until_ns)
        elif session.pinned_until_ns is not None:
            session.pinned_until_ns = None
        else:
            return
        self.rescore(session)

    def unpin(self, session: Session) -> None:
        """Ends the pin of a session, if it has one."""
        session.pinned_until_ns = None
        if session.blocks.group.is_pinned:
            self.rescore(session)
