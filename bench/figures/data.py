"""From runs to the numbers in a figure: plain dictionaries, written beside each picture.

Every figure is `{"figure", "source", "conditions", "panels": [...]}`; the panels are described with each function.
Times are milliseconds or, on time axes, seconds: what the axes show.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from agentserve.sim.metrics import Distribution, Slo, Summary, isolated_slo, summarize
from bench.figures.runs import Run, Source
from bench.figures.variants import ABLATION, COMPARED, SIMPLE, TIMELINE, TIMELINE_AGENTS, VARIANTS

Figure = dict[str, Any]

_NS_PER_MS, _NS_PER_S = 1e6, 1e9
_MARGIN_S = 0.5
"""Figure 2 shows at least this much before and after the attack; a fifth of its length if that is more."""
MEASURES = (
    ("ttft_cold_p50_ms", "cold TTFT, p50, ms"),
    ("ttft_cold_p95_ms", "cold TTFT, p95, ms"),
    ("ttft_resumed_p50_ms", "resumed TTFT, p50, ms"),
    ("tpot_p50_ms", "time between tokens, p50, ms"),
    ("tpot_p95_ms", "time between tokens, p95, ms"),
    ("worst_stall_p95_ms", "worst stall of an answer, p95, ms"),
    ("output_tokens_per_s", "output tokens/s"),
)
"""What is plotted against the number of agents, and the labels of its axes. The time between tokens is vLLM's ITL: the
paper's TPOT, whose percentiles are taken over tokens, not over answers."""
TOLERANCE = 0.10
"""A difference by this fraction is none."""
ABLATION_MEASURES = (
    ("ttft_cold_p50_ms", "cold TTFT, p50"),
    ("tpot_p95_ms", "time between tokens, p95"),
    ("output_tokens_per_s", "output tokens/s"),
)
CONTROLLER_MEASURES = (
    ABLATION_MEASURES[0],
    ("request_tpot_p95_ms", "TPOT of a request, p95"),
    *ABLATION_MEASURES[1:],
)
"""TPOT of a request is vLLM's: the time from its first to its last token over their number less one."""


def measures(run: Run, slo: Slo | None = None) -> dict[str, float | int | None]:
    """One run in numbers; None where it has none, such as resumed turns that do not exist.

    Beside victims, the cold TTFT is the attackers', and the time between tokens the victims' during the attack.
    """
    summary: Summary = summarize(run.records, slo=slo)
    gaps, cold = summary.all.itl_ns, summary.cold.ttft_ns
    if summary.under_attack is not None:
        gaps, cold = summary.under_attack.itl_ns, summary.by_role["attacker"].ttft_ns
    return {
        "num_agents": run.num_agents,
        "num_turns": summary.all.num_turns,
        "num_errors": summary.all.num_errors,
        "ttft_cold_p50_ms": _ms(cold, "p50"),
        "ttft_cold_p95_ms": _ms(cold, "p95"),
        "ttft_resumed_p50_ms": _ms(summary.resumed.ttft_ns, "p50"),
        "ttft_resumed_p95_ms": _ms(summary.resumed.ttft_ns, "p95"),
        "request_tpot_p95_ms": _ms(summary.all.tpot_ns, "p95"),
        "tpot_p50_ms": _ms(gaps, "p50"),
        "tpot_p95_ms": _ms(gaps, "p95"),
        "worst_stall_p50_ms": _ms(summary.all.worst_stall_ns, "p50"),
        "worst_stall_p95_ms": _ms(summary.all.worst_stall_ns, "p95"),
        "worst_stall_max_ms": _ms(summary.all.worst_stall_ns, "max"),
        "output_tokens_per_s": round(summary.output_tokens_per_s, 3),
        "job_completion_p50_ms": _ms(summary.job_completion_ns, "p50"),
        "slo_attainment": summary.slo_attainment,
    }


def timeline(source: Source) -> Figure | None:
    """Figure 2: gaps of one stream over time, with the cold prompts marked. None without a victim's stream.

    Shown are the variants of `TIMELINE` and other servers in their default setting.
    A panel for each run: `gaps` are pairs (second at which a token came, milliseconds since the one before it), `cold`
    triples (sent, first token, program), `quiet_ms` the median gap outside the attack.
    """
    found = {run.key: run for run in source.select(workload="victim_attacker") if run.num_agents == TIMELINE_AGENTS}
    ours = [found[key] for key in TIMELINE if key in found]
    peers = [run for run in found.values() if run.key not in VARIANTS and run.setting == "default"]
    panels = [panel for run in (*peers, *ours) if (panel := _timeline_panel(run))]
    return _figure("fig2", source, panels)


