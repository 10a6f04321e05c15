"""The parts of `scripts/gpu_check`: their sums on made-up numbers, their harness on the CPU."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from agentserve.build import model_shape
from agentserve.core.batch import Lane
from agentserve.core.costmodel import BatchShape, Sample
from agentserve.core.slots import PartitionKind, SlotPartition
from agentserve.executors.pytorch.devices.cpu import CpuDevice
from agentserve.executors.pytorch.devices.cuda import CudaDevice
from agentserve.executors.pytorch.executor import TorchExecutor
from agentserve.models.aliases import ALIASES
from agentserve.models.registry import resolve_model
from agentserve.runtime.calibration_grid import Limits, Load
from agentserve.runtime.live import MonotonicClock
from agentserve.text.tokenizer import load_tokenizer
from bench.gpu import daemon, device, plots, sanitizer, sharing, steps, tests
from bench.gpu.model import TINY, dummy_model, write_model
from bench.gpu.record import PartRun, spread
from bench.gpu.stepper import Stepper, idle_gaps, kernel_intervals
from bench.gpu.surroundings import ROOT
from bench.gpu.timing import rotate, time_work
from tests.executors.builders import tiny_llama
from tests.executors.fake_cuda import A5000, H200, RTX5090, FakeDriver
from tests.executors.fake_runtime import FakeRuntime

QWEN = model_shape(ALIASES["qwen2.5-7b"].config)


def part_run(directory: Path, **values: Any) -> PartRun:
    defaults: dict[str, Any] = {
        "name": "x",
        "scratch": directory,
        "deadline_s": time.monotonic() + 60,
        "model": "tiny",
        "load_format": "dummy",
        "shared": directory,
    }
    return PartRun(**{**defaults, **values})


# ---- sums ----


def test_floors_and_operations() -> None:
    # (14.2 GB of weights + 8 * 4096 tokens * 57,344 B) at 4 TB/s; 2 * 28 layers * 4 heads * 128 * 2 B = 57,344 B.
    assert QWEN.kv_bytes_per_token == 57_344
    expected_ms = (QWEN.weight_bytes + 8 * 4096 * 57_344) / 4e12 * 1e3
    assert steps.decode_floor_ms(QWEN, 8, 4096, 4e12) == pytest.approx(expected_ms)
    assert 14.0e9 < QWEN.weight_bytes < 14.3e9
    # Token i of a chunk of 2 after 10 sees 10 + i + 1 tokens: 11 + 12 = 23 pairs.
    attention = steps.prefill_flops(QWEN, 2, 10) - 4 * QWEN.num_linear_parameters
    assert attention == 23 * QWEN.attention_flops_per_pair


def test_gaps_are_where_nothing_runs(tmp_path: Path) -> None:
    assert idle_gaps([(0, 10), (4, 6), (12, 20), (19, 25), (30, 31)]) == [5, 2]
    assert idle_gaps([]) == []
    events = [
        {"cat": "kernel", "ts": 30.0, "dur": 2.0},
        {"cat": "cpu_op", "ts": 1.0, "dur": 90.0},
        {"cat": "gpu_memcpy", "ts": 10, "dur": 1},
        {"ph": "M", "name": "process_name"},
    ]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}), encoding="utf-8")
    assert kernel_intervals(path) == [(10.0, 11.0), (30.0, 32.0)]


def test_spread_and_timing() -> None:
    assert spread(range(11)) == {"median": 5, "p10": 1, "p90": 9, "num": 11}
    calls: list[str] = []
    work = rotate([lambda: calls.append("a"), lambda: calls.append("b")])
    times_ms = time_work(work, torch.device("cpu"), min_runs=4, max_runs=4)
    assert len(times_ms) == 4 and min(times_ms) >= 0.0
    assert calls == ["a", "b", "a", "b", "a", "b", "a"]  # three to warm up


def test_isolation_is_relative_to_the_step_alone() -> None:
    whole, split = SlotPartition(8, 8, PartitionKind.WHOLE), SlotPartition(4, 4, PartitionKind.SPLIT)
    decode, chunk = BatchShape(4, 400, num_samples=4), BatchShape().with_prefill(100)
    mixed = BatchShape(4, 400, num_samples=4).with_prefill(100)
    rows = sharing.isolation_rows(
        [
            Sample(decode, Lane.DECODE, whole, False, 2_000_000),
            Sample(chunk, Lane.PREFILL, whole, False, 10_000_000),
            Sample(decode, Lane.DECODE, split, True, 3_000_000),
            Sample(chunk, Lane.PREFILL, split, True, 20_000_000),
            Sample(mixed, Lane.DECODE, whole, False, 11_000_000),
        ]
    )
    assert rows == [
        {"how": "alone", "decode_step_ms": 2.0, "prefill_tokens_per_s": 10_000, "times_alone": 1.0},
        {"how": "split:4+4", "decode_step_ms": 3.0, "prefill_tokens_per_s": 5_000, "times_alone": 1.5},
        {"how": "in one batch", "decode_step_ms": 11.0, "prefill_tokens_per_s": 9_091, "times_alone": 5.5},
    ]


def test_every_beginning_of_the_scattered_cases_covers_all() -> None:
    whole = SlotPartition(2, 2, PartitionKind.WHOLE)
    cases = [sharing.Case(whole, decode=Load(index + 1)) for index in range(100)]
    scattered = list(sharing.scattered(cases))
    assert sorted(case.decode.num_decodes for case in scattered) == list(range(1, 101))
    first = sorted(case.decode.num_decodes for case in scattered[:20])
    assert max(after - before for before, after in zip([0, *first], [*first, 100], strict=True)) <= 15


# ---- the device ----


def test_known_cards_can_be_planned() -> None:
    plans = {facts.name: device.plan_of(facts) for facts in device.KNOWN_CARDS}
    assert {plan["mode"] for plan in plans.values()} == {"green"}
    assert "16 groups of 8 SMs" in plans["H200"]["plan"]
    assert "pairs" in plans["RTX 5090"]["plan"]


@pytest.mark.parametrize("gpu", [A5000, H200, RTX5090], ids=lambda gpu: gpu.name)
def test_the_report_of_a_device_can_be_written(gpu: Any) -> None:
    driver = FakeDriver(gpu)
    made = CudaDevice(runtime=FakeRuntime(gpu, driver))
    report = json.loads(json.dumps(device._report(made)))
    assert report["mode"] == "green" and report["facts"]["num_sms"] == gpu.num_sms
    assert report["num_slots"] == len(report["slots"]) > 10
    assert report["creation_ms_per_slot"] == pytest.approx(report["creation_ms"] / report["num_slots"])
    made.close()


# ---- tests and sanitizer ----


def test_files_with_gpu_tests_are_found(tmp_path: Path) -> None:
    for name, text in {
        "a/test_own.py": "@pytest.mark.gpu\ndef test_it(): ...",
        "a/test_other.py": "def test_it(): ...",
        "b/conftest.py": "marks=pytest.mark.gpu",
        "b/test_by_fixture.py": "def test_it(device): ...",
        "c/test_none.py": "",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    found = [str(path.relative_to(tmp_path)) for path in tests.gpu_test_files(tmp_path)]
    assert found == ["a/test_own.py", "b/test_by_fixture.py"]


def test_settings_of_missing_plugins_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    text = tests.ini(ROOT / "pyproject.toml")
    assert "asyncio_mode = auto" in text and "\n    gpu: needs" in text and "filterwarnings" not in text
    monkeypatch.setattr(tests, "missing", lambda modules: ["pytest_asyncio"])
    text = tests.ini(ROOT / "pyproject.toml")
    assert "asyncio" not in text and "timeout = " in text and "--strict-config" in text


def test_outcomes_are_read_as_far_as_they_were_written(tmp_path: Path) -> None:
    log = tmp_path / "outcomes.jsonl"
    entries = [
        {"test": "t::a", "when": "call", "outcome": "passed", "seconds": 0.5, "text": ""},
        {"test": "t::b", "when": "call", "outcome": "failed", "seconds": 2.0, "text": "E  assert 1 == 2"},
        {"test": "t::c", "when": "setup", "outcome": "skipped", "seconds": 0.0, "text": "no GPU"},
    ]
    log.write_text("".join(json.dumps(entry) + "\n" for entry in entries) + '{"test": "t::d", "wh', encoding="utf-8")
    summary = tests.summarize(tests.read_outcomes(log))
    assert summary["counts"] == {"passed": 1, "failed": 1, "skipped": 1}
    assert summary["failures"] == [{"test": "t::b", "when": "call", "text": "E  assert 1 == 2"}]
    assert summary["skips"] == {"no GPU": 1}
    assert list(summary["slowest"]) == ["t::b", "t::a", "t::c"]
    assert tests.read_outcomes(tmp_path / "none") == []


def test_pytest_is_run_and_its_outcomes_are_kept(tmp_path: Path) -> None:
    written = tmp_path / "test_planted.py"
    written.write_text(
        "import pytest\n@pytest.mark.gpu\ndef test_good(): ...\n@pytest.mark.gpu\ndef test_bad():\n    assert 1 == 2\n"
        "@pytest.mark.gpu\n@pytest.mark.skip(reason='not now')\ndef test_skipped(): ...\ndef test_unmarked(): ...\n",
        encoding="utf-8",
    )
    broken = tmp_path / "test_broken.py"
    broken.write_text("import there_is_no_such_module\n", encoding="utf-8")
    code, outcomes = tests.run_pytest(part_run(tmp_path), [written, broken], [], 60.0)
    assert code == 1
    summary = tests.summarize(outcomes)
    assert summary["counts"] == {"passed": 1, "failed": 2, "skipped": 1}
    texts = {failure["when"]: failure["text"] for failure in summary["failures"]}
    assert "assert 1 == 2" in texts["call"] and "there_is_no_such_module" in texts["collect"]


def test_errors_of_the_sanitizer_are_counted() -> None:
    finished = "========= ERROR SUMMARY: 2 errors\n========= ERROR SUMMARY: 0 errors\n"
    assert sanitizer.num_errors(finished) == 2
    assert sanitizer.num_errors("========= COMPUTE-SANITIZER\n========= Invalid __global__ read of size 4 bytes\n") == 1
    assert sanitizer.num_errors("========= COMPUTE-SANITIZER\n") == 0
    assert sanitizer.num_errors("") is None


# ---- model, steps, daemons ----


def test_the_dummy_model_is_the_published_one(tmp_path: Path) -> None:
    source = resolve_model(str(dummy_model(tmp_path, "qwen2.5-7b")))
    published = ALIASES["qwen2.5-7b"].config
    assert source.name == "qwen2.5-7b" and source.config is not None
    assert model_shape(source.config) == model_shape(published)
    tokenizer = load_tokenizer(source)
    assert tokenizer.vocab_size == published.vocab_size == 152_064
    # Whatever random weights say is the same tokens when it comes back.
    token_ids = [1000, 77_777, 152_000, 300]
    assert tokenizer.encode(tokenizer.decode(token_ids)) == token_ids


def test_steps_are_timed_one_by_one_and_two_at_a_time() -> None:
    executor = TorchExecutor(
        tiny_llama(), CpuDevice(), num_blocks=64, block_size=4, max_num_seqs=4, clock=MonotonicClock(), lookahead=2
    )
    limits = Limits(num_blocks=64, block_size=4, max_model_len=128, max_num_seqs=4)
    target: Any = SimpleNamespace(executor=executor, limits=limits)
    try:
        stepper = Stepper(target)
        assert stepper.fill(1000) == 32 * 4  # half of the pool
        assert stepper.fits(Load(2, 32)) and not stepper.fits(Load(5, 32)) and not stepper.fits(Load(1, 128))
        for depth in (1, 2):
            # More steps than a sequence has before it starts again.
            found = stepper.run(Load(2, 32), 60, depth=depth)
            assert len(found) >= 60 and all(step.duration_ns > 0 for step in found)
            periods = [step.period_ns for step in found if step.period_ns is not None]
            assert 50 <= len(periods) < len(found) and min(periods) > 0
        assert len(stepper.run(Load(chunk=16), 3)) == 3
        stepper.close()
    finally:
        executor.close()


def test_daemons_are_as_many_as_fit() -> None:
    weights = 2 * ALIASES["qwen2.5-7b"].config.num_parameters
    assert daemon.fitting(139 << 30, weights) == 5  # 132 GiB / (14.2 + 4 + 5) GiB
    assert daemon.fitting(24 << 30, weights) == 1
    assert daemon.fitting(80 << 30, weights) == 3


def test_options_of_the_daemons(tmp_path: Path) -> None:
    part = part_run(tmp_path, dry_run=True)
    setting = daemon._setting(part)
    assert setting.at_once == 1 and "--profile" not in setting.options
    (tmp_path / sharing.PROFILE).write_text("{}", encoding="utf-8")
    (tmp_path / sharing.TPOT).write_text("5000000", encoding="utf-8")
    setting = daemon._setting(part)
    assert setting.at_once == 2
    assert setting.options[-2:] == ("--tpot-target-ms", "10.000")  # twice the isolated time
    assert daemon.options_of("static", setting) == setting.options
    assert "--tpot-target-ms" not in daemon.options_of("chunked", setting)
    assert {"--profile", "--executor"} <= set(daemon.options_of("chunked", setting))


def test_pictures_are_drawn(tmp_path: Path) -> None:
    decode = [{"batch": b, "context": 1024, "over_floor": 1.0 + b / 100} for b in (1, 8)]
    prefill = [{"chunk": 512, "start": 0, "tokens_per_s": 9, "share_of_matrix_rate": 0.5}, {"chunk": 9, "start": 0}]
    plots.draw_steps({"decode": decode, "prefill": prefill, "ceilings": {"how": "x"}}, tmp_path / "a.png")
    rows = [{"case": "decode 1, at 9", "backend": "torch", "ms": {"median": 1.0}}, {"case": "b", "backend": "triton"}]
    plots.draw_attention(rows, tmp_path / "b.png")
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())


def test_the_tiny_model_can_be_served(tmp_path: Path) -> None:
    source = resolve_model(str(write_model(tmp_path / "tiny", TINY)))
    assert source.config is not None and model_shape(source.config) == model_shape(TINY)
    assert load_tokenizer(source).vocab_size == TINY.vocab_size
