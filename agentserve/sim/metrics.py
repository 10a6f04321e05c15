"""What is measured of a run, live or simulated. Definitions follow vLLM's benchmark where it has them.

Of one call, with n output tokens:

    TTFT  first token - sent                      TPOT  (last token - first token) / (n - 1); none for n = 1
    E2E   finished - sent                         ITL   gaps between arrivals; tokens that come together are one arrival
    worst stall  the longest gap between arrivals; none with a single arrival

Of a run: output tokens a second over the makespan (first call sent to last answer complete), and goodput, the calls a
second that met both targets. Of a program: job completion time, and whether its session met the targets of AgentServe
(section 1.4 of its evaluation): cold TTFT within one, the 95th percentile of its gaps between tokens within the other.

A percentile interpolates linearly between the two nearest ranks: of n sorted values that at position q * (n - 1).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentserve.errors import WorkloadError


@dataclass(frozen=True, slots=True)
class TurnRecord:
    """One model call as its client saw it. Times are nanoseconds from the start of the run."""

    program_id: str
    turn_index: int
    role: str
    num_turns: int
    """Turns of its program: all but the last one end with a tool call."""
    num_prompt_tokens: int
    num_cached_tokens: int | None
    """None where the server does not say."""
    num_output_tokens: int
    sent_ns: int
    token_ns: tuple[int, ...]
    """When each token arrived. A live server may send several tokens in one chunk: they have one time."""
    finished_ns: int
    """When the answer was complete."""
    error: str | None = None
    """Why the call failed; then the times may be incomplete and it counts in no metric but the number of errors."""

    @property
    def is_cold(self) -> bool:
        """The first turn of a program: nothing but a shared prefix can be cached."""
        return self.turn_index == 0

    @property
    def is_last(self) -> bool:
        """The last turn of its program: an answer; all others end with a tool call."""
        return self.turn_index == self.num_turns - 1

    @property
    def ttft_ns(self) -> int | None:
        """Time to the first token; None if none arrived."""
        return self.token_ns[0] - self.sent_ns if self.token_ns else None

    @property
    def tpot_ns(self) -> float | None:
        """Time per output token after the first; None for fewer than two tokens."""
        if self.num_output_tokens < 2 or not self.token_ns:
            return None
        return (self.token_ns[-1] - self.token_ns[0]) / (self.num_output_tokens - 1)

    @property
    def e2e_ns(self) -> int:
        return self.finished_ns - self.sent_ns

    @property
    def gaps_ns(self) -> tuple[int, ...]:
        """Times between arrivals; tokens of one arrival have no gap between them."""
        pairs = zip(self.token_ns, self.token_ns[1:], strict=False)
        return tuple(after - before for before, after in pairs if after > before)

    def to_json(self) -> dict[str, Any]:
        """All fields, as JSON takes them; `from_json` is the inverse."""
        return {**dataclasses.asdict(self), "token_ns": list(self.token_ns)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TurnRecord:
        """Raises WorkloadError if fields are missing or unknown."""
        try:
            return cls(**{**value, "token_ns": tuple(value["token_ns"])})
        except (TypeError, KeyError) as error:
            raise WorkloadError(f"not the record of a turn: {error}") from None


@dataclass(frozen=True, slots=True)
class Slo:
    """Targets. Both must be met. Raises WorkloadError unless they are positive."""

    ttft_ns: float
    tpot_ns: float

    def __post_init__(self) -> None:
        if not (self.ttft_ns > 0 and self.tpot_ns > 0):
            raise WorkloadError(f"targets must be positive, not {self.ttft_ns} and {self.tpot_ns} ns")


@dataclass(frozen=True, slots=True)
class Distribution:
    """A metric over many calls, in the unit of its values."""

    num_values: int
    mean: float
    p50: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Distribution | None:
        """None of no values."""
        ordered = sorted(values)
        if not ordered:
            return None
        mean = math.fsum(ordered) / len(ordered)
        p50, p95, p99 = (_percentile(ordered, q) for q in (0.5, 0.95, 0.99))
        return cls(len(ordered), mean, p50, p95, p99, float(ordered[-1]))


@dataclass(frozen=True, slots=True)
class Latencies:
    """Latencies of a group of calls, in nanoseconds; None where no call has such a value."""

    num_turns: int
    """Calls that succeeded."""
    num_errors: int
    ttft_ns: Distribution | None
    tpot_ns: Distribution | None
    itl_ns: Distribution | None
    """Gaps between arrivals, of all calls together."""
    e2e_ns: Distribution | None
    worst_stall_ns: Distribution | None
    """The longest gap of each call."""


@dataclass(frozen=True, slots=True)
class GapsUnderAttack:
    """What the victims' streams see from the first attacker's call to the last attacker's answer."""

    itl_ns: Distribution | None
    """Gaps that overlap the attack. Gaps before and after it would only dilute the percentiles."""
    worst_stall_ns: int | None
    covered: float
    """Share of the attack during which some victim was streaming; below 1 the victim's stream was too short."""


