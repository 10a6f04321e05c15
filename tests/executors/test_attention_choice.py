"""Which attention runs where, and what is said about it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from agentserve.errors import ConfigError
from agentserve.executors.pytorch.attention.choice import AttentionFacts, choose_attention, read_facts
from agentserve.executors.pytorch.attention.paged_kernels import AttentionShape
from agentserve.executors.pytorch.devices.cpu import CpuDevice
from agentserve.executors.pytorch.executor import TorchExecutor
from tests.contract.harness import TickingClock
from tests.executors.builders import tiny_llama

QWEN = AttentionShape(28, 4, 128, 16, torch.bfloat16)
H200 = AttentionFacts("cuda", (9, 0), QWEN, "3.6.0", False, "0.6.13", True)
CPU = AttentionFacts("cpu", None, QWEN, "3.6.0", False, None, False)
PLAIN_CPU = replace(CPU, native_obstacle="no C++ compiler (g++)")


@pytest.mark.parametrize(
    ("facts", "name", "reason"),
    [
        (CPU, "native", "native attention"),
        (PLAIN_CPU, "mirror", "over dense mirrors (not native: no C++ compiler (g++))"),
        (H200, "flashinfer", "flashinfer attention"),
        (replace(H200, flashinfer_version=None), "triton", "not flashinfer: FlashInfer is not installed"),
        (replace(H200, triton_version=None), "flashinfer", "(layers are not fused: Triton is not installed)"),
        (replace(H200, flashinfer_version="0.5.3"), "triton", "FlashInfer 0.5.3 is older than 0.6"),
        (replace(H200, can_build_flashinfer=False), "triton", "a CUDA compiler, or modules"),
        (replace(H200, shape=replace(QWEN, dtype=torch.float32)), "triton", "does not compute in float32"),
        (replace(H200, shape=replace(QWEN, head_dim=80)), "triton", "no kernel for heads of 80"),
        (replace(H200, shape=replace(QWEN, head_dim=24)), "torch", "not triton: no kernel for heads of 24"),
        (replace(H200, compute_capability=(7, 5)), "torch", "compute capability 7.5 is below 8.0"),
        (
            replace(H200, flashinfer_version=None, triton_version=None),
            "torch",
            "(which is slow; not flashinfer: FlashInfer is not installed; not triton: Triton is not installed)",
        ),
    ],
)
def test_auto(facts, name, reason):
    choice = choose_attention("auto", facts)
    assert choice.name == name
    assert reason in choice.reason


@pytest.mark.parametrize(
    ("wanted", "facts", "message"),
    [
        ("mirror", H200, "mirrors are for CPUs"),
        ("native", PLAIN_CPU, r"native attention does not run here: no C\+\+ compiler"),
        ("triton", CPU, "Triton needs a GPU"),
        ("flashinfer", replace(CPU, flashinfer_version="0.6.13"), "FlashInfer needs a GPU"),
        ("triton", replace(H200, shape=replace(QWEN, block_size=4)), "no kernel for blocks of 4 tokens"),
        ("paged", H200, "there is no attention 'paged', only auto, native, mirror, flashinfer, triton, torch"),
    ],
)
def test_what_is_asked_for_by_name_is_never_replaced(wanted, facts, message):
    with pytest.raises(ConfigError, match=message):
        choose_attention(wanted, facts)


@pytest.mark.parametrize(
    ("wanted", "facts"),
    [("torch", CPU), ("torch", H200), ("triton", H200), ("flashinfer", H200), ("mirror", CPU), ("native", CPU)],
)
def test_what_is_asked_for_by_name_runs_if_it_can(wanted, facts):
    choice = choose_attention(wanted, facts)
    assert choice.name == wanted and "asked for" in choice.reason


def test_rotation_is_fused_where_our_kernels_run():
    assert choose_attention("auto", H200).is_fused
    assert choose_attention("triton", H200).is_fused
    assert not choose_attention("torch", H200).is_fused
    assert not choose_attention("auto", replace(H200, triton_version=None)).is_fused
    assert choose_attention("auto", CPU).is_fused
    assert not choose_attention("auto", PLAIN_CPU).is_fused


def test_interpreted_kernels_run_on_a_cpu():
    assert choose_attention("triton", replace(CPU, is_interpreted=True)).name == "triton"
    assert choose_attention("auto", replace(PLAIN_CPU, is_interpreted=True)).name == "mirror"


def test_the_facts_of_a_cpu():
    facts = read_facts(torch.device("cpu"), QWEN)
    assert (facts.device_type, facts.compute_capability, facts.shape) == ("cpu", None, QWEN)
    assert choose_attention("auto", facts).name == ("native" if facts.native_obstacle is None else "mirror")


@pytest.mark.parametrize(
    ("shape", "obstacle"),
    [
        (replace(QWEN, dtype=torch.float32), "the C++ kernels do not compute in float32"),
        (replace(QWEN, head_dim=80), "no C++ kernel for heads of 80"),
        (replace(QWEN, block_size=8), "no C++ kernel for blocks of 8 tokens"),
        (replace(QWEN, num_heads=68), "more than 16 query heads share keys"),
    ],
)
def test_what_the_cpp_kernels_cannot_do(shape, obstacle):
    """Found out before anything is compiled."""
    assert read_facts(torch.device("cpu"), shape).native_obstacle == obstacle


def test_the_executor_says_what_it_chose(caplog):
    caplog.set_level("INFO")
    executor = TorchExecutor(
        tiny_llama(), CpuDevice(), num_blocks=4, block_size=4, max_num_seqs=2, clock=TickingClock(), attention="torch"
    )
    executor.close()
    assert executor.attention.name == "torch"
    assert executor.attention.reason in caplog.text
