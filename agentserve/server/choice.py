"""One stream of tokens, as typed pieces of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from agentserve.core.request import FinishReason, SamplingParams
from agentserve.errors import EngineError
from agentserve.runtime.streams import StreamEnd, StreamEvent, StreamProgress, StreamTokens, TokenStream
from agentserve.server.answer_format import AnswerParser, merge
from agentserve.server.errors import ShuttingDownError, SlowReaderError
from agentserve.server.observe import RequestObserver
from agentserve.server.recorder import AnswerRecorder
from agentserve.server.types import ChoiceFinished, Delta, GenerationEvent, Progress, TokenLogprob
from agentserve.text.detokenizer import IncrementalDetokenizer
from agentserve.text.stop import StopStringMatcher
from agentserve.text.tokenizer import Tokenizer
from agentserve.text.tools.spec import Piece, ReasoningPiece, TextPiece, ToolCallFinished, ToolCallStarted


class RefuseCall(Protocol):
    """Says what is shown in place of a call of this tool; None if the call may leave."""

    def __call__(self, tool_name: str, /) -> str | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceOptions:
    """How the tokens of one choice are read."""

    sampling: SamplingParams
    stop: tuple[str, ...]
    one_call: bool
    """Whether the answer ends with its first complete tool call."""
    limit_is_window: bool
    """Whether `sampling.max_tokens` is what is left of the window rather than the client's own limit."""
    refuse_call: RefuseCall | None = None
    """None: all calls may leave."""


