"""Part `steps`: decode steps against the time that reading takes, prefills against the rate of matrix products."""

from __future__ import annotations

import statistics
from typing import Any

from agentserve.core.costmodel import ModelShape
from agentserve.runtime.calibration_grid import Load
from bench.gpu.ceilings import ceilings
from bench.gpu.record import PartRun, spread
from bench.gpu.stepper import Stepper, idle_gaps, kernel_intervals, open_executor

_BATCHES, _CONTEXTS = (1, 4, 8, 16, 32), (1024, 4096, 16384)
_CHUNKS = ((4096, 0), (2048, 0), (1024, 0), (512, 0), (256, 0), (2048, 4096), (256, 4096))
"""Prompt tokens in a batch, and tokens before them."""
_DRY_BATCHES, _DRY_CONTEXTS, _DRY_CHUNKS = (1, 2), (64,), ((64, 0), (32, 64))
_NUM_STEPS, _NUM_PREFILLS, _TRACED_STEPS = 40, 8, 16


def run(part: PartRun) -> None:
    dry = part.dry_run
    part.put("planned", {"batches": _BATCHES, "contexts": _CONTEXTS, "chunks": _CHUNKS})
    part.put("ceilings", ceilings("cpu" if dry else "cuda"))
    batches, contexts = (_DRY_BATCHES, _DRY_CONTEXTS) if dry else (_BATCHES, _CONTEXTS)
    sizes: dict[str, Any] = {"max_num_seqs": batches[-1] + 1, "max_model_len": contexts[-1] + 512}
    if dry:
        sizes["kv_cache_memory"] = 16 << 20
    else:
        sizes["max_num_batched_tokens"] = _CHUNKS[0][0]
    target = open_executor(part, **sizes)
    try:
        stepper = Stepper(target)
        shape = target.model_shape
        part.put("model", {"name": target.model_name, "dtype": target.dtype, "weight_bytes": shape.weight_bytes})
        part.put("lookahead", stepper.lookahead)
        # Every sequence reads keys and values of its own: shared ones would come from the cache.
        part.put("filled_tokens", stepper.fill(batches[-1] * contexts[-1]))
        bandwidth = part.result["ceilings"]["copy_bytes_per_s"]["median"]
        _prefills(part, stepper, shape, part.result["ceilings"]["matrix_flops_per_s"]["median"])
        _decodes(part, stepper, shape, bandwidth, [(b, c) for c in contexts for b in batches])
        part.put("gaps", _gaps(part, stepper))
        stepper.close()
    finally:
        target.executor.close()
    from bench.gpu.plots import draw_steps  # noqa: PLC0415 - matplotlib may be missing: everything is recorded by now

    draw_steps(part.result, part.png("steps"))


def decode_floor_ms(shape: ModelShape, batch: int, context: int, bytes_per_s: float) -> float:
    """The time that reading the weights once, and all keys and values, takes at the bandwidth of a copy."""
    return (shape.weight_bytes + batch * context * shape.kv_bytes_per_token) / bytes_per_s * 1e3


def prefill_flops(shape: ModelShape, chunk: int, start: int) -> float:
    """Operations of a chunk: its products with the weights of all layers, and attention to what each token may see."""
    pairs = chunk * start + chunk * (chunk + 1) / 2
    return 2.0 * shape.num_linear_parameters * chunk + shape.attention_flops_per_pair * pairs


def _decodes(
    part: PartRun, stepper: Stepper, shape: ModelShape, bandwidth: float, cases: list[tuple[int, int]]
) -> None:
    rows: list[dict[str, Any]] = []
    for batch, context in cases:
        load = Load(batch, context)
        if not stepper.fits(load):
            rows.append({"batch": batch, "context": context, "left_out": "it does not fit the memory"})
            continue
        steps = stepper.run(load, _NUM_STEPS, depth=stepper.lookahead)
        periods_ms = [step.period_ns / 1e6 for step in steps if step.period_ns is not None]
        alone = stepper.run(load, _NUM_STEPS // 4) if stepper.lookahead > 1 else steps
        floor_ms = decode_floor_ms(shape, batch, context, bandwidth)
        rows.append(
            {
                "batch": batch,
                "context": context,
                "step_ms": spread(periods_ms),
                "one_at_a_time_ms": spread(step.duration_ns / 1e6 for step in alone),
                "floor_ms": round(floor_ms, 4),
                "over_floor": round(statistics.median(periods_ms) / floor_ms, 3),
            }
        )
        part.put("decode", rows)
        part.say(
            f"{batch} at {context}: {rows[-1]['step_ms']['median']:.2f} ms, {rows[-1]['over_floor']:.2f} x the floor"
        )
    part.put("decode", rows)


def _prefills(part: PartRun, stepper: Stepper, shape: ModelShape, flops_per_s: float) -> None:
    rows: list[dict[str, Any]] = []
    for chunk, start in _DRY_CHUNKS if part.dry_run else _CHUNKS:
        load = Load(chunk=chunk, start=start)
        if not stepper.fits(load):
            rows.append({"chunk": chunk, "start": start, "left_out": "it does not fit the memory"})
            continue
        times_ms = [step.duration_ns / 1e6 for step in stepper.run(load, _NUM_PREFILLS)]
        median_s = statistics.median(times_ms) / 1e3
        rows.append(
            {
                "chunk": chunk,
                "start": start,
                "ms": spread(times_ms),
                "tokens_per_s": round(chunk / median_s),
                "share_of_matrix_rate": round(prefill_flops(shape, chunk, start) / median_s / flops_per_s, 4),
            }
        )
        part.put("prefill", rows)
        part.say(f"{chunk} tokens at {start}: {rows[-1]['tokens_per_s']} tokens/s")
    part.put("prefill", rows)


def _gaps(part: PartRun, stepper: Stepper) -> list[dict[str, Any]]:
    """Time in which the device idles between two steps, from a trace of it.

    Between two steps lies the longest gap of each: so the median of as many longest gaps as there are steps.
    """
    from torch.profiler import ProfilerActivity, profile  # noqa: PLC0415

    rows = []
    # Without a GPU the trace holds nothing that is looked for, but is made and read all the same.
    activity = ProfilerActivity.CPU if part.dry_run else ProfilerActivity.CUDA
    for batch in (1,) if part.dry_run else (1, 8):
        load = Load(batch, stepper.limits.context(1024))
        stepper.run(load, 4, depth=stepper.lookahead)
        with profile(activities=[activity]) as profiler:
            stepper.run(load, _TRACED_STEPS, depth=stepper.lookahead)
        trace = part.scratch / f"trace-{batch}.json"
        profiler.export_chrome_trace(str(trace))
        intervals = kernel_intervals(trace)
        gaps = idle_gaps(intervals)
        longest = gaps[:_TRACED_STEPS]
        row: dict[str, Any] = {"batch": batch, "num_kernels": len(intervals), "num_steps": _TRACED_STEPS}
        if longest:
            row |= {"gap_us": spread(longest), "idle_share": round(sum(gaps) / (intervals[-1][1] - intervals[0][0]), 4)}
        rows.append(row)
    return rows
