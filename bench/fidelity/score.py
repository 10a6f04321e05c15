"""Numbers of a run, measured and predicted, and the signed errors between them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentserve.sim.metrics import Distribution, Summary, TurnRecord, summarize
from bench.fidelity.observed import Observation, Outside, median_outside
from bench.fidelity.predict import predict
from bench.fidelity.steps import by_kind, speed_factor

FORMAT_VERSION = 1
GOAL_CELL, GOAL_MEAN = 0.06, 0.03
"""What the simulator aims at: the error of every number, and the mean of their sizes."""


@dataclass(frozen=True, slots=True)
class Metric:
    """A number of a run."""

    key: str
    title: str
    value: Callable[[Summary], float | None]


def _ms(distribution: Distribution | None, name: str) -> float | None:
    return None if distribution is None else float(getattr(distribution, name)) / 1e6


METRICS = (
    Metric("ttft_mean_ms", "TTFT mean, ms", lambda s: _ms(s.all.ttft_ns, "mean")),
    Metric("ttft_p95_ms", "TTFT p95, ms", lambda s: _ms(s.all.ttft_ns, "p95")),
    Metric("tpot_mean_ms", "TPOT mean, ms", lambda s: _ms(s.all.tpot_ns, "mean")),
    Metric("tpot_p95_ms", "TPOT p95, ms", lambda s: _ms(s.all.tpot_ns, "p95")),
    Metric("jct_mean_ms", "JCT mean, ms", lambda s: _ms(s.job_completion_ns, "mean")),
    Metric("jct_p95_ms", "JCT p95, ms", lambda s: _ms(s.job_completion_ns, "p95")),
    Metric("tokens_per_s", "output, tokens/s", lambda s: s.output_tokens_per_s or None),
)
"""What the goal is about."""
CLASSES = (
    Metric("cold_ttft_mean_ms", "cold TTFT mean, ms", lambda s: _ms(s.cold.ttft_ns, "mean")),
    Metric("resumed_ttft_mean_ms", "resumed TTFT mean, ms", lambda s: _ms(s.resumed.ttft_ns, "mean")),
    Metric("gap_p50_ms", "gap p50, ms", lambda s: _ms(s.all.itl_ns, "p50")),
    Metric("gap_p95_ms", "gap p95, ms", lambda s: _ms(s.all.itl_ns, "p95")),
)
"""Where errors come from."""
VARIANTS = {
    "predicted": "the profile as it is, with the constants for the time outside the engine",
    "engine_only": "the profile as it is, without those constants",
    "at_speed": "with the constants, and one factor for each run: how much longer its batches took than the profile "
    "says, all together; what is left is no difference of the machine's speed",
}
"""Three predictions of each run. The first is the result, the others say what its errors are made of."""


def score(observations: Sequence[Observation]) -> dict[str, Any]:
    """All numbers of a campaign as JSON takes them: cells, overall, kinds of batches, constants, notes.

    Raises ConfigError if a recording has no profile, EngineError if a simulation stops.
    """
    outside = median_outside(call for observation in observations for call in observation.outside)
    cells: dict[str, list[Observation]] = {}
    for observation in observations:
        cells.setdefault(observation.cell, []).append(observation)
    scored = [_cell(title, group, outside) for title, group in cells.items()]
    batches = [batch for observation in observations for batch in observation.batches]
    return {
        "format_version": FORMAT_VERSION,
        "variants": VARIANTS,
        "outside_ns": dataclasses.asdict(outside),
        "cells": scored,
        "overall": {variant: _overall(scored, variant) for variant in VARIANTS},
        "live_spread": _live_spread(scored),
        "kinds": by_kind(batches),
        "kinds_by_cell": {
            title: by_kind([batch for observation in group for batch in observation.batches])
            for title, group in cells.items()
        },
        "notes": list(dict.fromkeys(note for observation in observations for note in observation.notes))
        + [
            f"{cell['title']}: {cell['num_simulated_errors']} simulated calls failed and count in no number"
            for cell in scored
            if cell["num_simulated_errors"]
        ],
    }


def _cell(title: str, group: Sequence[Observation], outside: Outside) -> dict[str, Any]:
    measured: list[Mapping[str, float | None]] = []
    predicted: dict[str, list[Mapping[str, float | None]]] = {variant: [] for variant in VARIANTS}
    factors, num_errors = [], 0
    for observation in group:
        factor = speed_factor(observation.batches)
        factors.append(factor)
        measured.append(_numbers(observation.records))
        records = predict(observation, outside)
        num_errors += sum(record.error is not None for record in records)
        predicted["predicted"].append(_numbers(records))
        predicted["engine_only"].append(_numbers(predict(observation, Outside())))
        predicted["at_speed"].append(_numbers(predict(observation, outside, slowdown=factor)) if factor else {})
    config = group[0].header.config
    return {
        "title": title,
        "rounds": [observation.round for observation in group],
        "num_calls": [len(observation.records) for observation in group],
        "num_kv_blocks": config.num_blocks,
        "block_size": config.block_size,
        "num_simulated_errors": num_errors,
        "speed_factors": factors,
        "others_shares": [observation.others_share for observation in group],
        "metrics": {
            metric.key: _compared(metric.key, measured, predicted)
            for metric in (*METRICS, *CLASSES)
            if all(numbers[metric.key] is not None for numbers in measured)
        },
    }


def _numbers(records: Sequence[TurnRecord]) -> dict[str, float | None]:
    summary = summarize(records)
    return {metric.key: metric.value(summary) for metric in (*METRICS, *CLASSES)}


def _compared(
    key: str,
    measured: Sequence[Mapping[str, float | None]],
    predicted: Mapping[str, Sequence[Mapping[str, float | None]]],
) -> dict[str, Any]:
    live = [value for numbers in measured if (value := numbers[key]) is not None]
    mean = math.fsum(live) / len(live)
    result: dict[str, Any] = {
        "live": live,
        "live_mean": mean,
        "live_spread": (max(live) - min(live)) / mean if len(live) > 1 else None,
    }
    for variant, rounds in predicted.items():
        values = [value for numbers in rounds if (value := numbers.get(key)) is not None]
        is_whole = len(values) == len(live)
        value = math.fsum(values) / len(values) if is_whole else None
        result[variant] = {"value": value, "error": None if value is None else value / mean - 1.0}
    return result


def _overall(cells: Sequence[Mapping[str, Any]], variant: str) -> dict[str, Any]:
    """Mean size of the errors of all numbers, of each metric over the cells, and how many are within the goal."""
    errors: dict[str, list[float]] = {}
    for cell in cells:
        for metric in METRICS:
            found = cell["metrics"].get(metric.key)
            if found is not None and found[variant]["error"] is not None:
                errors.setdefault(metric.key, []).append(found[variant]["error"])
    every = [abs(error) for values in errors.values() for error in values]
    return {
        "mean_absolute_error": _mean(every),
        "largest_error": max(every, default=None),
        "num_within_goal": sum(error <= GOAL_CELL for error in every),
        "num_numbers": len(every),
        "by_metric": {key: _mean([abs(error) for error in values]) for key, values in errors.items()},
        "bias_by_metric": {key: _mean(values) for key, values in errors.items()},
    }


def _live_spread(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The same for how far the rounds of a cell lie from each other: no prediction can be tested below it."""
    spreads: dict[str, list[float]] = {}
    for cell in cells:
        for metric in METRICS:
            found = cell["metrics"].get(metric.key)
            if found is not None and found["live_spread"] is not None:
                spreads.setdefault(metric.key, []).append(found["live_spread"])
    every = [spread for values in spreads.values() for spread in values]
    return {
        "mean": _mean(every),
        "largest": max(every, default=None),
        "by_metric": {key: _mean(values) for key, values in spreads.items()},
    }


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
