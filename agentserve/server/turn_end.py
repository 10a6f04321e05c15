"""Which tool runs behind an answer: what the engine is told once it is read."""

from __future__ import annotations

from collections.abc import Sequence

from agentserve.core.events import HUMAN
from agentserve.server.choice import Choice
from agentserve.server.types import ChatPrompt, GenerateRequest


def tool_behind(request: GenerateRequest, choices: Sequence[Choice]) -> str | None:
    """The names of all tools that complete answers call, each once, in alphabetical order, with `+` between them.

    The client comes back when all of them are done, so their gap is one of its own. `HUMAN` if no tool is called. None
    if nobody can tell: the answer was cut off, by a limit or for a client that looks for calls in the text itself, or
    it is no conversation.
    """
    is_chat = all(isinstance(prompt, ChatPrompt) for prompt in request.prompts)
    if not is_chat or not all(choice.ended_by_itself for choice in choices):
        return None
    return "+".join(sorted({name for choice in choices for name in choice.called})) or HUMAN