def _timeline_panel(run: Run) -> Figure | None:
    victims = [r for r in run.records if r.role == "victim" and r.error is None and len(r.token_ns) > 1]
    attacks = [r for r in run.records if r.role == "attacker" and r.error is None and r.token_ns]
    if not victims or not attacks:
        return None
    start_s = min(r.sent_ns for r in attacks) / _NS_PER_S
    end_s = max(r.token_ns[0] for r in attacks) / _NS_PER_S
    margin_s = max(_MARGIN_S, (end_s - start_s) / 5)
    tokens_ns = victims[0].token_ns
    gaps = [
        (later / _NS_PER_S, (later - earlier) / _NS_PER_MS)
        for earlier, later in itertools.pairwise(tokens_ns)
        if later > earlier
    ]
    quiet = Distribution.of(gap for at_s, gap in gaps if at_s < start_s or at_s - gap / 1e3 > end_s)
    shown = [(at_s, gap) for at_s, gap in gaps if start_s - margin_s <= at_s <= end_s + margin_s]
    during = Distribution.of(gap for at_s, gap in shown if at_s >= start_s and at_s - gap / 1e3 <= end_s)
    first_tokens = Distribution.of(r.ttft_ns for r in attacks if r.ttft_ns is not None)
    return {
        "key": run.key,
        "label": run.label,
        "gaps": [(round(at_s, 6), round(gap, 3)) for at_s, gap in shown],
        "cold": [(r.sent_ns / _NS_PER_S, r.token_ns[0] / _NS_PER_S, r.program_id) for r in attacks],
        "window_s": (start_s - margin_s, end_s + margin_s),
        "quiet_ms": None if quiet is None else round(quiet.p50, 3),
        "p95_ms": None if during is None else round(during.p95, 3),
        "worst_ms": None if during is None else round(during.max, 3),
        "ttft_p50_ms": _ms(first_tokens, "p50"),
    }


def scaling(source: Source, agents: Sequence[int]) -> Figure | None:
    """Figure 5: measures against the number of agents. None if no workload ran with two of the numbers in `agents`.

    A panel for each workload: `series` of `{"key", "label", "points": [measures(run), ...]}`.
    """
    panels = []
    for workload in _workloads(source):
        series = _series(source, workload, agents, None)
        if series:
            panels.append({"workload": workload, "series": series})
    return _figure("fig5", source, panels)


def attainment(source: Source, agents: Sequence[int], factor: float = 2.0) -> Figure | None:
    """Figure 6: share of sessions that meet the targets, against the number of agents.

    The targets are `factor` times what one agent has to itself: in the run of ours with one agent, so that all
    configurations are held to the same. Workloads without such a run are left out.
    """
    panels = []
    for workload in _workloads(source):
        alone = [run for run in source.select(workload=workload, key="predictive") if run.num_agents == 1]
        if not alone or not _series(source, workload, agents, None):
            continue
        slo = isolated_slo(alone[0].records, factor)
        panels.append(
            {
                "workload": workload,
                "ttft_target_ms": round(slo.ttft_ns / _NS_PER_MS, 3),
                "tpot_target_ms": round(slo.tpot_ns / _NS_PER_MS, 3),
                "factor": factor,
                "series": _series(source, workload, agents, slo),
            }
        )
    return _figure("fig6", source, panels)


def ablation(source: Source, num_agents: int) -> Figure | None:
    """Figure 7: measures of ours without the algorithm and without slots, divided by those of all of it.

    A panel for each workload: `bars` of `{"key", "label", "values": {measure: ratio}, "absolute": {...}}`.
    """
    labels = {"predictive": "full", "static": "no algorithm (static split)", "no-slots": "no slots (stream)"}
    panels = []
    for workload in dict.fromkeys(run.workload for run in source.runs):
        runs = {r.key: r for r in source.select(workload=workload) if r.num_agents == num_agents and r.key in ABLATION}
        if set(runs) != set(ABLATION):
            continue
        absolute = {key: measures(runs[key]) for key in ABLATION}
        bars = []
        for key in ABLATION:
            values = {}
            for name, _ in ABLATION_MEASURES:
                mine, base = absolute[key][name], absolute["predictive"][name]
                values[name] = round(mine / base, 4) if mine is not None and base else None
            bars.append({"key": key, "label": labels[key], "values": values, "absolute": absolute[key]})
        panels.append({"workload": workload, "num_agents": num_agents, "bars": bars})
    return _figure("fig7", source, panels)


