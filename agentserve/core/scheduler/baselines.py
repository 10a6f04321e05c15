"""Schedulers of other engines in this engine, so that a comparison differs in nothing else.

They run one batch at a time on the whole device and ask no controller. `EngineConfig.max_num_batched_tokens` bounds
every batch.
"""

from __future__ import annotations

from agentserve.core.batch import Lane, ScheduledChunk
from agentserve.core.events import EngineEvent
from agentserve.core.request import Request
from agentserve.core.scheduler.runs import RunScheduler


class ChunkedScheduler(RunScheduler):
    """Chunked prefill in hybrid batches (Sarathi-Serve, section 4; vLLM's default).

    Every batch holds all decodes and as much of the prompts as the token budget leaves room for. With a budget of
    2,048 tokens, vLLM's default, most prompts of agents are one chunk; Sarathi-Serve argues for 512 or less.
    """

    def _compose(self, now_ns: int, events: list[EngineEvent]) -> dict[Lane, list[ScheduledChunk]]:
        if self.in_flight:
            return {}
        decodes = self._decodes(now_ns, events)
        prompts = self._prompts(now_ns, self._prefilling(), self._config.max_num_batched_tokens - len(decodes), decodes)
        return {Lane.DECODE if decodes else Lane.PREFILL: decodes + prompts}


class PrefillFirstScheduler(RunScheduler):
    """Prompts before decodes, never in one batch (the default of SGLang, and of vLLM before version 1).

    Best for the time to the first token; a stream stands still while prompts are read.
    """

    def _compose(self, now_ns: int, events: list[EngineEvent]) -> dict[Lane, list[ScheduledChunk]]:
        if self.in_flight:
            return {}
        prompts = self._prompts(now_ns, self._prefilling(), self._config.max_num_batched_tokens)
        if prompts:
            return {Lane.PREFILL: prompts}
        return {Lane.DECODE: self._decodes(now_ns, events)}


class FcfsScheduler(ChunkedScheduler):
    """Requests in order of arrival, each as far as it can go (like llama.cpp's server).

    As above, but prompts are taken by arrival whatever `prefill_order` says; the budget is meant to hold whole prompts.
    """

    def _prefilling(self) -> list[Request]:
        # One whose prefix is being loaded is in flight, though no batch is.
        return [request for request in self._reading if not request.in_flight]
