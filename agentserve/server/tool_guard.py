"""Tool calls that must not leave the daemon: what the safety policies refuse.

A forbidden tool is not shown to the model and cannot be forced. A model that calls it all the same is stopped at its
name: nothing of the call is sent, and the answer ends with a sentence that says why.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from agentserve.core.agents.policy import Policy, ToolUse
from agentserve.server.errors import ForbiddenToolError
from agentserve.server.metrics import ServerMetrics
from agentserve.server.types import ChatPrompt, GenerateRequest, Identity, Prompt
from agentserve.text.tools.spec import ToolMode

logger = logging.getLogger("agentserve.safety")
_MAX_SHOWN = 64
_MAX_SEEN = 4096


class ToolGuard:
    """Asks the safety policies, in their order. Used on the event loop only."""

    def __init__(self, policies: Sequence[Policy], metrics: ServerMetrics) -> None:
        self._policies = tuple(policies)
        self._metrics = metrics
        self._seen: set[ToolUse] = set()

    @property
    def is_idle(self) -> bool:
        """Whether everything is allowed, so that nobody need be asked."""
        return not self._policies

    def screen(self, request: GenerateRequest) -> GenerateRequest:
        """The request without the tools that its agent must not call.

        Raises ForbiddenToolError if it forces such a call.
        """
        if self.is_idle:
            return request
        prompts = tuple(self._without_forbidden(prompt, request.identity) for prompt in request.prompts)
        choice = request.tool_choice
        if choice.name is not None:
            self._check_forced(request.identity, choice.name)
        elif choice.mode is ToolMode.REQUIRED:
            for before, after in zip(request.prompts, prompts, strict=True):
                if isinstance(before, ChatPrompt) and isinstance(after, ChatPrompt) and not after.tools:
                    self._check_forced(request.identity, before.tools[0].name)
        return replace(request, prompts=prompts)

    def refuse_call(self, identity: Identity, tool_name: str) -> str | None:
        """What to tell the client in place of a call that a model has begun; None if it may go on."""
        why = self._refusal(ToolUse(identity.name, tool_name))
        if why is None:
            return None
        self._metrics.count_refused_call("answer")
        logger.warning("agent=%s tool=%.64r stopped: %s", identity.name or "-", tool_name, why)
        return f"[The call of {tool_name[:_MAX_SHOWN]} was stopped: {why}.]"

    def _without_forbidden(self, prompt: Prompt, identity: Identity) -> Prompt:
        if not isinstance(prompt, ChatPrompt):
            return prompt
        kept = []
        for tool in prompt.tools:
            use = ToolUse(identity.name, tool.name)
            why = self._refusal(use)
            if why is None:
                kept.append(tool)
            elif use not in self._seen and len(self._seen) < _MAX_SEEN:
                self._seen.add(use)
                logger.info("agent=%s tool=%.64r is not offered: %s", identity.name or "-", tool.name, why)
        return prompt if len(kept) == len(prompt.tools) else replace(prompt, tools=tuple(kept))

    def _check_forced(self, identity: Identity, tool_name: str) -> None:
        why = self._refusal(ToolUse(identity.name, tool_name))
        if why is not None:
            self._metrics.count_refused_call("request")
            logger.warning("agent=%s tool=%.64r refused: %s", identity.name or "-", tool_name, why)
            raise ForbiddenToolError(
                f"tool_choice: {tool_name[:_MAX_SHOWN]!r} must not be called: {why}", param="tool_choice"
            )

    def _refusal(self, use: ToolUse) -> str | None:
        for policy in self._policies:
            try:
                why = policy.refusal(use)
            except Exception:
                # What cannot be checked does not leave.
                logger.exception("the safety policy %s failed", type(policy).__name__)
                why = "the safety policy failed"
            if why is not None:
                return why
        return None
