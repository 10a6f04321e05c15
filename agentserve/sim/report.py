"""What is reported of simulations: results as JSON takes them, and tables.

The result of one simulation:

    digest, parameters, conditions, workload, notes      what was simulated
    summary          `agentserve.sim.metrics.Summary` of what the clients saw
    recorded         the same of the recording that the workload was taken from, or null
    mechanism        what the policies did, and why the run must not be compared, if so
    num_preemptions, routing, instances                  what the engines and the router did
    calls            columns over all calls: program_id, turn, instance, sent_ns, ..., for plots and for a closer look
    residency        for each instance [ns, blocks held, blocks cached, blocks in each lower tier] over time
    lanes            the first batches: [instance, lane, started_ns, finished_ns, decodes, cold, resume tokens]

There are no time stamps and nothing of the machine in it: the same inputs give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from agentserve.sim.cells import flag
from agentserve.sim.cluster import RoutingCounts
from agentserve.sim.mechanism_check import mechanism_check
from agentserve.sim.metrics import TurnRecord, summarize
from agentserve.sim.orchestrator import SimulatedRun
from agentserve.sim.sweep import Plan, Result

FORMAT_VERSION = 1
_BULKY = ("calls", "residency", "lanes")
"""Left out of the collected results; they are in the file of each cell."""


def result_of(plan: Plan, run: SimulatedRun, counts: RoutingCounts) -> dict[str, Any]:
    """Reduces a simulation to its result; see above."""
    programs = plan.workload.programs
    return {
        "format_version": FORMAT_VERSION,
        "digest": plan.digest,
        "parameters": plan.cell.to_json(),
        "conditions": plan.conditions,
        "workload": {
            "title": plan.title,
            "description": plan.workload.description,
            "num_programs": len(programs),
            "num_turns": sum(len(program.turns) for program in programs),
            "num_agents": plan.workload.num_agents,
        },
        "notes": list(plan.notes),
        "summary": summarize(run.records).to_json(),
        "recorded": None if plan.recorded is None else summarize(plan.recorded).to_json(),
        "num_preemptions": sum(stats.num_preemptions for stats in run.stats),
        "mechanism": mechanism_check(plan.header.config, run.stats).to_json(),
        "routing": counts.to_json(),
        "instances": [_instance(run, index) for index in range(len(run.stats))],
        "calls": _calls(run),
        "residency": [[list(sample) for sample in residency.samples] for residency in run.residency],
        "lanes": [
            [
                span.instance,
                span.lane.value,
                span.started_ns,
                span.finished_ns,
                span.num_decodes,
                span.num_cold_tokens,
                span.num_resume_tokens,
            ]
            for span in run.batches
        ],
    }


def without_series(result: Result) -> dict[str, Any]:
    """The result without what is there for plots only."""
    return {name: value for name, value in result.items() if name not in _BULKY}


def _instance(run: SimulatedRun, index: int) -> dict[str, Any]:
    stats = run.stats[index]
    return {
        "num_calls": run.instances.count(index),
        "num_prefix_query_tokens": stats.num_prefix_query_tokens,
        "num_prefix_hit_tokens": stats.num_prefix_hit_tokens,
        "num_generated_tokens": stats.num_generated_tokens,
        "num_preemptions": stats.num_preemptions,
        "num_steps": stats.num_steps,
        "kv": run.residency[index].to_json(),
    }


def _calls(run: SimulatedRun) -> dict[str, list[Any]]:
    records = run.records
    return {
        "program_id": [record.program_id for record in records],
        "turn": [record.turn_index for record in records],
        "instance": list(run.instances),
        "sent_ns": [record.sent_ns for record in records],
        "first_token_ns": [_or_none(record, 0) for record in records],
        "last_token_ns": [_or_none(record, -1) for record in records],
        "finished_ns": [record.finished_ns for record in records],
        "num_prompt_tokens": [record.num_prompt_tokens for record in records],
        "num_cached_tokens": [record.num_cached_tokens for record in records],
        "num_output_tokens": [record.num_output_tokens for record in records],
        "error": [record.error for record in records],
    }


def _or_none(record: TurnRecord, index: int) -> int | None:
    return record.token_ns[index] if record.token_ns else None


# ---- tables ----


@dataclass(frozen=True, slots=True)
class Column:
    """A number of a result."""

    key: str
    title: str
    unit: str
    scale: float
    """From the unit of the summary to that of the column."""
    path: tuple[str, ...]
    """Where it is in the summary."""
    digits: int = 1


COLUMNS = (
    Column("ttft_p50_ms", "TTFT p50", "ms", 1e-6, ("all", "ttft_ns", "p50")),
    Column("ttft_p95_ms", "TTFT p95", "ms", 1e-6, ("all", "ttft_ns", "p95")),
    Column("tpot_mean_ms", "TPOT mean", "ms", 1e-6, ("all", "tpot_ns", "mean"), 2),
    Column("gap_p95_ms", "gap p95", "ms", 1e-6, ("all", "itl_ns", "p95"), 2),
    Column("jct_mean_s", "JCT mean", "s", 1e-9, ("job_completion_ns", "mean"), 2),
    Column("jct_p95_s", "JCT p95", "s", 1e-9, ("job_completion_ns", "p95"), 2),
    Column("tokens_per_s", "output", "tok/s", 1.0, ("output_tokens_per_s",)),
)
"""Latencies and throughput, of simulations and of recordings alike."""


def number(summary: Mapping[str, Any], column: Column) -> float | None:
    """The column's value of a summary, in its unit; None if the run has none."""
    value: Any = summary
    for name in column.path:
        if value is None:
            return None
        value = value[name]
    return None if value is None else value * column.scale


