"""What is decided about a GPU before one is touched; the rest of `build/cuda.py` needs one (tests marked gpu)."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from agentserve.build.control import control_config
from agentserve.build.cuda import build_cuda_executor, slot_mode
from agentserve.build.parts import choose
from agentserve.config import ServeConfig
from agentserve.core.batch import Batch, BatchOutput, Lane
from agentserve.core.executor import Capabilities
from agentserve.core.slots import build_partition_table
from agentserve.errors import ConfigError
from agentserve.executors.pytorch.devices.cpu import CpuDevice, CpuSlot
from agentserve.executors.pytorch.devices.cuda_driver import driver_library
from agentserve.executors.pytorch.devices.cuda_runtime import cuda_obstacle
from agentserve.executors.pytorch.warmup import compile_prefill, hold_activations
from agentserve.models.loader import load_model
from agentserve.models.registry import ModelSource, resolve_model
from tests.core.builders import simulated
from tests.executors.builders import TINY

NO_GPU = pytest.mark.skipif(driver_library() is not None, reason="this machine has an NVIDIA driver")


@NO_GPU
def test_without_a_driver_there_is_a_sentence() -> None:
    with pytest.raises(ConfigError, match=r"cannot serve qwen2.5-7b on the GPU: there is no NVIDIA driver"):
        choose(ServeConfig(model="qwen2.5-7b", executor="cuda"))
    with pytest.raises(ConfigError, match=r"--slots green needs a GPU"):
        choose(ServeConfig(model="smollm2-135m", slots="green"))


@NO_GPU
def test_a_build_that_fails_says_why() -> None:
    with pytest.raises(ConfigError, match="no GPU to compute on"):
        build_cuda_executor(ServeConfig(executor="cuda"), resolve_model("smollm2-135m"), print)


@pytest.mark.parametrize(
    ("options", "mode"),
    [
        ({}, "auto"),
        ({"slots": "green"}, "green"),
        ({"slots": "cap"}, "auto"),
        ({"slots": "stream"}, "stream"),
        ({"slots": "off"}, "stream"),
        # Nobody would use them.
        ({"scheduler": "chunked"}, "stream"),
    ],
)
def test_green_contexts_are_made_only_for_who_uses_them(options: dict[str, str], mode: str) -> None:
    assert slot_mode(ServeConfig(**options)) == mode


def test_green_means_the_whole_table_to_a_controller() -> None:
    assert control_config(ServeConfig(slots="green")) == control_config(ServeConfig())


class CountingDevice(CpuDevice):
    def __init__(self) -> None:
        super().__init__()
        self.used: list[tuple[Lane, int]] = []

    def slot(self, lane: Lane, units: int) -> CpuSlot:
        self.used.append((lane, units))
        return super().slot(lane, units)


def test_the_largest_batch_runs_once_in_every_slot_of_the_table() -> None:
    device = CountingDevice()
    try:
        units = device.compute_units
        table = build_partition_table(units, 1, 1)
        source = ModelSource("tiny", None, None, replace(TINY, max_position_embeddings=64))
        model = load_model(source, load_format="dummy")
        sizes: list[int] = []
        forward = model.forward

        def counted(token_ids: torch.Tensor, *rest: object) -> torch.Tensor:
            sizes.append(len(token_ids))
            return forward(token_ids, *rest)  # type: ignore[arg-type]

        model.forward = counted  # type: ignore[method-assign]
        hold_activations(model, device, table, max_num_batched_tokens=100, max_num_seqs=4)
    finally:
        device.close()
    assert sorted(device.used) == sorted({(lane, e.units(lane)) for e in table.entries for lane in Lane})
    assert sizes == [64] * len(device.used)  # the window of the model is less than the batch


def test_a_prompt_of_each_size_runs_before_the_first_one_comes() -> None:
    executor = simulated(num_blocks=8, block_size=4)
    chunks: list[tuple[int, int]] = []
    submit, poll = executor.submit, executor.poll

    class Recording:
        def capabilities(self) -> Capabilities:
            return executor.capabilities()

        def on_completion(self, wake: Callable[[], None]) -> None:
            wake()

        def submit(self, batch: Batch, now_ns: int) -> None:
            chunks.extend((chunk.start, chunk.num_tokens) for chunk in batch.chunks)
            submit(batch, now_ns)

        def poll(self, now_ns: int) -> list[BatchOutput]:
            return poll(10**12)

    compile_prefill(Recording(), build_partition_table(8, 1, 1), (2, 16, 100), max_model_len=64)  # type: ignore[arg-type]
    # Each from the beginning and behind the longest prefix; no more than the 32 tokens that the pool holds.
    assert chunks == [(0, 2), (30, 2), (0, 16), (16, 16), (0, 32)]


def test_workspaces_of_cublas_go_to_who_comes_after(monkeypatch: pytest.MonkeyPatch) -> None:
    """They belong to a thread and a stream: those that are made by the first walk are given to the lanes."""
    device = CountingDevice()
    calls: list[str] = []
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: calls.append("cleared"), raising=False)
    try:
        table = build_partition_table(device.compute_units, 1, 1)
        model = load_model(ModelSource("tiny", None, None, TINY), load_format="dummy")
        hold_activations(model, device, table, max_num_batched_tokens=4, max_num_seqs=2)
        assert calls == []  # a CPU has none
        device.torch_device = torch.device("cuda")
        monkeypatch.setattr("agentserve.executors.pytorch.warmup._largest", lambda *_: lambda: calls.append("ran"))
        hold_activations(model, device, table, max_num_batched_tokens=4, max_num_seqs=2)
    finally:
        device.close()
    assert calls.pop() == "cleared" and set(calls) == {"ran"}


def test_hardware_queues_are_asked_for_before_the_gpu_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    seen: list[str | None] = []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(
        torch.cuda, "is_available", lambda: bool(seen.append(os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS")))
    )
    assert "torch sees no GPU" in str(cuda_obstacle())
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # somebody has chosen
    cuda_obstacle()
    assert seen == ["32", "1"]
