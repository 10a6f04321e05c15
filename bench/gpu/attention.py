"""Part `attention`: one layer's attention by FlashInfer, by our Triton kernels and by torch, on the same pages."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.gpu.record import PartRun, spread
from bench.gpu.timing import rotate, time_work

_NUM_HEADS, _NUM_KV_HEADS, _HEAD_DIM, _BLOCK_SIZE = 28, 4, 128, 16
"""Qwen2.5-7B."""
_NUM_LAYERS = 4
"""Pages of so many layers are gone through in turn: those of one could stay in the cache."""
_DECODES = ((1, 4096), (8, 1024), (8, 4096), (32, 4096), (8, 16384))
_PREFILLS = ((4096, 0), (512, 0), (512, 4096), (64, 4096))
_DRY_DECODES, _DRY_PREFILLS = ((2, 64),), ((32, 0), (16, 32))
_WORKSPACE_BYTES = 256 << 20
_LARGEST_ERROR = 0.02
"""Of bfloat16 against torch in the same type, relative to the norm."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One launch: `num_sequences` chunks of `chunk` tokens, each after `start` tokens."""

    num_sequences: int
    chunk: int
    start: int

    @property
    def label(self) -> str:
        if self.chunk == 1:
            return f"decode {self.num_sequences}, at {self.start}"
        return f"prefill {self.chunk}, at {self.start}"

    @property
    def context(self) -> int:
        return self.start + self.chunk

    def num_bytes(self) -> int:
        """Keys and values that have to be read, in bfloat16."""
        return 2 * 2 * self.num_sequences * self.context * _NUM_KV_HEADS * _HEAD_DIM


class Pages:
    """Random pages of some layers, and a query."""

    def __init__(self, problem: Problem, device: torch.device, dtype: torch.dtype) -> None:
        per_sequence = -(-problem.context // _BLOCK_SIZE)
        num_blocks = per_sequence * problem.num_sequences
        shape = (num_blocks, _NUM_LAYERS, 2, _NUM_KV_HEADS, _BLOCK_SIZE, _HEAD_DIM)
        self.problem = problem
        self.pool = torch.randn(shape, device=device).to(dtype)
        self.query = torch.randn(problem.num_sequences * problem.chunk, _NUM_HEADS, _HEAD_DIM, device=device).to(dtype)
        self.out = torch.empty_like(self.query)
        blocks = torch.randperm(num_blocks, device=device, dtype=torch.int64).to(torch.int32)
        self.tables = blocks.view(problem.num_sequences, per_sequence)
        counts = torch.arange(problem.num_sequences + 1, device=device, dtype=torch.int32)
        self.query_starts = counts * problem.chunk
        self.page_starts = counts * per_sequence
        self.lengths = torch.full((problem.num_sequences,), problem.context, device=device, dtype=torch.int32)
        last = problem.context - (per_sequence - 1) * _BLOCK_SIZE
        self.last_page_lengths = torch.full_like(self.lengths, last)

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values `[num_blocks, num_kv_heads, block_size, head_dim]`."""
        return self.pool[:, index, 0], self.pool[:, index, 1]


def run(part: PartRun) -> None:
    with _interpreted() if part.dry_run else contextlib.nullcontext():
        rows = _rows(part)
    from bench.gpu.plots import draw_attention  # noqa: PLC0415 - matplotlib may be missing

    draw_attention(rows, part.png("attention"))


def _interpreted() -> contextlib.AbstractContextManager[None]:
    """While it is open, Triton kernels run on the CPU, slowly."""
    from tests.kernels.interpreter import interpreted  # noqa: PLC0415 - for a dry run only

    return interpreted()


def _rows(part: PartRun) -> list[dict[str, Any]]:
    device = torch.device("cpu" if part.dry_run else "cuda")
    dtype = torch.float32 if part.dry_run else torch.bfloat16
    num_units = 1 if part.dry_run else torch.cuda.get_device_properties(device).multi_processor_count
    decodes, prefills = (_DRY_DECODES, _DRY_PREFILLS) if part.dry_run else (_DECODES, _PREFILLS)
    problems = [Problem(batch, 1, context - 1) for batch, context in decodes]
    problems += [Problem(1, chunk, start) for chunk, start in prefills]
    part.put("planned", [Problem(b, 1, c - 1).label for b, c in _DECODES] + [Problem(1, *p).label for p in _PREFILLS])
    rows: list[dict[str, Any]] = []
    # One backend after the other: one that compiles for minutes must not keep the others from being measured.
    for backend, make in backends(part, num_units).items():
        for problem in problems:
            pages = Pages(problem, device, dtype)
            rows.append(_measure(backend, make, pages, dry_run=part.dry_run))
            part.say(str(rows[-1]))
            part.put("rows", rows)
    return rows


def backends(part: PartRun, num_units: int) -> dict[str, Callable[[Pages], Sequence[Callable[[], object]]]]:
    """By name what makes a launch for each layer."""
    layers = range(_NUM_LAYERS)
    found: dict[str, Callable[[Pages], Sequence[Callable[[], object]]]] = {
        "torch": lambda pages: [_torch(pages, layer) for layer in layers]
    }
    if importlib.util.find_spec("triton") is not None:
        found["triton"] = lambda pages: [_triton(pages, layer, num_units) for layer in layers]
    if not part.dry_run and importlib.util.find_spec("flashinfer") is not None:
        found["flashinfer"] = _flashinfer
    part.put("backends", list(found))
    return found


def _measure(
    backend: str, make: Callable[[Pages], Sequence[Callable[[], object]]], pages: Pages, *, dry_run: bool
) -> dict[str, Any]:
    problem = pages.problem
    row: dict[str, Any] = {"case": problem.label, "backend": backend}
    try:
        works = make(pages)
        found = works[0]()
        expected = _torch(pages, 0)().reshape(pages.query.shape)
        out = (found if isinstance(found, Tensor) else pages.out).reshape(expected.shape)
        error = float((out.double() - expected.double()).norm() / expected.double().norm())
        runs = {"min_runs": 1, "max_runs": 1, "warm_up": 0} if dry_run else {"max_runs": 60}
        times_ms = time_work(rotate(works), pages.query.device, limit_s=0.5, **runs)
    except Exception as failure:  # noqa: BLE001 - one backend that cannot do a shape is a result, too
        return row | {"failed": f"{type(failure).__name__}: {failure}"[:500]}
    median_s = statistics.median(times_ms) / 1e3
    row |= {"ms": spread(times_ms, 5), "relative_error": error, "agrees": error <= _LARGEST_ERROR}
    return row | {"kv_bytes_per_s": round(problem.num_bytes() / median_s)}


def _torch(pages: Pages, layer: int) -> Callable[[], Tensor]:
    """torch's own attention on dense copies of the pages, which are made beforehand: a bound for what it can do."""
    problem, (keys, values) = pages.problem, pages.layer(layer)
    dense = [
        page[pages.tables.long()].transpose(2, 3).reshape(problem.num_sequences, -1, _NUM_KV_HEADS, _HEAD_DIM)
        for page in (keys, values)
    ]
    k, v = (tensor[:, : problem.context].transpose(1, 2) for tensor in dense)
    q = pages.query.view(problem.num_sequences, problem.chunk, _NUM_HEADS, _HEAD_DIM).transpose(1, 2)
    is_causal = problem.chunk > 1 and problem.start == 0
    mask = None
    if problem.chunk > 1 and problem.start:
        rows = torch.arange(problem.start, problem.context, device=q.device)
        mask = rows[:, None] >= torch.arange(problem.context, device=q.device)[None, :]

    def work() -> Tensor:
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=True
        )
        return out.transpose(1, 2)

    return work


