"""What a policy is: observe, score, predict, act (CacheSage, section 3; design, section 7).

A policy sits in one seat or in several: *retention* says what is worth keeping, *order* who goes first, *admission* who
has to wait, *speculation* which prompts are computed before they come, *safety* which tool calls must not leave. What
it does not say is decided as without it. It must not do what the control plane must not do: no clock, no files, no
threads.
"""

# ruff: noqa: ARG002  # a hook gets what any policy may need

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, NamedTuple, TypeAlias

from agentserve.core.agents.registry import AgentRegistry, Session
from agentserve.core.batch import OpenPrompts
from agentserve.core.events import SetDistances
from agentserve.core.memory.eviction import Key, Rank, lru_key
from agentserve.core.memory.radix import RadixNode
from agentserve.core.request import FinishReason, Request


class TurnKind(StrEnum):
    """What happened to a call of a session."""

    SUBMITTED = "submitted"
    ADMITTED = "admitted"
    PREEMPTED = "preempted"
    FINISHED = "finished"


class TurnEvent(NamedTuple):
    """Something happened to a call. The session has its new state already."""

    kind: TurnKind
    session: Session
    request: Request
    at_ns: int
    lasted_ns: int = 0
    """ADMITTED: how long it has waited. PREEMPTED, FINISHED: how long it has run, 0 if it never did."""
    reason: FinishReason | None = None
    """FINISHED: why."""


@dataclass(frozen=True, slots=True)
class ToolUse:
    """A tool call that a model has written, and that its client has not seen yet."""

    agent: str | None
    """The agent that the client names, else its session; None: it names neither."""
    tool_name: str


@dataclass(frozen=True, slots=True)
class Forecast:
    """When a session is expected to need its blocks again."""

    next_use_ns: float
    """On the driver's clock; infinite: never."""


def forecast_from_gaps(registry: AgentRegistry, session: Session, now_ns: int) -> Forecast | None:
    """After the mean of the measured gaps of the session's tool; None: nothing was measured yet."""
    if session.idle_since_ns is None:
        return Forecast(now_ns)
    if session.is_last_turn:
        return Forecast(math.inf)
    gaps = registry.gaps.of(session.tool_name, 1)
    return None if gaps is None else Forecast(session.idle_since_ns + gaps.mean_ns)


class Pin(NamedTuple):
    """Keeps the private blocks of a session until a time, or until its next call has been admitted. A time that is over
    ends an earlier pin.

    Pins hold back admissions, within a share of the memory. They yield when nothing runs that could end, and to
    requests that run already.
    """

    session: Session
    until_ns: int


class Drop(NamedTuple):
    """Frees the private blocks of a session that nobody holds, the ends of its branches first."""

    session: Session
    max_blocks: int | None = None
    """At most so many of them. None: all."""


class Supersede(NamedTuple):
    """Lets the private blocks behind the first `num_tokens` tokens of a session's last call go first."""

    session: Session
    num_tokens: int


class Demote(NamedTuple):
    """Takes the private blocks of a session that nobody holds down to the next tier, while its tool runs."""

    session: Session


class Rescore(NamedTuple):
    """Asks `score` again: a session is worth more or less than before although nothing happened to it."""

    session: Session


class Rate(NamedTuple):
    """The same for many sessions at once, with the keys that `score` would give."""

    keys: tuple[tuple[Session, Key], ...]


class RescoreAnchor(NamedTuple):
    """Asks `score_anchor` again."""

    agent: str


class Prefetch(NamedTuple):
    """Loads what lower tiers have of a session's blocks, as soon as there is room: the smallest distance first.

    It takes the place of free blocks and of sessions that are worth less. It ends when the session calls, and when the
    policy does not `wants_prefetch` any more; until then, what is evicted meanwhile is loaded again.
    """

    session: Session
    distance: float


class PlaceAdapter(NamedTuple):
    """How far the next use of a LoRA adapter is, and whether it is to be loaded before that."""

    adapter: str
    distance: float
    is_wanted: bool


class Reprioritize(NamedTuple):
    """Gives a call that waits another place within its priority."""

    request_id: str
    key: Key


class Admit(NamedTuple):
    """Queues a call for which `holds` was true."""

    request_id: str


RetentionAction: TypeAlias = Pin | Drop | Supersede | Demote | Rescore | Rate | RescoreAnchor | PlaceAdapter
"""What is done with the memory."""
Action: TypeAlias = RetentionAction | Prefetch | Reprioritize | Admit


