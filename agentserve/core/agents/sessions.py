"""To which session a call belongs: the one that its client names, else the one whose history it goes on with."""

from __future__ import annotations

from collections.abc import Sequence

from agentserve.core.agents.fingerprint import fingerprint
from agentserve.core.agents.policy import Policy
from agentserve.core.agents.registry import AgentRegistry, Session
from agentserve.core.events import SubmitRequest
from agentserve.core.memory.eviction import EvictionGroup, Rank
from agentserve.core.memory.manager import MemoryManager


class SessionFinder:
    """Opens the sessions of calls in the registry."""

    def __init__(self, registry: AgentRegistry, memory: MemoryManager) -> None:
        self._registry = registry
        self._memory = memory
        self._num_anonymous = 0

    def find(self, command: SubmitRequest, retention: Policy | None, now_ns: int) -> tuple[Session, Sequence[Session]]:
        """The session of a call, and those that were forgotten for it. `retention`: who rates its blocks."""
        session_id = command.session_id or command.agent_id or self._continued(command, retention)
        program_id, agent_key = command.program_id or session_id, None
        if retention is not None and retention.tracks_agents:
            session_id, agent_key = self._agent_session(session_id, command)
        competes = retention is not None and not retention.scores_blocks
        make_group = self._own_group if competes else self._common_group
        session, forgotten = self._registry.open(session_id, program_id, command.agent_id, now_ns, make_group)
        if agent_key is not None and session.agent_key is None:
            session.agent_key = agent_key
            session.blocks.anchors = self._registry.anchor(agent_key, self._anchor_group)
        return session, forgotten

    def _own_group(self) -> EvictionGroup:
        return self._memory.order.new_group((Rank.PRIVATE,))

    def _common_group(self) -> EvictionGroup:
        return self._memory.order.common

    def _anchor_group(self) -> EvictionGroup:
        return self._memory.order.new_group((Rank.SHARED,), is_shared=True)

    def _continued(self, command: SubmitRequest, retention: Policy | None) -> str:
        """The session of a call without any name."""
        if retention is not None:
            owner = self._memory.session_of(command.prompt_token_ids, salt=command.cache_salt)
            if owner is not None and owner.session_id in self._registry.sessions:
                return owner.session_id
        self._num_anonymous += 1
        return f"~{self._num_anonymous}"

    def _agent_session(self, session_id: str, command: SubmitRequest) -> tuple[str, str | None]:
        """The session of the agent that calls, if several share a session, and the name of that agent."""
        known = self._registry.sessions.get(session_id)
        agent = command.agent_id or fingerprint(command.prompt_token_ids)
        if known is None or known.agent_key in (None, agent) or agent is None:
            return session_id, agent
        return f"{session_id}\x1f{agent}", agent