def _triton(pages: Pages, layer: int, num_units: int) -> Callable[[], None]:
    from agentserve_kernels.attention import DecodeScratch  # noqa: PLC0415 - needs Triton
    from agentserve_kernels.decode import paged_decode, scratch_rows  # noqa: PLC0415
    from agentserve_kernels.prefill import paged_prefill  # noqa: PLC0415
    from agentserve_kernels.tuning import device_capability  # noqa: PLC0415

    problem, (keys, values) = pages.problem, pages.layer(layer)
    device, dtype = pages.query.device, pages.query.dtype
    scale = _HEAD_DIM**-0.5
    if problem.chunk > 1:
        scratch = DecodeScratch(64 * problem.chunk * _NUM_HEADS if problem.chunk < 512 else 0, _HEAD_DIM, device=device)

        def prefill() -> None:
            paged_prefill(
                pages.query, keys, values, pages.out, pages.query_starts, pages.lengths, pages.tables, scratch,
                scale=scale, num_units=num_units, max_context=problem.context,
            )  # fmt: skip

        return prefill
    num_rows = scratch_rows(
        problem.num_sequences, _NUM_HEADS, _NUM_KV_HEADS, _HEAD_DIM, problem.context, num_units,
        dtype=dtype, capability=device_capability(device),
    )  # fmt: skip
    scratch = DecodeScratch(num_rows, _HEAD_DIM, device=device)

    def decode() -> None:
        paged_decode(
            pages.query, keys, values, pages.out, pages.lengths, pages.tables, scratch,
            scale=scale, num_units=num_units, max_context=problem.context,
        )  # fmt: skip

    return decode


def _flashinfer(pages: Pages) -> list[Callable[[], Tensor]]:
    return list(_flashinfer_layers(pages))


def _flashinfer_layers(pages: Pages) -> Iterator[Callable[[], Tensor]]:
    import flashinfer  # noqa: PLC0415 - is seldom installed

    problem, device, dtype = pages.problem, pages.query.device, pages.query.dtype
    workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    indices = pages.tables.reshape(-1)
    if problem.chunk == 1:
        wrapper: Any = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "HND", use_tensor_cores=True, backend="fa2"
        )
        wrapper.plan(
            pages.page_starts, indices, pages.last_page_lengths, _NUM_HEADS, _NUM_KV_HEADS, _HEAD_DIM, _BLOCK_SIZE,
            q_data_type=dtype, kv_data_type=dtype,
        )  # fmt: skip
    else:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND", backend="fa2")
        wrapper.plan(
            pages.query_starts, pages.page_starts, indices, pages.last_page_lengths, _NUM_HEADS, _NUM_KV_HEADS,
            _HEAD_DIM, _BLOCK_SIZE, causal=True, q_data_type=dtype, kv_data_type=dtype,
        )  # fmt: skip
    for layer in range(_NUM_LAYERS):
        cache = pages.layer(layer)
        yield functools.partial(wrapper.run, pages.query, cache)
