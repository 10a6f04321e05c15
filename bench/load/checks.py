"""Is the run what it claims to be? Each check stands for an error that has invalidated published measurements.

See the list at the end of OneKV's account of its own retracted runs: tokens collected and stamped together, the end of
sequence not ignored, a cold prompt that was in the cache, a window divided among parallel sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

import psutil

from agentserve.sim.metrics import TurnRecord, percentile
from agentserve.sim.programs import Workload
from bench.load.driver import LoadRun
from bench.load.prompts import planned_prompt_tokens

_CACHED_SLACK_TOKENS = 64
"""A chat template's own words may be in the cache."""
_LAG_LIMIT_NS = 20_000_000
_STOLEN_LIMIT = 0.03
_NUM_DISJOINT = 8
"""Fields of `psutil.cpu_times` on Linux up to `steal`; those behind it are parts of others."""


def find_doubts(run: LoadRun, workload: Workload) -> list[str]:
    """Sentences about what makes the numbers doubtful; none for a clean run."""
    doubts = [f"the run was aborted: {run.aborted}"] if run.aborted else []
    good = [record for record in run.records if record.error is None]
    num_errors = len(run.records) - len(good)
    if num_errors:
        first = next(record for record in run.records if record.error is not None)
        doubts.append(f"{num_errors} of {len(run.records)} calls failed; the first: {first.error}")
    for doubt in (_stamped_together(good), _wrong_lengths(good, workload), _cached_cold(good, workload)):
        doubts.extend(doubt)
    if run.num_inexact:
        doubts.append(f"{run.num_inexact} calls came without token counts for each chunk; a chunk counts as a token")
    if run.client_lag_ns:
        lag_ns = percentile(run.client_lag_ns, 0.99)
        if lag_ns > _LAG_LIMIT_NS:
            doubts.append(f"the client itself woke up {lag_ns / 1e6:.0f} ms late (p99): it lacked processor time")
    if any(r.role == "attacker" for r in good):
        doubts.extend(_uncovered(good))
    return doubts


class StolenTime:
    """Processor time of this machine that its hypervisor gives to others, from now on."""

    def __init__(self) -> None:
        self._before = psutil.cpu_times()

    def share(self) -> float | None:
        """Of all processor time since then; None where the system does not say."""
        before, now = self._before, psutil.cpu_times()
        if not hasattr(now, "steal"):
            return None
        total_s = sum(now[:_NUM_DISJOINT]) - sum(before[:_NUM_DISJOINT])
        return round((now.steal - before.steal) / total_s, 4) if total_s > 0.0 else 0.0


def find_theft(stolen_share: float | None) -> list[str]:
    """A sentence if others had much of the machine; its numbers are worth little then."""
    if stolen_share is None or stolen_share <= _STOLEN_LIMIT:
        return []
    return [f"the hypervisor gave {stolen_share:.0%} of the processor time to others"]


def _stamped_together(good: Sequence[TurnRecord]) -> list[str]:
    num_pairs = sum(max(0, len(r.token_ns) - 1) for r in good)
    num_gaps = sum(len(r.gaps_ns) for r in good)
    if num_pairs and num_gaps < 0.9 * num_pairs:
        return [f"{1 - num_gaps / num_pairs:.0%} of the tokens came together with the one before; gaps are of chunks"]
    return []


def _wrong_lengths(good: Sequence[TurnRecord], workload: Workload) -> list[str]:
    planned = planned_prompt_tokens(workload)
    ratios = [r.num_prompt_tokens / planned[r.program_id, r.turn_index] for r in good if r.num_prompt_tokens]
    if ratios and not 0.9 <= (median := percentile(ratios, 0.5)) <= 1.1:
        return [f"prompts have {median:.2f} times the tokens that the workload says (median)"]
    return []


def _cached_cold(good: Sequence[TurnRecord], workload: Workload) -> list[str]:
    prefixes = {program.program_id: program.prefix_tokens for program in workload.programs}
    warm = [
        r
        for r in good
        if r.is_cold and (r.num_cached_tokens or 0) > prefixes[r.program_id] * 1.1 + _CACHED_SLACK_TOKENS
    ]
    if warm:
        return [f"{len(warm)} first prompts were in the server's cache already: use another --seed or restart it"]
    return []


def _uncovered(good: Sequence[TurnRecord]) -> list[str]:
    attackers = [r for r in good if r.role == "attacker"]
    end_ns = max(r.finished_ns for r in attackers)
    if any(r.role == "victim" and r.token_ns and r.token_ns[-1] < end_ns for r in good):
        return ["the victim's stream ended before the attack did; its gaps cover a part of the attack only"]
    return []
