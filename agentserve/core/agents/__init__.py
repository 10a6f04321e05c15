"""The agent runtime layer: who asks, what that means for memory and order, and the policies that decide about it."""

from agentserve.core.agents.factory import POLICIES, Seats, build_policies
from agentserve.core.agents.policy import Policy, TurnEvent
from agentserve.core.agents.runtime import AgentRuntime

__all__ = ["POLICIES", "AgentRuntime", "Policy", "Seats", "TurnEvent", "build_policies"]