class Choice:
    """Detokenizes the stream of one choice, looks for stop strings, parses and counts."""

    def __init__(
        self,
        index: int,
        stream: TokenStream,
        *,
        tokenizer: Tokenizer,
        detokenizer: IncrementalDetokenizer,
        parser: AnswerParser,
        options: ChoiceOptions,
        observer: RequestObserver,
        recorder: AnswerRecorder,
    ) -> None:
        self.index = index
        self.finished = False
        self.num_output_tokens = 0
        self.num_cached_tokens = 0
        self.num_reasoning_tokens = 0
        self.num_preemptions = 0
        self.work_class = ""
        self.queue_ns = 0
        self._stream = stream
        self._tokenizer = tokenizer
        self._detokenizer = detokenizer
        self._parser = parser
        self._options = options
        self._matcher = StopStringMatcher(options.stop) if options.stop else None
        self._stop_string: str | None = None
        self._stopped = False
        self._is_reasoning = False
        self._has_text = False
        self._is_cut = False
        """Whether the rest of what the model writes is of no concern: one call was wanted, or one was refused."""
        self._refused = False
        self._unsent: list[TokenLogprob] = []
        self.called: list[str] = []
        """Tools of its complete calls, in their order."""
        self.ended_by_itself = False
        """Whether the answer ended where the model wanted, or where the last call ended that was wanted."""
        self._observer = observer
        self.recorder = recorder

    async def receive(self) -> list[GenerationEvent]:
        """Waits for the next event of the stream; the list may be empty.

        Raises EngineError when the engine failed, ShuttingDownError after `abort`, and SlowReaderError when too much
        was left unread.
        """
        event: StreamEvent = await anext(self._stream)
        if isinstance(event, StreamEnd):
            return self._end(event)
        if self._stopped:  # what was sampled before the engine heard that this is the end
            return []
        if isinstance(event, StreamProgress):
            elapsed_ns = self._observer.elapsed_ns()
            return [Progress(self.index, event.num_computed_tokens, event.num_prompt_tokens, elapsed_ns)]
        return self._push(event)

    @property
    def request_id(self) -> str:
        """The engine's."""
        return self._stream.request_id

    def abort(self) -> None:
        self._stream.finish(FinishReason.CANCELLED)

    def _push(self, event: StreamTokens) -> list[GenerationEvent]:
        pieces: list[Piece] = []
        logprobs: list[TokenLogprob] = []
        num_before = self.num_output_tokens
        for sample in event.samples:
            self.num_output_tokens += 1
            if sample.token_id in self._options.sampling.stop_token_ids:
                self.recorder.end_turn()
                break  # ends the generation and is not part of the text
            self.recorder.token(sample.token_id)
            num_pieces = len(pieces)
            if sample.logprob is not None:
                self._unsent.append(self._describe(sample.token_id, sample.logprob, sample.top_logprobs))
            pieces += self._read(self._match(self._detokenizer.push(sample.token_id)))
            # The tokens of what may become a call that is refused must not be seen before that is known.
            if self._options.refuse_call is None or (len(pieces) > num_pieces and not self._refused):
                logprobs += self._unsent
                self._unsent.clear()
            self.num_reasoning_tokens += self._is_reasoning
            if self._stopped:
                self._stream.finish(FinishReason.STOP)
                break
        self.recorder.show(pieces)
        self._observer.tokens(self.index, event.times_ns[: self.num_output_tokens - num_before])
        return self._delta(pieces, logprobs)

    def _end(self, end: StreamEnd) -> list[GenerationEvent]:
        self.finished = True
        reason = FinishReason.STOP if self._stopped else end.reason
        self._observer.ended(self.index, reason, end.stats)
        if end.overflowed and not self._stopped:
            raise SlowReaderError("The stream was read too slowly, so the request was ended.")
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
        pieces: list[Piece] = []
        if not self._stopped:
            text = self._match(self._detokenizer.flush())
            if self._matcher is not None and not self._stopped:
                text += self._matcher.flush()
            reason = FinishReason.STOP if self._stopped else reason
            pieces += self._read(text)
        if not self._is_cut:
            pieces += self._note(self._parser.finish())
        if self._refused:
            reason = FinishReason.STOP
        self.recorder.show(pieces)
        if self._stop_string is None:
            self.recorder.finish()
        finished = ChoiceFinished(
            self.index,
            reason,
            self.num_output_tokens,
            len(self.called),
            self._stop_string,
            at_window=reason is FinishReason.LENGTH and self._options.limit_is_window,
        )
        unsent = [] if self._refused else self._unsent
        self.ended_by_itself = reason is FinishReason.STOP and self._stop_string is None
        return [*self._delta(pieces, unsent), finished]

    def _match(self, text: str) -> str:
        """What of `text` may be shown by now. Stop strings count only once `min_tokens` are there."""
        if self._matcher is None or not text or self.num_output_tokens <= self._options.sampling.min_tokens:
            return text
        safe, self._stop_string = self._matcher.push(text)
        self._stopped = self._stop_string is not None
        return safe

    def _read(self, text: str) -> Sequence[Piece]:
        return self._note(self._parser.push(text)) if text else ()

    def _note(self, pieces: Sequence[Piece]) -> Sequence[Piece]:
        for position, piece in enumerate(pieces, start=1):
            self._is_reasoning = isinstance(piece, ReasoningPiece)
            self._has_text |= isinstance(piece, TextPiece)
            if isinstance(piece, ToolCallStarted) and (instead := self._refusal(piece.name)) is not None:
                self._stopped = self._is_cut = self._refused = True
                self.recorder.hide()
                return [*pieces[: position - 1], TextPiece(("\n\n" if self._has_text else "") + instead)]
            if isinstance(piece, ToolCallFinished) and piece.complete:
                self.called.append(piece.name)
                if self._options.one_call:
                    self._stopped = self._is_cut = True
                    if position < len(pieces):
                        self.recorder.hide()
                    return pieces[:position]
        return pieces

    def _refusal(self, tool_name: str) -> str | None:
        refuse_call = self._options.refuse_call
        return None if refuse_call is None else refuse_call(tool_name)

    def _delta(self, pieces: Sequence[Piece], logprobs: list[TokenLogprob]) -> list[GenerationEvent]:
        if not pieces and not logprobs:
            return []
        return [Delta(self.index, merge(pieces), tuple(logprobs), self.num_output_tokens)]

    def _describe(self, token_id: int, logprob: float, top: tuple[tuple[int, float], ...]) -> TokenLogprob:
        data = self._tokenizer.token_bytes(token_id)
        alternatives = tuple(self._describe(other, value, ()) for other, value in top)
        return TokenLogprob(data.decode("utf-8", "replace"), data, logprob, alternatives)
