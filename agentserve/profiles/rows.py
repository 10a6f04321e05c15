"""The curve of matrix efficiency over the number of tokens, read off measured batches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import quantiles

from agentserve.core.costmodel import CostModel, DeviceProfile, ModelShape, Sample

_WORTH = 0.015
"""By how much the mean relative error must fall for batches to count as bound by arithmetic."""
_MAX_ERROR = math.log(2.0)
"""A batch whose time is further from a candidate than this speaks against it no more than this."""
_NUM_CANDIDATES = 15
_TOLERANCE = 0.01
_MAX_KNOTS = 48

Point = tuple[float, float, float]
"""Tokens, rows, weight."""


def tile_rows(tile: int, last: int) -> tuple[tuple[float, float], ...]:
    """The curve of a device that computes tiles of `tile` rows: steps up to `last` tokens, then proportional.

    For fewer tokens than a tile there are kernels with smaller ones, down to the 16 rows of a matrix instruction. On
    the whole device nobody notices, since reading the weights takes longer; on a few units it decides how fast decode
    is.
    """
    smallest = min(16, tile)
    knots: list[tuple[float, float]] = [(1.0, float(smallest))]
    full = smallest
    while full <= last:
        knots.append((float(full), float(full)))
        after = min(2 * full, tile) if full < tile else full + tile
        if after <= last:
            knots.append((full + (after - full) / 8, float(after)))
        full = after
    return tuple(knots)


def fit_rows(
    samples: Sequence[Sample], device: DeviceProfile, sheet: DeviceProfile, model: ModelShape
) -> DeviceProfile:
    """`device` with the curve that explains what its other parameters leave of the samples, which run alone.

    The curve and the rate determine only their quotient; the rate is chosen so that the last knot is fully efficient.
    """
    points = _observe(samples, device, sheet, model)
    if points is None:
        return device
    knots = thin(monotone(points))
    tokens, rows = knots[-1]
    scale = tokens / rows
    return replace(
        device,
        flops_per_s=device.flops_per_s * scale,
        rows=tuple((knot_tokens, knot_rows * scale) for knot_tokens, knot_rows in knots),
    )


def limited_error(predicted_ns: float, measured_ns: int) -> float:
    """Relative, and limited: a batch that was disturbed must not outvote one that was not."""
    return min(_MAX_ERROR, abs(math.log(predicted_ns / measured_ns)))


@dataclass(frozen=True, slots=True)
class _Observation:
    """A batch with a given number of tokens: it takes `rest_ns + max(memory_ns, rows * ns_per_row)`."""

    measured_ns: int
    rest_ns: float
    memory_ns: float
    ns_per_row: float

    def error(self, rows: float) -> float:
        """Of the prediction, see `limited_error`."""
        return limited_error(self.rest_ns + max(self.memory_ns, rows * self.ns_per_row), self.measured_ns)

    @property
    def limit(self) -> float:
        """So many rows take as long as reading the weights."""
        return self.memory_ns / self.ns_per_row

    @property
    def implied(self) -> float:
        """So many rows would explain the time if arithmetic bound it."""
        return (self.measured_ns - self.rest_ns) / self.ns_per_row


def _observe(
    samples: Sequence[Sample], device: DeviceProfile, sheet: DeviceProfile, model: ModelShape
) -> list[Point] | None:
    """Rows for each number of tokens that was measured; None if no batch was bound by arithmetic."""
    cost_model = CostModel(device, model)
    head_share = model.num_head_parameters / (model.num_linear_parameters + model.num_head_parameters)
    groups: dict[int, list[_Observation]] = {}
    for sample in samples:
        num_tokens, units = sample.shape.num_tokens, sample.partition.units(sample.lane)
        ns_per_row = 2e9 * model.num_linear_parameters / device.flops_per_s * device.compute_factor(units)
        memory_ns = model.weight_bytes * (1 - head_share) / device.bandwidth_bytes_per_s * 1e9
        memory_ns *= device.memory_factor(units) * (1 + device.streaming_slowdown * num_tokens)
        dense_ns = max(memory_ns, ns_per_row * device.rows_of(num_tokens))
        total_ns = cost_model.duration_ns(sample.shape, sample.lane, sample.partition, False)
        observation = _Observation(sample.duration_ns, max(0.0, total_ns - dense_ns), memory_ns, ns_per_row)
        groups.setdefault(num_tokens, []).append(observation)
    points: list[Point] = []
    bound_by_arithmetic = False
    for num_tokens, group in sorted(groups.items()):
        # Anything that costs less than reading the weights explains a batch that is bound by reading them.
        rows = floor = min(sheet.rows_of(num_tokens), *(observation.limit for observation in group))
        implied = sorted(observation.implied for observation in group)
        spread = implied if len(implied) <= _NUM_CANDIDATES else quantiles(implied, n=_NUM_CANDIDATES + 1)
        least = sum(observation.error(floor) for observation in group) - _WORTH * len(group)
        for candidate in spread:
            if candidate > floor:
                error = sum(observation.error(candidate) for observation in group)
                if error < least:
                    rows, least = candidate, error
        bound_by_arithmetic |= rows > floor
        share = sum(max(0.05, 1.0 - o.rest_ns / o.measured_ns) for o in group)
        points.append((float(num_tokens), rows, share))
    return points if bound_by_arithmetic else None


def monotone(points: Sequence[Point]) -> list[tuple[float, float]]:
    """The nearest curve that does not fall, in the absolute error of the logarithm.

    Pool adjacent violators (Ayer et al. 1955) with medians (Robertson and Waltman 1968): a group of batches that were
    disturbed does not pull its neighbours.
    """
    blocks: list[tuple[float, list[Point]]] = []
    for point in points:
        members = [point]
        middle = _weighted_median(members)
        while blocks and blocks[-1][0] > middle:
            members = blocks.pop()[1] + members
            middle = _weighted_median(members)
        blocks.append((middle, members))
    return [(tokens, middle) for middle, members in blocks for tokens, _, _ in members]


def _weighted_median(points: Sequence[Point]) -> float:
    """Of the rows; between two that both are one, their geometric mean."""
    ordered = sorted((rows, weight) for _, rows, weight in points)
    half = sum(weight for _, weight in ordered) / 2.0
    below = 0.0
    for index, (rows, weight) in enumerate(ordered):
        below += weight
        if math.isclose(below, half):
            return math.sqrt(rows * ordered[index + 1][0])
        if below > half:
            return rows
    raise AssertionError("half of the weight is reached within all of it")


def thin(curve: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The fewest knots, chosen greedily, between which the curve is linear within the tolerance."""
    chosen = sorted({0, len(curve) - 1})
    while len(chosen) < min(_MAX_KNOTS, len(curve)):
        worst, where = _TOLERANCE, -1
        for left, right in itertools.pairwise(chosen):
            (x0, y0), (x1, y1) = curve[left], curve[right]
            for index in range(left + 1, right):
                x, y = curve[index]
                error = abs((y0 + (y1 - y0) * (x - x0) / (x1 - x0)) / y - 1)
                if error > worst:
                    worst, where = error, index
        if where < 0:
            break
        chosen = sorted([*chosen, where])
    return [curve[index] for index in chosen]
