"""Who asks: sessions and programs, and what was seen of them so far.

Only the past is kept here. What a client does not say is not guessed, but for one thing: a call without any name
belongs to the session whose history it goes on with.
"""

from __future__ import annotations

import bisect
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from agentserve.core.events import HUMAN, Foresight
from agentserve.core.memory.eviction import EvictionGroup, SessionBlocks

MAX_SESSIONS = 4096
"""Sessions that are remembered; the idle one that was used longest ago is forgotten first."""
MAX_AGENTS = 4096
"""Agents whose anchors are told apart."""
_MAX_TOOLS = 256
_MAX_GAPS = 128
"""Gaps of one tool that are remembered, the latest ones."""
_MAX_CANDIDATES = 32
"""Of those, at most so many are looked at as times to wait: quantiles, the longest gap among them."""
_CANDIDATES_A_PIECE = 8
"""That are looked at in one piece of the work."""


@dataclass(slots=True, eq=False, weakref_slot=True)
class Program:
    """What an agent was asked to do, from its first call to its last one; one session or several."""

    program_id: str
    arrival_ns: int
    sequence: int
    """Order of arrival."""
    num_sessions: int = 0
    num_turns: int = 0
    """Calls that have ended."""
    attained_ns: int = 0
    """Time for which its calls have run, summed over calls."""
    waited_ns: int = 0
    """Time for which its calls have waited for memory or their turn."""


@dataclass(slots=True, eq=False, weakref_slot=True)
class Session:
    """A run of turns that share a growing prefix."""

    session_id: str
    program: Program
    blocks: SessionBlocks
    agent_id: str | None = None
    agent_key: str | None = None
    """Whose calls these are, for policies that track agents: the agent's name, or what its prompts begin with."""
    num_turns: int = 0
    """Calls that have ended."""
    num_waiting: int = 0
    num_running: int = 0
    context_tokens: int = 0
    """Prompt and output of the call that ended last."""
    shared_tokens: int | None = None
    """Tokens of its first prompt that were cached when that was admitted: others have read them. None: not yet."""
    ended_ids: list[str] = field(default_factory=list)
    """Its calls that have ended since the last one came."""
    last_used_ns: int = 0
    """When a call of it came or ended."""
    idle_since_ns: int | None = None
    """End of its last call if none is open: the tool runs since then."""
    tool_name: str | None = None
    """The tool that the last call ended with, `HUMAN` if it called none; None: nobody said."""
    is_last_turn: bool | None = None
    """Whether the last call that came is the program's last one. None: nobody said."""
    foresight: Foresight | None = None
    """What an oracle may know; None outside the simulator."""
    adapter: str | None = None
    """The LoRA adapter of its last call."""
    next_distance: float | None = None
    """What its last call said about the distance of the next one."""
    pinned_until_ns: int | None = None
    """Its blocks stay until then; None: they are not pinned."""
    pin_id: int = 0
    """Number of its latest pin: tells a timer whether it is outdated."""

    @property
    def is_idle(self) -> bool:
        return self.num_waiting + self.num_running == 0

    def is_pinned(self, now_ns: int) -> bool:
        """Whether its blocks are to stay."""
        return self.pinned_until_ns is not None and now_ns < self.pinned_until_ns


