"""Reads step times in the columns of the published tables as samples for the fit."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from agentserve.core.batch import Lane
from agentserve.core.costmodel import BatchShape, ModelShape, Sample
from agentserve.core.slots import PartitionKind, SlotPartition

_LAYERS, _HIDDEN, _INTERMEDIATE, _HEADS, _KV_HEADS, _HEAD_DIM, _VOCABULARY = 32, 4096, 14336, 32, 8, 128, 128256
_LINEAR = _LAYERS * (_HIDDEN * _HEAD_DIM * (2 * _HEADS + 2 * _KV_HEADS) + 3 * _HIDDEN * _INTERMEDIATE)

LLAMA_3_1_8B = ModelShape(
    num_linear_parameters=_LINEAR,
    num_head_parameters=_VOCABULARY * _HIDDEN,
    weight_bytes=2 * (_LINEAR + _VOCABULARY * _HIDDEN),
    kv_bytes_per_token=2 * 2 * _LAYERS * _KV_HEADS * _HEAD_DIM,
    attention_flops_per_pair=4 * _LAYERS * _HEADS * _HEAD_DIM,
    num_layers=_LAYERS,
    num_heads=_HEADS,
    num_kv_heads=_KV_HEADS,
)
"""The model of the tables, in bfloat16."""


def read_samples(path: Path, hardware: str, compute_units: int) -> list[Sample]:
    """The rows of one card in a file with the columns of `step_times.csv`."""
    with path.open(newline="") as file:
        return to_samples((row for row in csv.DictReader(file) if row["hardware"] == hardware), compute_units)


def to_samples(rows: Iterable[dict[str, str]], compute_units: int) -> list[Sample]:
    """One sample a row: a chunk of `prefill_chunk` tokens after `kv_prefill`, and `n_decode` decodes.

    The KV of a decode includes its own token; the tables charge the output head for each sequence.
    """
    whole = SlotPartition(compute_units, compute_units, PartitionKind.WHOLE)
    samples = []
    for row in rows:
        chunk, start = int(row["prefill_chunk"]), int(row["kv_prefill"])
        num_decodes, context = int(row["n_decode"]), int(row["kv_decode"])
        shape = BatchShape(
            num_decodes=num_decodes,
            num_decode_context=num_decodes * context,
            num_samples=num_decodes + (chunk > 0),
        )
        if chunk:
            shape = shape.with_prefill(chunk, start)
        lane = Lane.DECODE if num_decodes else Lane.PREFILL
        samples.append(Sample(shape, lane, whole, False, round(float(row["step_ms"]) * 1e6)))
    return samples
