"""Which agent may call which tools, as the user says: `--tool-allow`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import ClassVar

from agentserve.core.agents.policy import Policy, ToolUse

EVERYBODY = "*"


class ToolAllowList(Policy):
    """An agent may call the tools of its own rules and those of everybody's (`*`); one without any rule may call all.

    Tools are names or patterns such as `mcp__github__*`. Agents are known by what they say of themselves: the list
    keeps a model from doing what its agent is not for, not a program from lying.
    """

    name: ClassVar[str] = "tool_allow"

    def __init__(self, rules: Iterable[tuple[str, Sequence[str]]]) -> None:
        """`rules`: agent and tools, any number of them for an agent."""
        self._tools: dict[str, list[str]] = {}
        for agent, tools in rules:
            self._tools.setdefault(agent, []).extend(tools)

    def refusal(self, use: ToolUse) -> str | None:
        own = None if use.agent is None else self._tools.get(use.agent)
        common = self._tools.get(EVERYBODY)
        if own is None and common is None:
            return None
        patterns = [*(own or ()), *(common or ())]
        if any(fnmatchcase(use.tool_name, pattern) for pattern in patterns):
            return None
        who = "an agent without a name" if use.agent is None else f"the agent {use.agent}"
        return f"{who} may call {', '.join(patterns) or 'no tool'} here" + (" and nothing else" if patterns else "")
