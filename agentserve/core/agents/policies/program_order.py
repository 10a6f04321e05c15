"""First come, first served: by calls, or by programs."""

# ruff: noqa: ARG002  # a hook gets what any policy may need

from __future__ import annotations

from typing import ClassVar

from agentserve.core.agents.policy import Policy
from agentserve.core.agents.registry import Session
from agentserve.core.memory.eviction import Key
from agentserve.core.request import Request


class Fcfs(Policy):
    """Calls in the order of their arrival: at admission, and when prompts are read."""

    name: ClassVar[str] = "fcfs"


class ProgramFcfs(Policy):
    """Calls in the order in which their programs arrived: who has begun is served to its end."""

    name: ClassVar[str] = "program_fcfs"

    def order_key(self, session: Session, request: Request, now_ns: int) -> Key:
        return (session.program.sequence,)
