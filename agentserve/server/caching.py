"""What the server does so that prefixes are found again, in one place: kept answers, frozen prompts, explanations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from agentserve.server.ledger import SessionLedger, Trace
from agentserve.server.metrics import ServerMetrics
from agentserve.server.observe import RequestObserver
from agentserve.server.prompt import TokenizedPrompt
from agentserve.server.recorder import AnswerRecorder
from agentserve.server.stabilize import Stabilizer
from agentserve.server.token_history import DEFAULT_CAPACITY_BYTES, TokenHistory
from agentserve.server.types import GenerateRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheOptions:
    """What is done so that prefixes are found again, and what must be known to explain why they are not."""

    block_size: int = 16
    """Tokens in a KV block: only whole blocks are found again."""
    has_prefix_cache: bool = True
    token_history_bytes: int = DEFAULT_CAPACITY_BYTES
    """For the token ids of answers; 0: none are kept."""
    speculates: bool = False
    """Whether the engine wants to know what next prompts begin with."""
    stabilize: tuple[str, ...] = ()
    """Regular expressions: see `Stabilizer`."""


class Caching:
    """The parts of one server. Used on the event loop, but for `history` and `stabilizer`."""

    def __init__(self, options: CacheOptions, metrics: ServerMetrics, decode: Callable[[Sequence[int]], str]) -> None:
        """`decode` gives the text of token ids, special ones included. Raises ConfigError for a bad expression."""
        self.history = TokenHistory(options.token_history_bytes) if options.token_history_bytes else None
        self.stabilizer = Stabilizer(options.stabilize) if options.stabilize else None
        self.ledger = SessionLedger(
            metrics,
            decode,
            block_size=options.block_size,
            has_cache=options.has_prefix_cache,
            history=self.history,
        )
        if self.history is not None:
            metrics.watch_history(self.history)

    def begin(self, prompt: TokenizedPrompt, request: GenerateRequest, request_id: str) -> Trace:
        """A request with this prompt, its first one, is about to be submitted. The trace must be closed."""
        if self.history is not None and prompt.conversation is not None:
            self.history.count_reused(prompt.conversation.num_reused_turns)
        return self.ledger.open(prompt, request.identity, request_id, adapter=request.adapter)

    def end(self, trace: Trace, recorder: AnswerRecorder, observer: RequestObserver) -> None:
        """Books the first choice of the first prompt: the others find what that one has computed."""
        stats = observer.stats_of(0)
        trace.close(
            None if stats is None else stats.num_cached_tokens,
            recorder.num_tokens,
            recorder.computed_ids,
            recorder.digest,
        )
        observer.miss_reason = None if trace.reason is None else trace.reason.value
