"""The executor on a GPU against transformers: every partition, with graphs and without, both lanes busy, every dtype.

The same walk runs over the CPU device, pages and look-ahead included: that shows that the tests are right before there
is a GPU to run them on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from agentserve.core.batch import PENDING_TOKEN, Lane
from agentserve.core.slots import PartitionTable, SlotPartition, build_partition_table
from agentserve.executors.pytorch.devices.cpu import CpuDevice
from agentserve.executors.pytorch.devices.cuda import CudaDevice
from agentserve.executors.pytorch.devices.cuda_runtime import cuda_obstacle
from agentserve.executors.pytorch.devices.graphs import DecodeGraphs
from agentserve.executors.pytorch.devices.interface import Device
from agentserve.executors.pytorch.executor import TorchExecutor
from agentserve.models.interface import DecoderModel
from agentserve.models.loader import load_model
from agentserve.models.registry import resolve_model
from agentserve_kernels.native.compiler import find
from agentserve_kernels.native.library import cpu_obstacle
from tests.contract.harness import Harness, TickingClock, chunk, greedy, spec
from tests.models.builders import reference_logits, save_tiny_model

_OBSTACLE = cuda_obstacle()
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(_OBSTACLE is not None, reason=str(_OBSTACLE))]
PLACES = ["cpu", pytest.param("cuda", marks=ON_GPU)]
_NO_AMX = cpu_obstacle() or (None if find() else "no C++ compiler")
NATIVE = pytest.param("native", torch.bfloat16, marks=pytest.mark.skipif(_NO_AMX is not None, reason=str(_NO_AMX)))
"""The CPU with our C++ kernels."""
BLOCK_SIZE, NUM_TOKENS = 16, 10
PROMPTS = {
    "a": [5, 9, 23, 42, 77],
    "b": [(7 * i) % 150 + 3 for i in range(37)],
    "c": [(11 * i) % 140 + 4 for i in range(64)],
}
BLOCKS = {name: tuple(range(8 * i, 8 * i + 8)) for i, name in enumerate(PROMPTS)}
FILLER, FILLER_BLOCKS = [(3 * i) % 150 for i in range(96)], tuple(range(40, 48))
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
MAX_ERROR_FLOAT32 = 1e-4
"""Root mean square of the difference of logits over that of the reference."""
MAX_TIMES_TRANSFORMERS = 1.5
"""In half precision the error may be so many times that of transformers in the same one: what these weights, eight
times as large as usual so that mistakes show, make of rounding is theirs as much as ours."""


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Random weights with heads of 64, the smallest that there are kernels for; transformers' model of them."""
    directory = tmp_path_factory.mktemp(request.param)
    overrides = {"head_dim": 64} if request.param == "qwen3" else {}
    return directory, save_tiny_model(directory, request.param, hidden_size=256, intermediate_size=320, **overrides)


@pytest.fixture(scope="module")
def expected(saved: tuple[Path, Any]) -> dict[str, list[int]]:
    """What transformers decodes greedily."""
    found: dict[str, list[int]] = {}
    for name, prompt in PROMPTS.items():
        tokens = list(prompt)
        for _ in range(NUM_TOKENS):
            tokens.append(int(reference_logits(saved[1], tokens)[-1].argmax()))
        found[name] = tokens[len(prompt) :]
    return found


def table_of(device: Device) -> PartitionTable:
    return build_partition_table(
        device.compute_units, device.unit_granularity, device.min_units, unused_units=device.unused_units
    )


@contextmanager
def opened(place: str, model: DecoderModel, *, graphs: bool = False) -> Iterator[tuple[Harness, Device]]:
    """An executor with two batches in flight in each lane."""
    device: Any = CudaDevice() if place == "cuda" else CpuDevice()

    def make_graphs(step: Any, buckets: tuple[int, ...]) -> DecodeGraphs:
        return DecodeGraphs(step, buckets=buckets, max_graphs=256, max_bytes=4 << 30)

    clock = TickingClock()
    executor = TorchExecutor(
        model,
        device,
        num_blocks=64,
        block_size=BLOCK_SIZE,
        max_num_seqs=4,
        clock=clock,
        attention={"cpu": "torch", "native": "native", "cuda": "auto"}[place],
        lookahead=2,
        make_graphs=make_graphs if graphs else None,
    )
    try:
        yield Harness(executor, clock), device
    finally:
        executor.close()


