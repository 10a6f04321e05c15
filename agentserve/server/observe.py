"""What one HTTP generation looked like: times and counts for the metrics and for the one line in the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from agentserve.core.events import RequestStats
from agentserve.core.request import FinishReason
from agentserve.server.metrics import ServerMetrics

logger = logging.getLogger("agentserve.request")


@dataclass(slots=True)
class _Choice:
    num_tokens: int = 0
    last_tokens_ns: int | None = None
    stats: RequestStats | None = None
    outcome: str = "cancelled"


@dataclass(slots=True)
class RequestObserver:
    """Collects while a generation runs; `close` writes. Used on the event loop only.

    Times are taken where tokens reach the server's stream, so they hold the hop from the engine thread and the
    waiting for a client that reads slowly. Definitions follow vLLM: the first token counts from the arrival of the
    HTTP request, and a gap between two arrivals is shared by the tokens of the second.
    """

    metrics: ServerMetrics
    request_id: str
    session_id: str | None
    arrival_ns: int
    clock_ns: Callable[[], int] = time.monotonic_ns
    num_prompt_tokens: int = 0
    first_token_ns: int | None = None
    worst_gap_ns: int = 0
    _choices: dict[int, _Choice] = field(default_factory=dict)

    def tokens(self, choice: int, num_tokens: int) -> None:
        """`num_tokens` new tokens of a choice have arrived."""
        now_ns = self.clock_ns()
        seen = self._choices.setdefault(choice, _Choice())
        if self.first_token_ns is None:
            self.first_token_ns = now_ns
        if seen.last_tokens_ns is None:
            self.metrics.time_to_first_token.observe((now_ns - self.arrival_ns) / 1e9)
        else:
            gap_ns = now_ns - seen.last_tokens_ns
            self.worst_gap_ns = max(self.worst_gap_ns, gap_ns)
            for _ in range(num_tokens):
                self.metrics.inter_token_latency.observe(gap_ns / num_tokens / 1e9)
        seen.last_tokens_ns = now_ns
        seen.num_tokens += num_tokens

    def ended(self, choice: int, reason: FinishReason, stats: RequestStats) -> None:
        """A choice has had its terminal event."""
        seen = self._choices.setdefault(choice, _Choice())
        seen.stats = stats
        seen.outcome = reason.value

    def close(self, num_choices: int) -> None:
        """Counts every choice and writes the line. Choices that were left early count as cancelled."""
        now_ns = self.clock_ns()
        choices = [self._choices.get(index, _Choice()) for index in range(num_choices)]
        for choice in choices:
            self.metrics.count_request(
                choice.outcome, choice.num_tokens, (now_ns - self.arrival_ns) / 1e9, choice.stats
            )
        self._log(choices)

    def _log(self, choices: list[_Choice]) -> None:
        first = choices[0].stats
        num_cached = first.num_cached_tokens if first else 0
        queue_ns = None
        if first is not None and first.first_scheduled_ns is not None:
            queue_ns = first.first_scheduled_ns - first.arrival_ns
        logger.info(
            "id=%s session=%s class=%s prompt=%d cached=%d new=%d "
            "queue_ms=%s ttft_ms=%s max_gap_ms=%s output=%d finish=%s",
            self.request_id,
            self.session_id or "-",
            (first.first_work_class if first else "") or "-",
            self.num_prompt_tokens,
            num_cached,
            self.num_prompt_tokens - num_cached,
            _ms(queue_ns),
            _ms(None if self.first_token_ns is None else self.first_token_ns - self.arrival_ns),
            _ms(self.worst_gap_ns),
            sum(choice.num_tokens for choice in choices),
            ",".join(dict.fromkeys(choice.outcome for choice in choices)),
        )


def _ms(duration_ns: int | None) -> str:
    return "-" if duration_ns is None else f"{duration_ns / 1e6:.1f}"
