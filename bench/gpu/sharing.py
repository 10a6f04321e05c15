"""Part `sharing`: both lanes at once in every partition, throughput against the share of the device, and the profile.

All of it runs on one executor, loaded once: what `bench.isolation`, figure 3 and `agentserve profile` measure, each cut
to the time there is.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

from agentserve.build import Measurable
from agentserve.cli.machine import commit
from agentserve.core.costmodel import Sample
from agentserve.core.slots import PartitionTable
from agentserve.profiles import ProfileOrigin, save_profile
from agentserve.profiles.fit import fit_profile
from agentserve.runtime.calibration import measure, measure_isolated_tpot_ns
from agentserve.runtime.calibration_grid import Case, Grid, Load
from bench.gpu.record import PartRun
from bench.gpu.stepper import Stepper, open_executor

_DECODES, _CONTEXT, _CHUNK = 4, 2048, 1024
_CLOSING_S = 12.0
"""For the fit and the picture."""
PROFILE, TPOT = "profile.json", "isolated_tpot_ns"
"""Files for the part `daemon`: the daemons need not measure when they start, which several at once could not."""
_WARM_BATCHES, _WARM_STEPS, _WARM_UP_S = (4, 1, 8, 2, 16), 3, 25.0
_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


def run(part: PartRun) -> None:
    options: dict[str, Any] = {"max_num_seqs": 17, "max_model_len": 1024 if part.dry_run else 16384}
    if part.dry_run:
        options["kv_cache_memory"] = 16 << 20
    target = open_executor(part, **options)
    try:
        table = target.executor.capabilities().partition_table()
        part.put("warm_up_seconds", _warm_up(target, table))
        _isolation(part, target, table)
        samples = _shares(part, target, table)
        _profile(part, target, table, samples)
    finally:
        target.executor.close()


def _warm_up(target: Measurable, table: PartitionTable) -> float:
    """Uses every slot with every batch size that will be measured until its decode graph is there; returns the seconds.

    A graph is captured when a slot was used a few times, which must not happen in the middle of a measurement.
    """
    started_s = time.monotonic()
    stepper = Stepper(target)
    context = target.limits.context(256)
    stepper.fill(context)
    for partition in {entry.decode_units: entry for entry in table.entries}.values():
        for batch in _WARM_BATCHES:
            load = Load(batch, context)
            if stepper.fits(load) and time.monotonic() - started_s < _WARM_UP_S:
                stepper.run(load, _WARM_STEPS, partition=partition)
    stepper.close()
    return round(time.monotonic() - started_s, 1)


# ---- a decode step beside a prefill ----


def _isolation(part: PartRun, target: Measurable, table: PartitionTable) -> None:
    context, chunk = target.limits.context(_CONTEXT), target.limits.chunk(64 if part.dry_run else _CHUNK)
    decode, prefill = Load(min(_DECODES, target.limits.max_num_seqs - 1), context), Load(chunk=chunk)
    partitions = [table.stream, *table.splits, *table.caps]
    cases = [
        Case(table.whole, decode=decode),
        Case(table.whole, prefill=prefill),
        *(Case(partition, decode=decode, prefill=prefill) for partition in partitions),
        Case(table.whole, decode=dataclasses.replace(decode, chunk=chunk)),
    ]
    grid = Grid(target.limits, tuple(cases), context * _DECODES, 2, 4, 20, 150_000_000)
    samples = measure(target.executor, grid)
    part.put("isolation", {"what": f"{decode.label}; prompts in chunks of {chunk}", "rows": isolation_rows(samples)})
    for row in part.result["isolation"]["rows"]:
        part.say(str(row))


def isolation_rows(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """A row a way to share the device: the decode step, how many times that alone, and prompt tokens a second."""
    rows: dict[str, dict[str, Any]] = {}
    for sample in samples:
        is_mixed = bool(sample.shape.num_decodes and sample.shape.num_prefill_tokens)
        name = sample.partition.label if sample.co_running else "in one batch" if is_mixed else "alone"
        row = rows.setdefault(name, {"how": name})
        if sample.shape.num_decodes:
            row["decode_step_ms"] = round(sample.duration_ns / 1e6, 3)
        if sample.shape.num_prefill_tokens:
            row["prefill_tokens_per_s"] = round(sample.shape.num_prefill_tokens / sample.duration_ns * 1e9)
    alone_ms = rows.get("alone", {}).get("decode_step_ms")
    for row in rows.values():
        if alone_ms and "decode_step_ms" in row:
            row["times_alone"] = round(row["decode_step_ms"] / alone_ms, 3)
    return list(rows.values())


# ---- figure 3 ----


def _shares(part: PartRun, target: Measurable, table: PartitionTable) -> list[Sample]:
    from bench.figures import data  # noqa: PLC0415
    from bench.figures.shares import measured_curves, share_cases  # noqa: PLC0415

    cases = share_cases(table, target.limits)
    grid = Grid(target.limits, cases, target.limits.context(_CONTEXT), 2, 3, 8, 60_000_000)
    samples = measure(target.executor, grid)
    device = target.executor.capabilities().device
    conditions = f"measured: {target.model_name} ({target.dtype}) on {device}, random weights"
    figure = data.shares(conditions, "live", measured_curves(samples))
    part.put("figure_3", figure)
    if figure is not None:
        from bench.figures.plots import draw  # noqa: PLC0415 - matplotlib may be missing: the data is recorded by now

        draw(figure, part.png("fig3"))
    return samples


# ---- the profile ----


def _profile(part: PartRun, target: Measurable, table: PartitionTable, samples: list[Sample]) -> None:
    quick = Grid.quick(table, target.limits)
    full = Grid.full(table, target.limits)
    left_s = min(8.0 if part.dry_run else math.inf, part.left_s - _CLOSING_S)
    grid = dataclasses.replace(
        full,
        cases=tuple(dict.fromkeys((*(case for case in quick.cases if case.required), *scattered(full.cases)))),
        num_rounds=1,
        case_time_ns=30_000_000,
        time_limit_ns=max(0, int(left_s * 1e9)),
    )
    started_s = time.monotonic()
    samples = [*samples, *measure(target.executor, grid)]
    isolated_ns = measure_isolated_tpot_ns(target.executor, target.limits)
    part.put("isolated_tpot_ms", isolated_ns / 1e6)
    part.put("profile_seconds", round(time.monotonic() - started_s, 1))
    part.put("profile_samples", {"num_cases": len(full.cases), "num_samples": len(samples)})
    fit = fit_profile(samples, target.sheet, target.model_shape, provenance="measured: gpu_check")
    part.put("profile", dataclasses.asdict(fit.profile))
    part.put("residuals", [dataclasses.asdict(residual) for residual in fit.residuals])
    origin = ProfileOrigin(
        "measured", f"{len(samples)} medians of timed batches in gpu_check", "see the residuals", target.model_name,
        target.dtype, commit=commit(),
    )  # fmt: skip
    save_profile(part.shared / PROFILE, fit.profile, origin, fit.residuals)
    (part.shared / TPOT).write_text(str(isolated_ns), encoding="utf-8")
    part.say(f"fit over {len(samples)} samples:\n{fit}")


def scattered(cases: Sequence[Case]) -> Iterator[Case]:
    """All cases in an order of which every beginning covers the whole list: steps of the golden ratio."""
    by_place = sorted(range(len(cases)), key=lambda index: (index * _GOLDEN) % 1.0)
    return (cases[index] for index in by_place)
