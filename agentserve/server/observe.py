"""What one HTTP generation looked like: times and counts for the metrics and for the one line in the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from agentserve.core.events import RequestStats
from agentserve.core.request import FinishReason
from agentserve.server.metrics import ServerMetrics

logger = logging.getLogger("agentserve.request")


@dataclass(slots=True)
class _Choice:
    num_tokens: int = 0
    last_token_ns: int | None = None
    stats: RequestStats | None = None
    outcome: str = "cancelled"


@dataclass(slots=True)
class RequestObserver:
    """Collects while a generation runs; `close` writes. Used on the event loop only.

    Tokens have the times at which the engine had them, so a client that reads slowly does not change a metric. The
    first token counts from the arrival of the HTTP request (vLLM's definition), a gap is between two tokens.
    """

    metrics: ServerMetrics
    request_id: str
    session_id: str | None
    arrival_ns: int
    clock_ns: Callable[[], int] = time.monotonic_ns
    num_prompt_tokens: int = 0
    first_token_ns: int | None = None
    worst_gap_ns: int = 0
    miss_reason: str | None = None
    """Why not more of the prompt was found in the cache, once that is known."""
    _choices: dict[int, _Choice] = field(default_factory=dict)

    def elapsed_ns(self) -> int:
        """Since the arrival of the HTTP request."""
        return self.clock_ns() - self.arrival_ns

    def tokens(self, choice: int, times_ns: Sequence[int]) -> None:
        """New tokens of a choice; `times_ns` says when the engine had each of them."""
        seen = self._choices.setdefault(choice, _Choice())
        for time_ns in times_ns:
            if seen.last_token_ns is None:
                self.metrics.time_to_first_token.observe((time_ns - self.arrival_ns) / 1e9)
            else:
                gap_ns = time_ns - seen.last_token_ns
                self.worst_gap_ns = max(self.worst_gap_ns, gap_ns)
                self.metrics.inter_token_latency.observe(gap_ns / 1e9)
            seen.last_token_ns = time_ns
        if self.first_token_ns is None and times_ns:
            self.first_token_ns = times_ns[0]
        seen.num_tokens += len(times_ns)

    def ended(self, choice: int, reason: FinishReason, stats: RequestStats) -> None:
        """A choice has had its terminal event."""
        seen = self._choices.setdefault(choice, _Choice())
        seen.stats = stats
        seen.outcome = reason.value

    def stats_of(self, choice: int) -> RequestStats | None:
        """Of a choice that was finished; None for one that was left, cancelled or failed."""
        seen = self._choices.get(choice)
        return seen.stats if seen is not None and seen.outcome in ("stop", "length") else None

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
            "id=%s session=%s class=%s prompt=%d cached=%d new=%d hit=%s miss=%s "
            "queue_ms=%s ttft_ms=%s max_gap_ms=%s output=%d finish=%s",
            self.request_id,
            self.session_id or "-",
            (first.first_work_class if first else "") or "-",
            self.num_prompt_tokens,
            num_cached,
            self.num_prompt_tokens - num_cached,
            f"{100 * num_cached / first.num_prompt_tokens:.0f}%" if first and first.num_prompt_tokens else "-",
            self.miss_reason or "-",
            _ms(queue_ns),
            _ms(None if self.first_token_ns is None else self.first_token_ns - self.arrival_ns),
            _ms(self.worst_gap_ns),
            sum(choice.num_tokens for choice in choices),
            ",".join(dict.fromkeys(choice.outcome for choice in choices)),
        )


def _ms(duration_ns: int | None) -> str:
    return "-" if duration_ns is None else f"{duration_ns / 1e6:.1f}"