def generate(harness: Harness, partition: SlotPartition) -> dict[str, list[int]]:
    """Prompts in one lane, then decodes in the other, two in flight, beside prompts that nobody waits for."""
    found: dict[str, list[int]] = {}
    for name, prompt in PROMPTS.items():
        first = chunk(name, prompt, BLOCKS[name], sample=spec(greedy()), block_size=BLOCK_SIZE)
        output = harness.run(harness.batch([first], Lane.PREFILL, partition=partition))
        assert output.error is None
        found[name] = [output.samples[0].token_id]
    num_submitted, num_decoded, num_fillers = 1, 1, 0
    while num_decoded < NUM_TOKENS or num_fillers:
        while num_submitted < NUM_TOKENS and num_submitted < num_decoded + 2:
            chunks = [
                chunk(
                    name,
                    found[name][:1] if num_submitted == 1 else [PENDING_TOKEN],
                    BLOCKS[name],
                    start=len(prompt) + num_submitted - 1,
                    sample=spec(greedy(), num_submitted),
                    block_size=BLOCK_SIZE,
                )
                for name, prompt in PROMPTS.items()
            ]
            harness.submit(harness.batch(chunks, partition=partition, co_running=True))
            num_submitted += 1
        if not num_fillers and num_decoded < NUM_TOKENS:
            filler = chunk("filler", FILLER, FILLER_BLOCKS, block_size=BLOCK_SIZE)
            harness.submit(harness.batch([filler], Lane.PREFILL, partition=partition, co_running=True))
            num_fillers += 1
        for output in harness.collect_some():
            assert output.error is None
            num_decoded += output.lane is Lane.DECODE
            num_fillers -= output.lane is Lane.PREFILL
            for sample in output.samples:
                found[sample.request_id].append(sample.token_id)
    return found


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_greedy_tokens_in_float32_are_those_of_transformers(
    saved: tuple[Path, Any], expected: dict[str, list[int]], place: str, graphs: bool
) -> None:
    model = load_model(resolve_model(str(saved[0])), device=place)
    with opened(place, model, graphs=graphs) as (harness, device):
        table = table_of(device)
        if place == "cuda":
            slots = {entry.decode_units for entry in table.entries}
            harness.executor.prepare_graphs(device.slot(Lane.DECODE, units) for units in sorted(slots))
        for partition in table.entries:
            assert generate(harness, partition) == expected, partition.label


@pytest.mark.parametrize(
    ("place", "dtype"),
    [*(pytest.param("cuda", dtype, marks=ON_GPU) for dtype in DTYPES), *(("cpu", dtype) for dtype in DTYPES), NATIVE],
    ids=str,
)
def test_logits_are_those_of_transformers(saved: tuple[Path, Any], place: str, dtype: torch.dtype) -> None:
    """Of a prompt, a chunk that resumes behind cached blocks, and one token; against float32 on rounded weights."""
    directory, reference = saved
    torch_device = "cuda" if place == "cuda" else "cpu"
    model = load_model(resolve_model(str(directory)), device=torch_device, dtype=str(dtype).removeprefix("torch."))
    rounded = type(reference)(reference.config).eval()
    rounded.load_state_dict({name: value.to(dtype).float() for name, value in reference.state_dict().items()})
    tokens = PROMPTS["c"]
    wanted = reference_logits(rounded, tokens)
    found: list[torch.Tensor] = []
    with opened(place, model) as (harness, device):
        backend = harness.executor._backend
        carried = torch.zeros(4, dtype=torch.int64, device=torch_device)
        device.synchronize()

        def work() -> None:
            with torch.inference_mode():
                for start, end in ((0, 48), (48, 63), (63, 64)):
                    part = chunk("c", tokens[start:end], BLOCKS["c"], start=start, block_size=BLOCK_SIZE)
                    batch = backend.open(Lane.PREFILL, [part], [-1], device.compute_units)
                    hidden = model.forward(*batch.inputs(carried), batch.attention)
                    # A single token may come with rows of padding.
                    found.append(model.logits(hidden[: end - start]).cpu())
                    batch.close()

        device.slot(Lane.PREFILL, device.compute_units).run(work)
    limit = MAX_ERROR_FLOAT32
    if dtype is not torch.float32:
        limit = MAX_TIMES_TRANSFORMERS * relative_error(reference_logits(rounded.to(dtype), tokens).float(), wanted)
    assert relative_error(torch.cat(found), wanted) < limit


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())
