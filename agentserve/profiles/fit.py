"""Fits the parameters of a device to measured batches.

The scalars are fitted by damped least squares (Levenberg-Marquardt) on the logarithm of predicted / measured,
reweighted after Huber so that outliers do not pull. Every scalar is fitted as a logarithm or logit, hence never leaves
its range, and is tied weakly to its start: what the samples say nothing about stays as the data sheet has it. In turns
with that, the curve of matrix efficiency over tokens is read off what is left of each sample after everything else
(backfitting), made monotone (pool adjacent violators) and thinned. Contention comes last, from the samples beside a
busy lane.

The prediction is `CostModel.duration_ns` itself, so there is no second copy of the formulas.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from agentserve.core.batch import Lane
from agentserve.core.costmodel import Contention, CostModel, DeviceProfile, ModelShape, Sample, overlap_of
from agentserve.errors import ConfigError
from agentserve.profiles.residuals import Residual, kind_of, place_of, render, residuals_of
from agentserve.profiles.rows import fit_rows, limited_error

_ROUNDS = 6
"""Turns of scalars and curve; both change by less than the noise after these."""
_MAX_ITERATIONS = 15
_MAX_SAMPLES = 900
"""Scalars are fitted to at most this many samples, spread evenly over the shapes; all count for curve and residuals."""
_NOISE = 0.02
"""Relative error of a sample that is taken for granted. Sets how much the start values weigh against samples."""
_HUBER = 4.0
"""In units of the noise: larger errors count linearly."""
_STEP = 1e-4
_MAX_CHANGE = 1.0
"""Largest step in a logarithm at a time."""


@dataclass(frozen=True, slots=True)
class FitReport:
    """A fitted profile, and how well it explains all the samples that it was fitted to."""

    profile: DeviceProfile
    residuals: tuple[Residual, ...]

    def __str__(self) -> str:
        return render(self.residuals)


def fit_profile(
    samples: Sequence[Sample], sheet: DeviceProfile, model: ModelShape, *, provenance: str | None = None
) -> FitReport:
    """Fits a profile to samples of one model, starting from `sheet`.

    Args:
        samples: measured batches, in any order; a few dozen suffice. Durations may be noisy, and single ones wrong.
        sheet: where to start (`from_data_sheet`, `cpu_sheet`). Parameters that the samples do not determine keep its
            values: without samples on a part of the units the saturations do, without samples beside a busy lane the
            contention does. Names, sizes and granularity are taken over.
        model: the model that was measured.
        provenance: for the profile; by default "fitted: to N samples".

    Raises:
        ConfigError: there are no samples, or one has no tokens or a duration that is not positive.
    """
    if not samples:
        raise ConfigError("a profile cannot be fitted without samples")
    for sample in samples:
        if sample.duration_ns <= 0 or sample.shape.num_tokens < 1:
            raise ConfigError(f"a sample needs tokens and a positive duration: {sample}")
    alone = [sample for sample in samples if not sample.co_running]
    device = sheet
    if alone:
        chosen = _spread(alone, sheet.compute_units)
        rounds = []
        for _ in range(_ROUNDS):
            device = _fit_scalars(chosen, device, sheet, model)
            device = fit_rows(alone, device, sheet, model)
            rounds.append(device)
        # With few or disturbed samples the turns may go to and fro between two explanations, of which one is better.
        best = min(rounds, key=lambda device: _misfit(alone, device, model))
        if _misfit(alone, device, model) - _misfit(alone, best, model) > _NOISE / 10:
            device = best
    device = replace(
        device,
        contention=_fit_contention([sample for sample in samples if sample.co_running], device, model),
        provenance=provenance or f"fitted: to {len(samples)} samples",
    )
    return FitReport(device, residuals_of(samples, CostModel(device, model)))


def _misfit(samples: Sequence[Sample], device: DeviceProfile, model: ModelShape) -> float:
    """Of samples that ran alone: the mean of their relative errors, each limited as for the curve."""
    cost_model = CostModel(device, model)
    return statistics.fmean(
        limited_error(cost_model.duration_ns(s.shape, s.lane, s.partition, False), s.duration_ns) for s in samples
    )


def _spread(samples: Sequence[Sample], compute_units: int) -> list[Sample]:
    """At most `_MAX_SAMPLES` of them, equally many of each kind of shape, evenly over their durations."""
    if len(samples) <= _MAX_SAMPLES:
        return list(samples)
    kinds: dict[tuple[str, bool], list[Sample]] = {}
    for sample in samples:
        kinds.setdefault((kind_of(sample.shape), place_of(sample, compute_units) == "whole"), []).append(sample)
    chosen = []
    for group in kinds.values():
        group.sort(key=lambda sample: sample.duration_ns)
        count = min(len(group), _MAX_SAMPLES // len(kinds))
        chosen += [group[index * len(group) // count] for index in range(count)]
    return chosen


# ---- scalars ----


@dataclass(frozen=True, slots=True)
class _Scalar:
    """A parameter, mapped to the whole line of numbers: as a logarithm, or as a logit if it has bounds."""

    name: str
    start: float
    spread: float
    """How far from its start one expects it on that line."""
    bounds: tuple[float, float] | None = None

    def encode(self, value: float) -> float:
        if self.bounds is None:
            return math.log(value)
        low, high = self.bounds
        share = min(0.98, max(0.02, (value - low) / (high - low)))
        return math.log(share / (1.0 - share))

    def decode(self, x: float) -> float:
        if self.bounds is None:
            return math.exp(min(x, 80.0))
        low, high = self.bounds
        return low + (high - low) / (1.0 + math.exp(-x))


def _scalars(sheet: DeviceProfile) -> list[_Scalar]:
    """What is fitted, from where. Zero stands for an effect that the device does not have."""
    scalars = [_Scalar(name, getattr(sheet, name), spread) for name, spread in _FREE.items()]
    scalars += [_Scalar(name, getattr(sheet, name), 1.5, (0.0, high)) for name, high in _LIMITED.items()]
    for name in _TIED:
        start = getattr(sheet, name)
        scalars.append(_Scalar(name, start, 1.0, (start / _TIE, start * _TIE)))
    return [scalar for scalar in scalars if scalar.start > 0]


_FREE = {
    "bandwidth_bytes_per_s": 1.5,
    "flops_per_s": 1.5,
    "kv_bandwidth_bytes_per_s": 1.5,
    "attention_flops_per_s": 1.5,
    "attention_tile_keys": 0.7,
    "attention_tail": 0.7,
    "cache_bytes": 0.2,
    "sequence_overhead_ns": 1.0,
    "sample_overhead_ns": 1.0,
}
"""Parameters with the spread of their logarithm."""
_LIMITED = {"streaming_slowdown": 0.01, "bandwidth_saturation": 1.0, "rate_saturation": 1.0, "cache_misalignment": 1.0}
"""Parameters from 0 to a limit."""
_TIED, _TIE = ("overhead_ns", "layer_overhead_ns"), 2.0
"""Samples of one model hardly tell these from reading weights; so they stay within this factor of the start."""


def _fit_scalars(
    samples: Sequence[Sample], device: DeviceProfile, sheet: DeviceProfile, model: ModelShape
) -> DeviceProfile:
    scalars = _scalars(sheet)
    start = [scalar.encode(scalar.start) for scalar in scalars]
    logs = [math.log(sample.duration_ns) for sample in samples]

    def with_values(x: Sequence[float]) -> DeviceProfile:
        values: dict[str, float] = {}
        for scalar, coded in zip(scalars, x, strict=True):
            value = scalar.decode(coded)
            values[scalar.name] = round(value) if scalar.name == "overhead_ns" else value
        values["cache_bytes"] = max(1, round(values.get("cache_bytes", device.cache_bytes)))
        return replace(device, **values)  # type: ignore[arg-type]

    def errors(x: Sequence[float]) -> list[float]:
        cost_model = CostModel(with_values(x), model)
        return [
            math.log(max(1, cost_model.duration_ns(s.shape, s.lane, s.partition, False))) - log
            for s, log in zip(samples, logs, strict=True)
        ]

    x = [scalar.encode(getattr(device, scalar.name)) for scalar in scalars]
    return with_values(_minimize(errors, x, start, [scalar.spread for scalar in scalars]))


def _minimize(
    errors: Callable[[Sequence[float]], list[float]],
    x: list[float],
    start: Sequence[float],
    spreads: Sequence[float],
) -> list[float]:
    """Levenberg-Marquardt on `sum huber(error / noise) + sum ((x - start) / spread)^2`, from `x`."""
    import numpy as np  # noqa: PLC0415 - with the extras only, and not needed to use a profile

    center, precision = np.asarray(start), 1.0 / np.asarray(spreads) ** 2

    def loss(at: np.ndarray, residual: np.ndarray) -> float:
        size = np.abs(residual)
        huber = np.where(size <= _HUBER, size**2, 2.0 * _HUBER * size - _HUBER**2)
        return float(huber.sum() + (precision * (at - center) ** 2).sum())

    here = np.asarray(x)
    residual = np.asarray(errors(x)) / _NOISE
    best, damping = loss(here, residual), 1e-2
    for _ in range(_MAX_ITERATIONS):
        moved = (here + _STEP * row for row in np.eye(len(here)))
        jacobian = np.stack([(np.asarray(errors(m.tolist())) / _NOISE - residual) / _STEP for m in moved], axis=1)
        weights = _HUBER / np.maximum(np.abs(residual), _HUBER)
        normal = jacobian.T @ (jacobian * weights[:, None]) + np.diag(precision)
        gradient = jacobian.T @ (weights * residual) + precision * (here - center)
        before = best
        while damping < 1e6:
            step = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), -gradient)
            there = here + np.clip(step, -_MAX_CHANGE, _MAX_CHANGE)
            there_residual = np.asarray(errors(there.tolist())) / _NOISE
            there_loss = loss(there, there_residual)
            if there_loss < best:
                here, residual, best = there, there_residual, there_loss
                damping = max(damping / 5.0, 1e-9)
                break
            damping *= 5.0
        if before - best < 1e-4 * best:
            break
    return [float(value) for value in here]


# ---- contention ----

_CONTENTION_WEIGHT = 0.1
"""How many samples the start value of a factor counts for."""


_PLACES = ("split", "cap", "shared")


def _fit_contention(samples: Sequence[Sample], device: DeviceProfile, model: ModelShape) -> Contention:
    """The three factors of each lane: measured / predicted alone is a weighted mean of them (`overlap_of`)."""
    cost_model = CostModel(device, model)
    fixed_ns = device.overhead_ns + device.layer_overhead_ns * model.num_layers
    factors: dict[str, float] = {}
    for lane in Lane:
        points = []
        for sample in (sample for sample in samples if sample.lane is lane):
            alone_ns = cost_model.duration_ns(sample.shape, lane, sample.partition, False) - fixed_ns
            if alone_ns > 0:
                points.append((overlap_of(lane, sample.partition), (sample.duration_ns - fixed_ns) / alone_ns))
        start = tuple(getattr(device.contention, f"{lane}_{place}") for place in _PLACES)
        for index, (place, factor) in enumerate(zip(_PLACES, _robust_means(points, start), strict=True)):
            # What was not measured in a capped partition follows from the other two.
            if place != "cap" or any(weights[index] > 0 for weights, _ in points):
                factors[f"{lane}_{place}"] = max(1.0, factor)
    return Contention(**factors)


def _robust_means(points: Sequence[tuple[tuple[float, ...], float]], start: Sequence[float]) -> list[float]:
    """Values whose weighted means are nearest to the points, in absolute error, by reweighted least squares."""
    if not points:
        return list(start)
    import numpy as np  # noqa: PLC0415 - see above

    values = np.array(start)
    weights = np.array([weights for weights, _ in points])
    factors = np.array([factor for _, factor in points])
    for _ in range(20):
        trust = 0.1 / np.maximum(0.1, np.abs(weights @ values - factors))
        normal = (weights * trust[:, None]).T @ weights + _CONTENTION_WEIGHT * np.eye(len(start))
        values = np.linalg.solve(normal, (weights * trust[:, None]).T @ factors + _CONTENTION_WEIGHT * np.array(start))
    return [float(value) for value in values]
