"""What a GPU does once before it serves: take the memory that batches will need, and show how fast it is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from agentserve.core.batch import Batch, Lane, ScheduledChunk
from agentserve.core.executor import Executor
from agentserve.core.request import WorkClass
from agentserve.core.slots import PartitionTable
from agentserve.errors import EngineError
from agentserve.executors.pytorch.devices.interface import Device
from agentserve.models.interface import DecoderModel

_COPY_BYTES = 1 << 30
_MATRIX_SIZE = 4096
_REPEATS = 10


class _NoAttention:
    """Attention of nothing: queries pass through. The memory of real attention is preallocated by its backend."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # noqa: ARG002
        return query.reshape(query.shape[0], -1)


def hold_activations(
    model: DecoderModel, device: Device, table: PartitionTable, *, max_num_batched_tokens: int, max_num_seqs: int
) -> None:
    """Runs the largest batch that can come in every slot that it can come to.

    torch's allocator keeps what each stream has used, so that afterwards the free memory of the device is what is left
    for good: a daemon that starts has the memory that it will need. Call it before the KV pool is made.

    Raises what torch raises when even this does not fit.
    """
    num_rows = min(max_num_seqs, max_num_batched_tokens)
    for lane, units in dict.fromkeys((lane, entry.units(lane)) for entry in table.entries for lane in Lane):
        slot = device.slot(lane, units)
        slot.run(_largest(model, device.torch_device, max_num_batched_tokens, num_rows))
    device.synchronize()
    if device.torch_device.type == "cuda":
        # cuBLAS has a workspace for each thread and stream. Those of this thread go back to the pools of their streams,
        # where the threads of the lanes will find them.
        torch._C._cuda_clearCublasWorkspaces()


def _largest(model: DecoderModel, torch_device: torch.device, num_tokens: int, num_rows: int) -> Callable[[], None]:
    num_tokens = min(num_tokens, model.config.max_position_embeddings)

    def work() -> None:
        with torch.inference_mode():
            token_ids = torch.zeros(num_tokens, dtype=torch.int64, device=torch_device)
            positions = torch.arange(num_tokens, device=torch_device)
            hidden = model.forward(token_ids, positions, _NoAttention())
            model.logits(hidden[:num_rows])

    return work


def measure_rates(torch_device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes per second of a large copy (read and written bytes), and operations per second of a large matrix product.

    A second or less; where the fit of an unknown GPU starts. The memory for it is given back to the device, together
    with what else torch keeps for later: what loading has left, above all.
    """
    free_bytes, _ = torch.cuda.mem_get_info(torch_device)
    rates = (
        _copy_rate(torch_device, min(_COPY_BYTES, free_bytes // 4)),  # two tensors, beside large weights
        _product_rate(torch_device, dtype),
    )
    torch.cuda.empty_cache()
    return rates


def _copy_rate(torch_device: torch.device, num_bytes: int) -> float:
    source = torch.empty(num_bytes, dtype=torch.int8, device=torch_device)
    target = torch.empty_like(source)
    return 2 * num_bytes / _seconds(lambda: target.copy_(source))


def _product_rate(torch_device: torch.device, dtype: torch.dtype) -> float:
    a = torch.randn(_MATRIX_SIZE, _MATRIX_SIZE, dtype=dtype, device=torch_device)
    return 2 * _MATRIX_SIZE**3 / _seconds(lambda: a @ a)


def _seconds(work: Callable[[], Tensor]) -> float:
    """Seconds that `work` takes on the GPU: the mean of some, after one that is not counted."""
    work()
    event: Any = torch.cuda.Event  # has no types
    start, end = event(enable_timing=True), event(enable_timing=True)
    start.record()
    for _ in range(_REPEATS):
        work()
    end.record()
    end.synchronize()
    elapsed_ms: float = start.elapsed_time(end)
    return elapsed_ms / 1e3 / _REPEATS


def compile_prefill(executor: Executor, table: PartitionTable, sizes: Sequence[int], *, max_model_len: int) -> None:
    """Runs a prompt of each of these sizes, so that kernels are compiled before the first one comes.

    Each size once from the beginning and once behind the longest prefix there may be: short chunks behind long prefixes
    split the context, which is another kernel. Compilers make a kernel when it is used first; a prompt that waited for
    that would wait for seconds. The blocks that are written are free and stay so.

    Raises EngineError if a batch fails.
    """
    capabilities = executor.capabilities()
    block_size = capabilities.block_size
    limit = min(max_model_len, capabilities.num_blocks * block_size)
    finished = threading.Event()
    executor.on_completion(finished.set)
    chunks = dict.fromkeys((start, min(size, limit)) for size in sizes for start in (0, max(0, limit - size)))
    for number, (start, num_tokens) in enumerate(chunks):
        blocks = tuple(range(-(-(start + num_tokens) // block_size)))
        chunk = ScheduledChunk(f"warm-up-{number}", WorkClass.COLD_PREFILL, start, (0,) * num_tokens, blocks, None)
        executor.submit(Batch(number, Lane.PREFILL, table.whole, False, (chunk,)), 0)
        while not (outputs := executor.poll(0)):
            finished.wait()
            finished.clear()
        if outputs[0].error is not None:
            raise EngineError(f"a chunk of {num_tokens} tokens cannot be computed: {outputs[0].error}")