def hit_rate(summary: Mapping[str, Any]) -> float | None:
    """Share of the prompt tokens that were in the cache, 0 to 1; None if there are none or that is not known."""
    cached, prompt = summary["num_cached_tokens"], summary["num_prompt_tokens"]
    return cached / prompt if prompt and cached is not None else None


def kv_use(result: Result) -> tuple[float, float]:
    """Share of the KV blocks that requests held: mean over time and instances, and the peak of any instance."""
    kv = [instance["kv"] for instance in result["instances"]]
    return sum(each["mean_held"] for each in kv) / len(kv), max(each["peak_held"] for each in kv)


def table(results: Sequence[Result], names: Sequence[str]) -> Table:
    """A row for each simulation; `names` are the options in which they differ."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for name in names or ("workload",):
        made.add_column(flag(name)[2:], overflow="fold")
    for column in COLUMNS:
        made.add_column(f"{column.title}\n{column.unit}", justify="right")
    for title in ("hits\n%", "preempt.", "KV mean\n%", "KV peak\n%", "errors"):
        made.add_column(title, justify="right")
    for result in results:
        made.add_row(*row(result, names))
    return made


_SEATS = frozenset({"policy", "order", "protect_anchors", "admission", "speculate"})
"""Options that name a policy, or switch one on."""


def is_comparable(result: Result, names: Sequence[str]) -> bool:
    """Whether a result may stand beside others that differ in `names`: not if a policy is compared that never fired."""
    return result["mechanism"]["why_not"] is None or _SEATS.isdisjoint(names)


def refusals(results: Sequence[Result], names: Sequence[str]) -> list[str]:
    """Why results are not compared, or say nothing about their policy: a sentence each."""
    lines = []
    for result in results:
        label = ", ".join(f"{flag(name)[2:]} {result['parameters'][name]}" for name in names)
        if result["mechanism"]["why_not"] is not None:
            what = "says nothing about its policy" if is_comparable(result, names) else "not compared"
            lines.append(f"{label or result['workload']['title']}: {what}, {result['mechanism']['why_not']}")
    return lines


def row(result: Result, names: Sequence[str]) -> list[str]:
    """The cells of one line of the table; without numbers if they must not be compared."""
    summary = result["summary"]
    shown = [result["parameters"][name] for name in names] or [result["workload"]["title"]]
    mean, peak = kv_use(result)
    labels = ["-" if value is None else str(value) for value in shown]
    if not is_comparable(result, names):
        return [*labels, *["-"] * (len(COLUMNS) + 5)]
    return [
        *labels,
        *(_text(number(summary, column), column.digits) for column in COLUMNS),
        _text(hit_rate(summary), 1, 100.0),
        str(result["num_preemptions"]),
        _text(mean, 1, 100.0),
        _text(peak, 1, 100.0),
        str(summary["all"]["num_errors"]),
    ]


def comparison(result: Result) -> Table:
    """A recording beside its prediction: both, and the signed error of the prediction."""
    recorded, predicted = result["recorded"], result["summary"]
    made = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("", "recorded", "predicted", "error"):
        made.add_column(title, justify="left" if not title else "right")
    for column in COLUMNS:
        was, now = number(recorded, column), number(predicted, column)
        error = f"{now / was - 1.0:+.1%}" if was and now is not None else "-"
        made.add_row(f"{column.title}, {column.unit}", _text(was, column.digits), _text(now, column.digits), error)
    was, now = hit_rate(recorded), hit_rate(predicted)
    points = "-" if was is None or now is None else f"{100.0 * (now - was):+.1f} points"
    made.add_row("prefix hits, %", _text(was, 1, 100.0), _text(now, 1, 100.0), points)
    return made


def _text(value: float | None, digits: int, scale: float = 1.0) -> str:
    return "-" if value is None else f"{value * scale:,.{digits}f}"
