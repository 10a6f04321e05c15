"""While a tool runs: tells the engine what the next prompt of its session begins with, see `core.agents.speculation`.

The next prompt is rendered and tokenized as if it had come, with a mark as the result of the tool; what stands before
the mark is known. That happens in a worker thread, once for an answer that calls tools, after its client has got it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import secrets
from collections.abc import Sequence
from concurrent.futures import Executor
from functools import partial

from agentserve.errors import InvalidRequestError
from agentserve.runtime.client import EngineClient
from agentserve.server.choice import Choice
from agentserve.server.prompt import PromptBuilder
from agentserve.server.types import ChatPrompt, GenerateRequest

logger = logging.getLogger(__name__)


class NextPromptTeller:
    """Used on the event loop."""

    def __init__(self, client: EngineClient, prompts: PromptBuilder, workers: Executor) -> None:
        self._client = client
        self._prompts = prompts
        self._workers = workers
        self._mark = f"q{secrets.token_hex(8)}z"
        self._tasks: set[asyncio.Task[None]] = set()

    def answered(self, request: GenerateRequest, choices: Sequence[Choice]) -> None:
        """An answer is complete. Nothing is told of several choices: nobody knows which one the client goes on with."""
        prompt = self._next_prompt(request, choices)
        if prompt is not None:
            task = asyncio.create_task(self._tell(request, prompt, choices[0].request_id))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _next_prompt(self, request: GenerateRequest, choices: Sequence[Choice]) -> ChatPrompt | None:
        """The conversation with the answer, and with marks as the results of its calls; None if nobody can know it."""
        prompt = request.prompts[0]
        if len(choices) > 1 or not isinstance(prompt, ChatPrompt) or prompt.prefill or not choices[0].ended_by_itself:
            return None
        answer = choices[0].recorder.message()
        if answer is None or not answer["tool_calls"]:
            return None
        results = [
            {"role": "tool", "content": self._mark, "name": call["function"]["name"], "tool_call_id": call["id"]}
            for call in answer["tool_calls"]
        ]
        return dataclasses.replace(prompt, messages=(*prompt.messages, answer, *results))

    async def _tell(self, request: GenerateRequest, prompt: ChatPrompt, request_id: str) -> None:
        build = partial(
            self._prompts.build_until, prompt, self._mark, identity=request.identity, cache_salt=request.cache_salt
        )
        try:
            token_ids = await asyncio.get_running_loop().run_in_executor(self._workers, build)
        except InvalidRequestError as error:
            # The client will be told when it comes with such a prompt.
            logger.debug("id=%s its next prompt cannot be rendered: %s", request_id, error)
            return
        if token_ids:
            self._client.speculate(request_id, token_ids)
