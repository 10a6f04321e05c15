"""How well a cost model explains samples, by kind of shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from agentserve.core.costmodel import BatchShape, CostModel, Sample
from agentserve.core.slots import PartitionKind

_NUM_WORST = 3


@dataclass(frozen=True, slots=True)
class Residual:
    """Relative errors `predicted / measured - 1` of the samples of one kind."""

    kind: str
    """`decode`, `prefill` or `mixed`."""
    place: str
    """`whole`: alone on all units; `part`: alone on some; `beside`: while the other lane was busy."""
    num_samples: int
    median: float
    """Of the absolute errors."""
    p95: float
    """95th percentile of the absolute errors (nearest rank)."""
    bias: float
    """Mean error with its sign: positive means predicted too slow."""
    worst: tuple[str, ...]
    """The samples with the largest errors, in words."""


def kind_of(shape: BatchShape) -> str:
    """`decode`, `prefill` or `mixed`."""
    if not shape.num_prefill_tokens:
        return "decode"
    return "mixed" if shape.num_decodes else "prefill"


def place_of(sample: Sample, compute_units: int) -> str:
    """`whole`, `part` or `beside`, see `Residual.place`."""
    if sample.co_running:
        return "beside"
    return "whole" if sample.partition.units(sample.lane) >= compute_units else "part"


def residuals_of(samples: Sequence[Sample], cost_model: CostModel) -> tuple[Residual, ...]:
    """One entry for each kind and place that occurs, in a fixed order."""
    groups: dict[tuple[str, str], list[tuple[float, Sample]]] = {}
    for sample in samples:
        predicted = cost_model.duration_ns(sample.shape, sample.lane, sample.partition, sample.co_running)
        key = kind_of(sample.shape), place_of(sample, cost_model.device.compute_units)
        groups.setdefault(key, []).append((predicted / sample.duration_ns - 1.0, sample))
    order = [(kind, place) for kind in ("decode", "prefill", "mixed") for place in ("whole", "part", "beside")]
    return tuple(summarize(*key, groups[key]) for key in order if key in groups)


def summarize(kind: str, place: str, errors: Sequence[tuple[float, Sample]]) -> Residual:
    """The statistics of at least one error."""
    sizes = sorted(abs(error) for error, _ in errors)
    worst = sorted(errors, key=lambda pair: -abs(pair[0]))[:_NUM_WORST]
    return Residual(
        kind=kind,
        place=place,
        num_samples=len(sizes),
        median=median(sizes),
        p95=sizes[math.ceil(0.95 * len(sizes)) - 1],
        bias=sum(error for error, _ in errors) / len(errors),
        worst=tuple(f"{describe(sample)}: {error:+.1%}" for error, sample in worst),
    )


def describe(sample: Sample) -> str:
    """A sample in words."""
    shape, parts = sample.shape, []
    if shape.num_prefill_tokens:
        parts.append(f"{shape.num_prefill_tokens} prefill tokens of {shape.num_prefill_context}")
    if shape.num_decodes:
        parts.append(f"{shape.num_decodes} decodes at {shape.num_decode_context // shape.num_decodes}")
    text = " + ".join(parts)
    if sample.partition.kind is not PartitionKind.WHOLE:
        text += f" in the {sample.lane} lane of {sample.partition.label}"
    return f"{text}, {sample.duration_ns / 1e6:.3f} ms"


def render(residuals: Sequence[Residual]) -> str:
    """A plain-text table."""
    lines = [f"{'kind':8} {'place':7} {'samples':>7} {'median':>8} {'p95':>8} {'bias':>8}  worst"]
    lines += [
        f"{r.kind:8} {r.place:7} {r.num_samples:7d} {r.median:8.2%} {r.p95:8.2%} {r.bias:+8.2%}  {r.worst[0]}"
        for r in residuals
    ]
    return "\n".join(lines)
