"""Figure 3: how the throughput of each kind of work depends on its share of the device.

Simulated: what the cost model says of a lane alone on each size of slot. Measured: the same batches, run by the
executor of the daemon through the calibration's own harness, each lane alone.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from agentserve.build import build_executor
from agentserve.config import ServeConfig, resolve
from agentserve.core.batch import Lane
from agentserve.core.costmodel import BatchShape, Sample
from agentserve.core.slots import PartitionKind, PartitionTable, SlotPartition
from agentserve.errors import ConfigError, WorkloadError
from agentserve.runtime.calibration import measure
from agentserve.runtime.calibration_grid import Case, Grid, Limits, Load
from bench.figures.simulated import Device

_CONTEXT_TOKENS = 2048
_CASES = (
    ("decode", "decode, 4 sequences at 2k", BatchShape(4, 4 * _CONTEXT_TOKENS, num_samples=4)),
    ("cold", "cold prefill, 512 tokens", BatchShape().with_prefill(512)),
    ("resume", "resume prefill, 64 tokens at 2k", BatchShape().with_prefill(64, _CONTEXT_TOKENS)),
    ("resume", "resume prefill, 256 tokens at 2k", BatchShape().with_prefill(256, _CONTEXT_TOKENS)),
)
_SAMPLES_NAME = "samples.json"


def simulated_curves(device: Device) -> list[dict[str, Any]]:
    """Curves for `bench.figures.data.shares`, from the cost model."""
    table = device.table
    total = table.whole.decode_units
    partitions = [*(SlotPartition(s.decode_units, s.decode_units, s.kind) for s in table.splits), table.whole]
    curves = []
    for work, label, shape in _CASES:
        lane = Lane.DECODE if work == "decode" else Lane.PREFILL
        points = [
            (
                partition.units(lane) / total,
                shape.num_tokens * 1e9 / device.cost_model.duration_ns(shape, lane, partition, False),
            )
            for partition in partitions
        ]
        curves.append({"label": label, "work": work, "points": points})
    return curves


def measure_samples(options: Sequence[str], report: Callable[[str], None]) -> tuple[str, list[Sample]]:
    """Runs the batches of the figure on every size of slot of this machine's executor; takes a minute on a CPU.

    Args:
        options: of `agentserve serve`; what they say of the model and the executor counts.
        report: called with a line for each step that takes a while.

    Returns the conditions in words and the samples. Raises what the daemon raises when it cannot start.
    """
    target = build_executor(_serve_config(options), report)
    try:
        capabilities = target.executor.capabilities()
        table = capabilities.partition_table()
        # Twice there and back, at least three batches each time: the medians of six or more.
        grid = Grid(
            target.limits, share_cases(table, target.limits), target.limits.context(_CONTEXT_TOKENS), 2, 3, 8, 10**9
        )
        report(f"measuring {target.model_name} on {capabilities.device}: {len(grid.cases)} cases")
        return f"measured: {target.model_name} ({target.dtype}) on {capabilities.device}", measure(
            target.executor, grid
        )
    finally:
        target.executor.close()


def share_cases(table: PartitionTable, limits: Limits) -> tuple[Case, ...]:
    """The batches of the figure, each alone in its lane, on every size of slot."""
    by_units = {p.decode_units: p for p in table.splits} | {p.prefill_units: p for p in table.splits}
    cases = []
    for partition in (*by_units.values(), table.whole):
        for work, _, shape in _CASES:
            load = _load(work, shape, limits)
            is_decode = work == "decode"
            cases.append(Case(partition, decode=load if is_decode else None, prefill=None if is_decode else load))
    return tuple(dict.fromkeys(cases))


def _serve_config(options: Sequence[str]) -> ServeConfig:
    """Raises ConfigError. Options come as `--name value`."""
    pairs = zip(options[::2], options[1::2], strict=False)
    given = {name.removeprefix("--").replace("-", "_"): value for name, value in pairs}
    known = {field.name for field in dataclasses.fields(ServeConfig)}
    if len(options) % 2 or not given.keys() <= known:
        raise ConfigError(f"options of the daemon must come as --name value, not {' '.join(options)!r}")
    return resolve(given, {}, {}).config


def _load(work: str, shape: BatchShape, limits: Limits) -> Load:
    """The same batch as the calibration describes it, cut to what the executor can take."""
    context = limits.context(_CONTEXT_TOKENS)
    if work == "decode":
        return Load(min(shape.num_decodes, limits.max_num_seqs), context)
    chunk = limits.chunk(shape.num_prefill_tokens)
    return Load(chunk=chunk, start=context if work == "resume" else 0)


def measured_curves(samples: Iterable[Sample]) -> list[dict[str, Any]]:
    """Curves from measured batches that had the device to themselves, for those kinds with more than one share."""
    rates: dict[tuple[str, int], dict[int, tuple[float, str]]] = {}
    for sample in samples:
        shape = sample.shape
        work = _work(sample.lane, shape)
        if work is None or sample.co_running:
            continue
        rate = shape.num_tokens * 1e9 / sample.duration_ns
        key = (work, shape.num_tokens)
        rates.setdefault(key, {})[sample.partition.units(sample.lane)] = (rate, _label(work, shape))
    total = max((units for by_units in rates.values() for units in by_units), default=0)
    return [
        {
            "label": by_units[total][1],
            "work": work,
            "points": [(units / total, rate) for units, (rate, _) in sorted(by_units.items())],
        }
        for (work, _), by_units in rates.items()
        if total in by_units and len(by_units) > 1
    ]


def save_samples(conditions: str, samples: Iterable[Sample], directory: Path) -> None:
    """Writes `samples.json`. Raises OSError."""
    directory.mkdir(parents=True, exist_ok=True)
    value = {"conditions": conditions, "samples": [dataclasses.asdict(sample) for sample in samples]}
    (directory / _SAMPLES_NAME).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def load_samples(directory: Path) -> tuple[str, list[Sample]] | None:
    """What `save_samples` has written in this directory or below it; None if there is nothing.

    Raises WorkloadError for a file that cannot be read.
    """
    path = next(iter(sorted(directory.rglob(_SAMPLES_NAME))), None)
    if path is None:
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        return str(value["conditions"]), [_sample(sample) for sample in value["samples"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WorkloadError(f"{path} has no samples of a measured device: {error!r}") from None


def _sample(value: Mapping[str, Any]) -> Sample:
    partition = value["partition"]
    return Sample(
        shape=BatchShape(**value["shape"]),
        lane=Lane(value["lane"]),
        partition=SlotPartition(
            partition["decode_units"], partition["prefill_units"], PartitionKind(partition["kind"])
        ),
        co_running=value["co_running"],
        duration_ns=value["duration_ns"],
    )


def _work(lane: Lane, shape: BatchShape) -> str | None:
    """`decode`, `cold` or `resume`; None for mixed batches and for several chunks."""
    if lane is Lane.DECODE and shape.num_prefill_tokens == 0:
        return "decode"
    if shape.num_decodes or shape.num_prefill_chunks != 1:
        return None
    return "cold" if shape.num_prefill_context == shape.num_prefill_tokens else "resume"


def _label(work: str, shape: BatchShape) -> str:
    if work == "decode":
        plural = "s" if shape.num_decodes > 1 else ""
        return f"decode, {shape.num_decodes} sequence{plural}{_at(shape.num_decode_context // shape.num_decodes)}"
    start = shape.num_prefill_context - shape.num_prefill_tokens
    return f"{work} prefill, {shape.num_prefill_tokens} tokens{_at(start)}"


def _at(num_tokens: int) -> str:
    """Roughly: the batch with the median duration is a little behind the first one."""
    if num_tokens == 0:
        return ""
    return f" at {num_tokens / 1000:.1f}k" if num_tokens >= 1000 else f" at {num_tokens}"