@dataclass(frozen=True, slots=True)
class Summary:
    """Everything that is reported of a run. Times are nanoseconds, shares lie between 0 and 1."""

    all: Latencies
    cold: Latencies
    """First turns of programs."""
    resumed: Latencies
    """Later turns."""
    by_role: Mapping[str, Latencies]
    time_to_tool_call_ns: Distribution | None
    """E2E of the turns that end with a tool call: all but the last one of each program."""
    job_completion_ns: Distribution | None
    """From a program's first call to its last answer, tools included; only programs without an error."""
    makespan_ns: int
    num_prompt_tokens: int
    num_cached_tokens: int | None
    """None if the server does not say for some call."""
    num_output_tokens: int
    output_tokens_per_s: float
    turns_per_s: float
    slo: Slo | None
    slo_attainment: float | None
    """Share of programs whose session met `slo`; None without one."""
    goodput_turns_per_s: float | None
    """Calls a second that met `slo`; None without one."""
    under_attack: GapsUnderAttack | None
    """None unless there are calls of the roles `victim` and `attacker`."""

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and numbers."""
        return dataclasses.asdict(self)


def percentile(values: Iterable[float], q: float) -> float:
    """The value below which the share `q` (0 to 1) lies, with linear interpolation. ValueError for no values."""
    ordered = sorted(values)
    if not ordered or not 0.0 <= q <= 1.0:
        raise ValueError(f"no percentile {q} of {len(ordered)} values")
    return _percentile(ordered, q)


def _percentile(ordered: Sequence[float], q: float) -> float:
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (ordered[high] - ordered[low]) * (position - low))


def isolated_slo(records: Sequence[TurnRecord], factor: float = 2.0) -> Slo:
    """Targets from a run with one agent: `factor` times its median cold TTFT and its 95th percentile of gaps.

    AgentServe takes a multiple of the isolated values and does not say which; its reproduction (OneKV) takes 2.
    Raises WorkloadError if the run has no cold turn with at least two tokens.
    """
    summary = summarize(records)
    if summary.cold.ttft_ns is None or summary.all.itl_ns is None:
        raise WorkloadError("the isolated run has no first turn that succeeded, so there are no targets")
    return Slo(factor * summary.cold.ttft_ns.p50, factor * summary.all.itl_ns.p95)


def summarize(records: Sequence[TurnRecord], *, slo: Slo | None = None) -> Summary:
    """Reduces the records of a run to its metrics. Calls with an error count as errors and in nothing else.

    Without a call that succeeded all rates are 0. A session with an error has not met the targets.
    """
    good = [record for record in records if record.error is None]
    programs: dict[str, list[TurnRecord]] = {}
    for record in records:
        programs.setdefault(record.program_id, []).append(record)
    makespan_ns = max(r.finished_ns for r in good) - min(r.sent_ns for r in good) if good else 0
    num_cached = [r.num_cached_tokens for r in good]
    num_output_tokens = sum(r.num_output_tokens for r in good)
    return Summary(
        all=_latencies(records),
        cold=_latencies([r for r in records if r.is_cold]),
        resumed=_latencies([r for r in records if not r.is_cold]),
        by_role={
            role: _latencies([r for r in records if r.role == role]) for role in sorted({r.role for r in records})
        },
        time_to_tool_call_ns=Distribution.of(r.e2e_ns for r in good if not r.is_last),
        job_completion_ns=Distribution.of(
            max(r.finished_ns for r in turns) - min(r.sent_ns for r in turns)
            for turns in programs.values()
            if all(r.error is None for r in turns)
        ),
        makespan_ns=makespan_ns,
        num_prompt_tokens=sum(r.num_prompt_tokens for r in good),
        num_cached_tokens=None if None in num_cached else sum(n for n in num_cached if n is not None),
        num_output_tokens=num_output_tokens,
        output_tokens_per_s=_per_second(num_output_tokens, makespan_ns),
        turns_per_s=_per_second(len(good), makespan_ns),
        slo=slo,
        slo_attainment=_share(programs.values(), lambda turns: _session_meets(turns, slo)) if slo else None,
        goodput_turns_per_s=_per_second(sum(_turn_meets(r, slo) for r in good), makespan_ns) if slo else None,
        under_attack=_gaps_under_attack(good),
    )


def _latencies(records: Sequence[TurnRecord]) -> Latencies:
    good = [record for record in records if record.error is None]
    gaps = [record.gaps_ns for record in good]
    return Latencies(
        num_turns=len(good),
        num_errors=len(records) - len(good),
        ttft_ns=Distribution.of(r.ttft_ns for r in good if r.ttft_ns is not None),
        tpot_ns=Distribution.of(r.tpot_ns for r in good if r.tpot_ns is not None),
        itl_ns=Distribution.of(gap for of_turn in gaps for gap in of_turn),
        e2e_ns=Distribution.of(r.e2e_ns for r in good),
        worst_stall_ns=Distribution.of(max(of_turn) for of_turn in gaps if of_turn),
    )


def _per_second(amount: int, duration_ns: int) -> float:
    return amount * 1e9 / duration_ns if duration_ns else 0.0


def _share(items: Iterable[Sequence[TurnRecord]], holds: Callable[[Sequence[TurnRecord]], bool]) -> float | None:
    found = [holds(item) for item in items]
    return sum(found) / len(found) if found else None


def _turn_meets(record: TurnRecord, slo: Slo) -> bool:
    ttft_ns, tpot_ns = record.ttft_ns, record.tpot_ns
    return ttft_ns is not None and ttft_ns <= slo.ttft_ns and (tpot_ns is None or tpot_ns <= slo.tpot_ns)


def _session_meets(turns: Sequence[TurnRecord], slo: Slo) -> bool:
    if any(record.error is not None or record.ttft_ns is None for record in turns):
        return False
    if any(record.is_cold and record.token_ns[0] - record.sent_ns > slo.ttft_ns for record in turns):
        return False
    gaps = [gap for record in turns for gap in record.gaps_ns]
    return not gaps or percentile(gaps, 0.95) <= slo.tpot_ns


def _gaps_under_attack(records: Sequence[TurnRecord]) -> GapsUnderAttack | None:
    attackers = [r for r in records if r.role == "attacker"]
    victims = [r for r in records if r.role == "victim" and r.token_ns]
    if not attackers or not victims:
        return None
    start_ns, end_ns = min(r.sent_ns for r in attackers), max(r.finished_ns for r in attackers)
    gaps = [
        after - before
        for victim in victims
        for before, after in zip(victim.token_ns, victim.token_ns[1:], strict=False)
        if after > before and before < end_ns and after > start_ns
    ]
    streams = [(max(start_ns, v.token_ns[0]), min(end_ns, v.token_ns[-1])) for v in victims]
    covered_ns, reached_ns = 0, start_ns
    for first_ns, last_ns in sorted(streams):
        covered_ns += max(0, last_ns - max(first_ns, reached_ns))
        reached_ns = max(reached_ns, last_ns)
    covered = covered_ns / (end_ns - start_ns) if end_ns > start_ns else 1.0
    return GapsUnderAttack(Distribution.of(gaps), max(gaps, default=None), covered)