@dataclass(slots=True)
class GapSamples:
    """The latest gaps of one tool, in nanoseconds: from the end of a turn to the arrival of the next one.

    Every call adds one, and hardly any policy asks: a gap costs O(1), and what they say about times to wait is worked
    out by `refresh`.
    """

    latest: deque[int] = field(default_factory=lambda: deque(maxlen=_MAX_GAPS))
    _sum_ns: int = 0
    _num_new: int = 0
    _candidates_ns: list[int] = field(default_factory=lambda: [0])
    _thresholds_ns: list[float] = field(default_factory=list)
    _work: Iterator[None] | None = None
    """The `refresh` under way."""

    @property
    def ascending(self) -> list[int]:
        """The gaps in order. O(n log n)."""
        return sorted(self.latest)

    @property
    def is_stale(self) -> bool:
        """Whether `refresh` is due: one in 16 gaps is new, or any if there are few."""
        return 16 * self._num_new >= len(self.latest) > 0

    def best_wait_ns(self, benefit_ns: float) -> int:
        """The time that maximizes `P(gap <= time) * benefit_ns - time`, over 0 and the gaps that were seen.

        Of equal ones the shortest. With many gaps only `_MAX_CANDIDATES` of them are tried, evenly by rank. This takes
        O(log n) and is as of the last `refresh`, for which who asks finds a quiet time while `is_stale`; it is done
        here if there are few gaps, or a quarter of them is new.
        """
        num = len(self.latest)
        if 16 * self._num_new >= num > 0 and (num <= _MAX_CANDIDATES or 4 * self._num_new >= num):
            self.refresh()
        return self._candidates_ns[bisect.bisect_left(self._thresholds_ns, benefit_ns)]

    def refresh(self) -> None:
        """Works out anew what the gaps say about times to wait."""
        while not self.refresh_more():
            pass

    def refresh_more(self) -> bool:
        """Does a piece of `refresh`, of about ten microseconds; whether it was the last one."""
        if self._work is None:
            self._work = self._refreshing()
        for _ in self._work:
            return False
        self._work = None
        return True

    def _refreshing(self) -> Iterator[None]:
        """Which gaps can be the best time to wait, and from which benefit on: the upper hull of how many are as short,
        where its slope is that."""
        ascending = self.ascending
        num = len(ascending)
        every = -(-num // _MAX_CANDIDATES)
        self._num_new = 0
        gaps_ns, counts, thresholds_ns = [0], [0], list[float]()
        for index, count in enumerate((*range(every, num, every), num)):
            if index % _CANDIDATES_A_PIECE == 0:
                yield
            gap_ns = ascending[count - 1]
            threshold_ns = (gap_ns - gaps_ns[-1]) * num / (count - counts[-1])
            while thresholds_ns and threshold_ns <= thresholds_ns[-1]:
                thresholds_ns.pop()
                gaps_ns.pop()
                counts.pop()
                threshold_ns = (gap_ns - gaps_ns[-1]) * num / (count - counts[-1])
            gaps_ns.append(gap_ns)
            counts.append(count)
            thresholds_ns.append(threshold_ns)
        self._candidates_ns, self._thresholds_ns = gaps_ns, thresholds_ns

    def add(self, gap_ns: int) -> None:
        """Takes a gap; the oldest one goes when there are too many."""
        latest = self.latest
        self._sum_ns += gap_ns - latest[0] if len(latest) == _MAX_GAPS else gap_ns
        latest.append(gap_ns)
        self._num_new += 1

    @property
    def mean_ns(self) -> float:
        """Raises ZeroDivisionError if there is none."""
        return self._sum_ns / len(self.latest)


class GapStatistics:
    """How long tools run, as seen from here. What people take is a class of its own, which says nothing about tools."""

    def __init__(self) -> None:
        self.overall = GapSamples()
        self._by_tool: OrderedDict[str, GapSamples] = OrderedDict()

    def add(self, tool_name: str | None, gap_ns: int) -> None:
        if tool_name != HUMAN:
            self.overall.add(gap_ns)
        if tool_name is None:
            return
        samples = self._by_tool.get(tool_name)
        if samples is None:
            samples = self._by_tool[tool_name] = GapSamples()
            if len(self._by_tool) > _MAX_TOOLS:
                self._by_tool.popitem(last=False)
        self._by_tool.move_to_end(tool_name)
        samples.add(gap_ns)

    def of(self, tool_name: str | None, min_samples: int) -> GapSamples | None:
        """The gaps of a tool, of all tools if there are fewer than `min_samples`, None if there are too few even so."""
        samples = None if tool_name is None else self._by_tool.get(tool_name)
        if samples is not None and len(samples.latest) >= min_samples:
            return samples
        return self.overall if tool_name != HUMAN and len(self.overall.latest) >= min_samples else None


class AgentRegistry:
    """All sessions and programs that are remembered."""

    def __init__(self) -> None:
        self.sessions: OrderedDict[str, Session] = OrderedDict()
        self.programs: dict[str, Program] = {}
        self.gaps = GapStatistics()
        self.anchors: OrderedDict[str, EvictionGroup] = OrderedDict()
        """What the calls of an agent have in common, by agent; only if a policy tracks agents."""
        self._num_programs = 0

    def open(
        self,
        session_id: str,
        program_id: str,
        agent_id: str | None,
        now_ns: int,
        make_group: Callable[[], EvictionGroup],
    ) -> tuple[Session, Sequence[Session]]:
        """The session, new if need be with a group for its blocks, and the sessions that were forgotten for it."""
        session = self.sessions.get(session_id)
        forgotten: Sequence[Session] = ()
        if session is None:
            program = self.programs.get(program_id)
            if program is None:
                self._num_programs += 1
                program = self.programs[program_id] = Program(program_id, now_ns, self._num_programs)
            program.num_sessions += 1
            session = Session(session_id, program, SessionBlocks(session_id, make_group()), agent_id)
            self.sessions[session_id] = session
            forgotten = self._forget_idle()
        self.sessions.move_to_end(session_id)
        return session, forgotten

    def anchor(self, agent: str, make: Callable[[], EvictionGroup]) -> EvictionGroup:
        """The group of an agent's anchors, a new one if need be. Beyond `MAX_AGENTS` that which was asked for longest
        ago stays as it is."""
        group = self.anchors.get(agent)
        if group is None:
            group = self.anchors[agent] = make()
            if len(self.anchors) > MAX_AGENTS:
                self.anchors.popitem(last=False)
        self.anchors.move_to_end(agent)
        return group

    def _forget_idle(self) -> list[Session]:
        """Makes room for a new session. Open ones are passed over, so there may be more than the limit for a while."""
        forgotten: list[Session] = []
        for session in self.sessions.values():
            if len(self.sessions) - len(forgotten) <= MAX_SESSIONS:
                break
            # The newest one has no call yet.
            if session.is_idle and session.num_turns:
                forgotten.append(session)
        for session in forgotten:
            del self.sessions[session.session_id]
            session.program.num_sessions -= 1
            if session.program.num_sessions == 0:
                del self.programs[session.program.program_id]
        return forgotten
