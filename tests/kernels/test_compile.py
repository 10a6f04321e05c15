"""The kernels compile for GPUs that are not there, and fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path

import pytest

from agentserve.models.aliases import ALIASES
from agentserve.models.config import ModelConfig


def compile_check(*options: str, out: Path) -> list[dict]:
    """Runs the check in a process of its own: it needs a Triton that is not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "agentserve_kernels.compile_check", "--json", str(out), *options]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(out.read_text(encoding="utf-8"))


@pytest.mark.parametrize("arch", [86, 90])
def test_everything_compiles_for_the_main_model(tmp_path: Path, arch: int) -> None:
    reports = compile_check("--model", "qwen2.5-7b", "--arch", str(arch), out=tmp_path / "reports.json")
    kernels = {report["kernel"] for report in reports}
    assert kernels == {"prefill", "merge", "decode", "rope", "rms_norm", "silu_mul", "copy", "chunk", "select"}
    for report in reports:
        assert report["shared_bytes"] <= report["shared_limit_bytes"], report
        # What a thread keeps outside its registers is outside the loops; more would not be.
        assert report["spill_bytes"] <= 512, report
    for report in reports:
        if report["kernel"] == "decode":
            # Two CTAs on a multiprocessor: of shared memory, and of 64 Ki registers.
            assert 2 * (report["shared_bytes"] + 1024) <= report["shared_limit_bytes"]
            assert 2 * report["registers"] * 32 * report["num_warps"] <= 65536


def test_attention_compiles_for_the_newest_architecture(tmp_path: Path) -> None:
    options = ("--model", "llama-3-8b", "--arch", "120", "--kernel", "split")
    (report,) = (report for report in compile_check(*options, out=tmp_path / "r.json") if report["kernel"] == "decode")
    assert report["arch"] == 120


def test_every_model_with_a_name_is_compiled_for() -> None:
    from agentserve_kernels.compile_check import SHAPES  # noqa: PLC0415 - imports Triton's compiler

    def shape_of(config: ModelConfig) -> tuple[int | bool, ...]:
        return (
            config.num_heads, config.num_kv_heads, config.head_dim, config.hidden_size, config.intermediate_size,
            config.num_layers, config.vocab_size, config.architecture == "qwen3",
        )  # fmt: skip

    assert {s.name: astuple(s)[1:] for s in SHAPES} == {name: shape_of(known.config) for name, known in ALIASES.items()}


def test_a_kernel_that_does_not_fit_is_reported() -> None:
    from agentserve_kernels.compile_check import Report  # noqa: PLC0415 - imports Triton's compiler

    def report(shared_bytes: int, registers: int) -> Report:
        return Report("m", "k", "", 86, 8, 3, registers, shared_bytes, 99 * 1024, 0)

    assert report(99 * 1024, 255).fits
    assert not report(99 * 1024 + 1, 255).fits
    assert not report(0, 257).fits  # 8 warps * 32 threads * 257 registers are more than there are