class Policy:
    """Base class, and the built-in behaviour of each seat: least recently used goes first, first come first served."""

    name: ClassVar[str] = "lru"
    scores_blocks: ClassVar[bool] = False
    """True: blocks compete one by one, by `score_block`. False: sessions compete by `score`, and within a session the
    end of what was used longest ago goes first."""

    tracks_agents: ClassVar[bool] = False
    """True: agents are told apart within a session, by their prompts if the client names none, and the anchors of each
    one compete by `score_anchor`. Each agent of a session that several share has its calls in a session of its own."""

    rates_by_users: ClassVar[bool] = False
    """True: what several sessions use is worth what it is to the one that values it most. False: it is an anchor."""

    pins: ClassVar[bool] = False
    """Whether it may pin what a turn has left, in the `act` after it was told that the turn has ended. Then it is told
    in a step of its own, which follows at once, and until then what the turn has left is pinned; unless that turn was
    the program's last one."""

    @property
    def is_behind(self) -> bool:
        """Whether `act` has more to do: then it is called again at once, in a step of its own. So a policy that learns
        or rates a lot does a bounded part of it in each step. It must come to an end."""
        return False

    def set_distances(self, command: SetDistances, now_ns: int) -> None:
        """Somebody said how far agents are from their next calls."""

    def wants_prefetch(self, session: Session) -> bool:
        """Whether an idle session for which `Prefetch` was said is still to be on the device."""
        return False

    def observe(self, event: TurnEvent) -> None:
        """Called for everything that happens to a call, in order: at once when a call has come, and before anything
        else that is asked or said meanwhile. Of the other events of a step some may come after the next `act`."""

    def tool_called(self, session: Session, now_ns: int) -> None:
        """It is known now which tool an idle session runs: answers are read when `FINISHED` was told already."""

    def score(self, session: Session, now_ns: int) -> Key:
        """What the blocks of a session are worth; the smallest goes first. Asked after each of the session's events."""
        return (session.last_used_ns,)

    def score_block(self, node: RadixNode) -> Key:
        """The same for a single block. It must not change while nobody uses the block."""
        return lru_key(node)

    def score_anchor(self, agent: str, now_ns: int) -> Key:
        """What is worth keeping of what the calls of an agent have in common, its rank first. Asked on `RescoreAnchor`
        only: until then it is worth what `Rank.SHARED` alone says."""
        return (Rank.SHARED,)

    def predict(self, session: Session, now_ns: int) -> Forecast | None:
        """When an idle session will be back. None: no idea."""
        return None

    def order_key(self, session: Session, request: Request, now_ns: int) -> Key:
        """The place of a call among those of its priority, as it comes; the smallest goes first, then the oldest."""
        return ()

    def holds(self, session: Session, request: Request, now_ns: int) -> bool:
        """Admission: whether a call that has come waits until `act` says `Admit`. Not asked again after preemptions.

        A policy that holds names a deadline, or frees the call when another one ends: if nothing else is left to do and
        there is no deadline, the first call that is held goes on.
        """
        return False

    def refusal(self, use: ToolUse) -> str | None:
        """Safety: why a tool call must not leave the daemon, as the end of a sentence; None: it may.

        Asked for each tool that a request offers, and once for each call before any of it is sent. The daemon asks an
        instance of its own, which sees no events: `--safety`.
        """
        return None

    def batch_tokens(self, prompts: OpenPrompts) -> int:
        """Batch shaping: how many tokens of prompts a batch is to read. 0: none this time, if it has decodes.

        Prompts are not cut for that: the first one is read in any case, the others as far as they fit.
        """
        return prompts.num_tokens

    def speculates(self, session: Session, start: int, num_missing: int, now_ns: int) -> int:
        """Speculation: how many tokens of an idle session's next prompt are to be computed in one piece; 0: none.

        Its first `start` tokens are cached. `num_missing` tokens were or are not: those that are known behind `start`,
        and those of pieces before this one. At least a block is computed.
        """
        return 0

    def act(self, now_ns: int) -> Iterable[Action]:
        """What to do now. Called before each admission after an event, and when a deadline is due."""
        return ()

    def next_deadline_ns(self) -> int | None:
        """When `act` is to be called even if nothing happens, while calls wait."""
        return None