def controllers(source: Source) -> Figure | None:
    """The table that says whether the predictive controller is ever worse than the simpler ways to share the device.

    A panel is a row: workload, number of agents, and for each measure the predictive controller's value, the best of
    the others, which one that was, and by which fraction the predictive one is worse (negative: better). The best of
    each measure may be another one each time, so `beaten_by` has those that are better by more than the tolerance in
    one measure and not worse by more than that in any. `others`: all values of each of them. Of several rounds each
    value is the median of the rounds' values.
    """
    panels = []
    for run in source.runs:
        if run.key != "predictive":
            continue
        others = {
            other.key: _median_measures(other)
            for other in source.select(workload=run.workload)
            if other.num_agents == run.num_agents and other.key in SIMPLE
        }
        if set(others) != set(SIMPLE):
            continue
        mine = _median_measures(run)
        row: Figure = {"workload": run.workload, "num_agents": run.num_agents}
        for name, _ in CONTROLLER_MEASURES:
            row[name] = _against_best(name, mine[name], {key: values[name] for key, values in others.items()})
        row["others"] = {key: {name: values[name] for name, _ in CONTROLLER_MEASURES} for key, values in others.items()}
        row["beaten_by"] = [key for key, values in others.items() if _beats(values, mine)]
        panels.append(row)
    return _figure("controllers", source, panels)


def _median_measures(run: Run) -> dict[str, float | int | None]:
    """`measures`, of several rounds the median of each; a round that lacks a value does not count for it."""
    rounds = [measures(dataclasses.replace(run, records=records)) for records in run.rounds if records]
    if not rounds:
        return measures(run)
    found: dict[str, float | int | None] = {}
    for name in rounds[0]:
        values = [value for each in rounds if (value := each[name]) is not None]
        found[name] = statistics.median(values) if values else None
    return found


def _beats(theirs: Mapping[str, float | None], mine: Mapping[str, float | None]) -> bool:
    gains = []
    for name, _ in CONTROLLER_MEASURES:
        their, my = theirs[name], mine[name]
        if their and my:
            gains.append(their / my if name.endswith("_per_s") else my / their)
    return any(gain > 1.0 + TOLERANCE for gain in gains) and all(gain * (1.0 + TOLERANCE) >= 1.0 for gain in gains)


def _against_best(name: str, mine: float | None, others: Mapping[str, float | None]) -> Figure | None:
    """None if there is nothing to compare."""
    found = {key: value for key, value in others.items() if value}
    if not mine or not found:
        return None
    more_is_better = name.endswith("_per_s")
    best = (max if more_is_better else min)(found, key=lambda key: found[key])
    worse_by = found[best] / mine - 1.0 if more_is_better else mine / found[best] - 1.0
    return {"predictive": mine, "best": found[best], "of": best, "worse_by": round(worse_by, 4)}


def shares(conditions: str, kind: str, curves: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Figure 3: throughput against the share of the device, as a fraction of that on all of it.

    `curves`: `{"label", "work", "points": [(share, tokens a second), ...]}` with `work` one of `decode`, `cold`,
    `resume`; a curve without its point for the whole device is left out.
    """
    normalized = []
    for curve in curves:
        whole = dict(curve["points"]).get(1.0)
        if whole:
            points = [(share, round(value / whole, 5)) for share, value in sorted(curve["points"])]
            normalized.append({**curve, "points": points, "tokens_per_s": round(whole, 3)})
    panels = [{"curves": normalized}] if normalized else []
    return _figure("fig3", Source(kind, conditions, ()), panels)


def _figure(name: str, source: Source, panels: Iterable[Figure]) -> Figure | None:
    found = list(panels)
    if not found:
        return None
    return {"figure": name, "source": source.kind, "conditions": source.conditions, "panels": found}


def _workloads(source: Source) -> list[str]:
    """In the order of the runs; beside a victim the number of agents is no load of its own kind."""
    return list(dict.fromkeys(run.workload for run in source.runs if run.workload != "victim_attacker"))


def _series(source: Source, workload: str, agents: Sequence[int], slo: Slo | None) -> list[Figure]:
    """Our variants in the order of their table, then others. What ran with one number of agents only is no line."""
    keys = source.keys(workload)
    series = []
    for key in (*(key for key in COMPARED if key in keys), *(key for key in keys if key not in VARIANTS)):
        runs = [run for run in source.select(workload=workload, key=key) if run.num_agents in agents]
        if len(runs) > 1:
            points = [measures(run, slo) for run in runs]
            series.append({"key": key, "label": runs[0].label, "points": points})
    return series


def _ms(distribution: Distribution | None, field: str) -> float | None:
    """A field of a distribution of nanoseconds, in milliseconds."""
    if distribution is None:
        return None
    values = dataclasses.asdict(distribution)
    return round(float(values[field]) / _NS_PER_MS, 3)
