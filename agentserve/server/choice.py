"""One stream of tokens, as text."""

from __future__ import annotations

from collections.abc import Sequence

from agentserve.core.request import FinishReason, SamplingParams
from agentserve.errors import EngineError
from agentserve.runtime.client import StreamEnd, StreamEvent, StreamProgress, StreamTokens, TokenStream
from agentserve.server.errors import ShuttingDownError
from agentserve.server.observe import RequestObserver
from agentserve.server.types import ChoiceFinished, GenerationEvent, Progress, TextDelta, TokenLogprob
from agentserve.text.detokenizer import IncrementalDetokenizer
from agentserve.text.stop import StopStringMatcher
from agentserve.text.tokenizer import Tokenizer


class Choice:
    """Detokenizes the stream of one choice, looks for stop strings and counts."""

    def __init__(
        self,
        index: int,
        stream: TokenStream,
        *,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        stop: tuple[str, ...],
        observer: RequestObserver,
    ) -> None:
        self.index = index
        self.finished = False
        self.num_output_tokens = 0
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.work_class = ""
        self.queue_ns = 0
        self._stream = stream
        self._tokenizer = tokenizer
        self._sampling = sampling
        self._detokenizer = IncrementalDetokenizer(tokenizer, prompt_token_ids=prompt_token_ids)
        self._matcher = StopStringMatcher(stop) if stop else None
        self._stopped = False
        self._observer = observer

    async def receive(self) -> list[GenerationEvent]:
        """Waits for the next event of the stream; the list may be empty.

        Raises EngineError when the engine failed and ShuttingDownError after `abort`.
        """
        event: StreamEvent = await anext(self._stream)
        if isinstance(event, StreamEnd):
            return self._end(event)
        if self._stopped:  # what was sampled before the engine heard of the stop string
            return []
        if isinstance(event, StreamProgress):
            return [Progress(self.index, event.num_computed_tokens, event.num_prompt_tokens)]
        return self._push(event)

    def abort(self) -> None:
        self._stream.finish(FinishReason.CANCELLED)

    def _push(self, event: StreamTokens) -> list[GenerationEvent]:
        pieces: list[str] = []
        logprobs: list[TokenLogprob] = []
        num_before = self.num_output_tokens
        for sample in event.samples:
            self.num_output_tokens += 1
            if sample.token_id in self._sampling.stop_token_ids:
                break  # ends the generation and is not part of the text
            if sample.logprob is not None:
                logprobs.append(self._describe(sample.token_id, sample.logprob, sample.top_logprobs))
            pieces.append(self._match(self._detokenizer.push(sample.token_id)))
            if self._stopped:
                self._stream.finish(FinishReason.STOP)
                break
        self._observer.tokens(self.index, event.times_ns[: self.num_output_tokens - num_before])
        return self._delta("".join(pieces), logprobs)

    def _end(self, end: StreamEnd) -> list[GenerationEvent]:
        self.finished = True
        reason = FinishReason.STOP if self._stopped else end.reason
        self._observer.ended(self.index, reason, end.stats)
        if reason is FinishReason.ERROR:
            raise EngineError(end.error or "the engine failed")
        if reason is FinishReason.CANCELLED:
            raise ShuttingDownError("The server is shutting down.")
        stats = end.stats
        self.num_cached_tokens = stats.num_cached_tokens
        self.num_preemptions = stats.num_preemptions
        self.work_class = stats.first_work_class
        if stats.first_scheduled_ns is not None:
            self.queue_ns = stats.first_scheduled_ns - stats.arrival_ns
        events: list[GenerationEvent] = []
        if not self._stopped:
            text = self._match(self._detokenizer.flush())
            if self._matcher is not None and not self._stopped:
                text += self._matcher.flush()
            reason = FinishReason.STOP if self._stopped else reason
            events += self._delta(text, [])
        return [*events, ChoiceFinished(self.index, reason, self.num_output_tokens)]

    def _match(self, text: str) -> str:
        """What of `text` may be shown by now. Stop strings count only once `min_tokens` are there."""
        if self._matcher is None or not text or self.num_output_tokens <= self._sampling.min_tokens:
            return text
        safe, matched = self._matcher.push(text)
        self._stopped = matched is not None
        return safe

    def _delta(self, text: str, logprobs: list[TokenLogprob]) -> list[GenerationEvent]:
        if not text and not logprobs:
            return []
        return [TextDelta(self.index, text, tuple(logprobs), self.num_output_tokens)]

    def _describe(self, token_id: int, logprob: float, top: tuple[tuple[int, float], ...]) -> TokenLogprob:
        data = self._tokenizer.token_bytes(token_id)
        alternatives = tuple(self._describe(other, value, ()) for other, value in top)
        return TokenLogprob(data.decode("utf-8", "replace"), data, logprob, alternatives)
