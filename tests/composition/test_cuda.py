"""What is decided about a GPU before one is touched; the rest of `build/cuda.py` needs one (tests marked gpu)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from agentserve.build.control import control_config
from agentserve.build.cuda import build_cuda_executor, slot_mode
from agentserve.build.parts import choose, has_driver
from agentserve.config import ServeConfig
from agentserve.core.batch import Batch, BatchOutput, Lane
from agentserve.core.executor import Capabilities
from agentserve.core.slots import build_partition_table
from agentserve.errors import ConfigError
from agentserve.executors.pytorch.devices.cpu import CpuDevice, CpuSlot
from agentserve.executors.pytorch.warmup import compile_prefill, hold_activations
from agentserve.models.loader import load_model
from agentserve.models.registry import ModelSource, resolve_model
from tests.core.builders import simulated
from tests.executors.builders import TINY

NO_GPU = pytest.mark.skipif(has_driver(), reason="this machine has an NVIDIA driver")


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
    sizes: list[int] = []
    submit, poll = executor.submit, executor.poll

    class Recording:
        def capabilities(self) -> Capabilities:
            return executor.capabilities()

        def on_completion(self, wake: Callable[[], None]) -> None:
            wake()

        def submit(self, batch: Batch, now_ns: int) -> None:
            sizes.append(batch.num_tokens)
            submit(batch, now_ns)

        def poll(self, now_ns: int) -> list[BatchOutput]:
            return poll(10**12)

    compile_prefill(Recording(), build_partition_table(8, 1, 1), (2, 16, 100))  # type: ignore[arg-type]
    assert sizes == [2, 16, 32]  # no more than the pool holds
