"""`agentserve profile`: from the command line to a file that `load_profile` takes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from agentserve.build import model_shape
from agentserve.cli import main
from agentserve.cli.machine import Neighbours
from agentserve.core.batch import Lane
from agentserve.core.costmodel import BatchShape, CostModel
from agentserve.core.slots import build_partition_table
from agentserve.models.registry import resolve_model
from agentserve.profiles import load_document, load_profile
from agentserve.sim.programs import Program, Turn, Workload
from tests.bench.recorded_runs import record_run
from tests.core import builders
from tests.models.builders import save_tiny_model

FULL = ("--executor", "simulated", "--gpu", "rtx-4090", "--model", "qwen2.5-7b")
SIMULATED = (*FULL, "--quick")


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("agentserve.build.parts.driver_library", lambda: None)


def profile(*arguments: str | Path) -> int:
    return main(["profile", *map(str, arguments)])


def tiny_model(directory: Path) -> tuple[str | Path, ...]:
    """Makes a model of random weights, with a tokenizer, and returns the arguments that measure it."""
    save_tiny_model(directory, "llama")
    tokenizer = Tokenizer(BPE({character: index for index, character in enumerate(ByteLevel.alphabet()[:160])}, []))
    tokenizer.decoder = ByteLevelDecoder()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
    return directory, "--executor", "cpu", "--dtype", "float32", "--kv-cache-memory", "4MiB"


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    capsys.readouterr()
    assert profile(*arguments) == 2
    captured = capsys.readouterr()
    last = captured.err.splitlines()[-1]
    assert last.startswith("agentserve: error: ") and captured.out == ""
    return last.removeprefix("agentserve: error: ")


def test_a_simulated_device_is_recovered(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "mine.json"
    assert profile(*FULL, "--max-model-len", 1024, "--max-num-seqs", 9, "--out", out) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == f"written: {out}"
    rows = [line.split()[:2] for line in captured.out.splitlines()]
    for kind in ("decode", "prefill", "mixed"):
        assert [kind, "whole"] in rows
    assert ["decode", "beside"] in rows and ["prefill", "beside"] in rows
    # Progress goes to the other stream, in lines where there is no terminal.
    assert "100 %" in captured.err.splitlines() and "\x1b" not in captured.err

    config = resolve_model("qwen2.5-7b").config
    assert config is not None
    measured, true = (CostModel(device, model_shape(config)) for device in (load_profile(str(out)), _truth()))
    table = build_partition_table(128, 4, 4)
    for decodes, chunk in ((1, 0), (4, 0), (8, 0), (4, 64), (8, 128), (0, 100), (0, 256)):
        shape = BatchShape(decodes, 500 * decodes, 0, 0, 0, 0, decodes)
        shape = shape.with_prefill(chunk, 400) if chunk else shape
        lane = Lane.DECODE if decodes else Lane.PREFILL
        for partition, co_running in ((table.whole, False), (table.split_nearest(0.5), True), (table.stream, True)):
            expected = true.duration_ns(shape, lane, partition, co_running)
            assert measured.duration_ns(shape, lane, partition, co_running) == pytest.approx(expected, rel=0.02)


def _truth():
    return load_profile("rtx-4090")


def test_the_file_says_where_it_comes_from(tmp_path: Path) -> None:
    out = tmp_path / "mine.json"
    assert profile(*SIMULATED, "--max-num-seqs", 8, "--out", out) == 0
    document = load_document(str(out))
    origin = document.origin
    assert (origin.provenance, origin.model, origin.dtype) == ("estimated", "qwen2.5-7b", "bfloat16")
    assert "simulated rtx-4090" in origin.source
    assert origin.command == (
        "agentserve profile --model qwen2.5-7b --executor simulated --gpu rtx-4090 --max-num-seqs 8 --quick "
        "--out mine.json"
    )
    assert "cores" in origin.machine and "GiB" in origin.machine and "torch" in origin.machine
    assert len(origin.date) == 10
    assert {residual.kind for residual in document.residuals} == {"decode", "prefill", "mixed"}
    assert document.profile.name == "mine"


def test_a_real_model_is_measured(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A tiny one, so that it is quick: the numbers say nothing, but all of them are there."""
    out = tmp_path / "cpu.json"
    assert profile(*tiny_model(tmp_path / "model"), "--quick", "--out", out) == 0
    document = load_document(str(out))
    assert (document.origin.provenance, document.origin.dtype) == ("measured", "float32")
    assert document.profile.bandwidth_bytes_per_s > 0
    assert {residual.kind for residual in document.residuals} == {"decode", "prefill", "mixed"}
    assert "measuring " in capsys.readouterr().err


def recording(tmp_path: Path) -> Path:
    """Of a daemon with simulated timing."""
    turns = (Turn(40, 9, 200.0), Turn(12, 6, 300.0), Turn(7, 12))
    workload = Workload("w", (Program("a", turns), Program("b", turns)), 1, 0)
    path = tmp_path / "run.jsonl"
    header = builders.header(num_blocks=256, max_model_len=512, decode_lookahead=1)
    record_run(path, workload, header=header, device=builders.device_profile(turnaround_ns=700_000))
    return path


def test_recordings_alone_make_a_profile(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "mine.json"
    assert profile("--recording", recording(tmp_path), "--no-grid", "--out", out) == 0
    document = load_document(str(out))
    assert document.profile.turnaround_ns == 700_000
    assert document.profile.bandwidth_bytes_per_s == pytest.approx(1e9, rel=0.02)
    assert (document.profile.name, document.origin.provenance, document.origin.model) == ("mine", "estimated", "test")
    assert document.origin.command == "agentserve profile --recording run.jsonl --no-grid"
    assert document.origin.source.endswith(" samples of recorded batches")
    assert ["decode", "whole"] in [line.split()[:2] for line in capsys.readouterr().out.splitlines()]


def test_recordings_of_another_model_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = recording(tmp_path)
    message = error_of(capsys, *SIMULATED, "--recording", path, "--out", tmp_path / "mine.json")
    assert message.endswith("run.jsonl was recorded with another model than qwen2.5-7b")
    missing = error_of(capsys, *SIMULATED, "--recording", tmp_path / "no.jsonl", "--out", tmp_path / "mine.json")
    assert "cannot read" in missing


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--no-grid"], "--no-grid needs --recording"),
        (["--no-grid", "--recording", "x", "--quick"], "--quick is for a measurement, and --no-grid makes none"),
        (["--no-grid", "--recording", "x", "--max-num-seqs", "4"], "--max-num-seqs is for a measurement"),
        (["--no-grid", "--recording", "x", "qwen2.5-7b"], "a model is for a measurement"),
    ],
)
def test_what_needs_a_measurement_is_refused_without_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: Sequence[str], message: str
) -> None:
    assert message in error_of(capsys, *arguments, "--out", tmp_path / "mine.json")


@pytest.mark.parametrize(("share", "said"), [(0.31, True), (0.01, False)])
def test_a_busy_machine_is_mentioned(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, share: float, said: bool
) -> None:
    monkeypatch.setattr("agentserve.cli.machine.Neighbours.share", lambda _: share)
    out = tmp_path / "cpu.json"
    assert profile(*tiny_model(tmp_path / "model"), "--quick", "--out", out) == 0
    note = "other processes used 31% of the processor"
    assert (note in capsys.readouterr().err) == said
    assert (note in load_document(str(out)).origin.source) == said


def test_what_other_processes_use_is_what_we_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    everybody, ours, now = iter((100.0, 106.0)), iter((40.0, 43.0)), iter((0.0, 10.0))
    system = SimpleNamespace(
        cpu_count=lambda: 2,
        cpu_times=lambda: SimpleNamespace(user=next(everybody), system=1.0),
        Process=lambda: SimpleNamespace(cpu_times=lambda: SimpleNamespace(user=next(ours), system=0.0)),
    )
    monkeypatch.setattr("agentserve.cli.machine.psutil", system)
    monkeypatch.setattr("agentserve.cli.machine.time", SimpleNamespace(monotonic=lambda: next(now)))
    # Six seconds of everybody, three of them ours, in ten seconds on two cores.
    assert Neighbours().share() == pytest.approx(3 / 10 / 2)


def test_a_file_is_not_overwritten_unless_asked(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "mine.json"
    out.write_text("precious", encoding="utf-8")
    assert "exists; --force overwrites it" in error_of(capsys, *SIMULATED, "--out", out)
    assert out.read_text(encoding="utf-8") == "precious"
    assert profile(*SIMULATED, "--out", out, "--force") == 0
    assert json.loads(out.read_text(encoding="utf-8"))["format_version"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["mine.json"]  # no temporary file is left


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "/no/such/directory/file.json"], "there is no directory /no/such/directory"),
        (["--out", "/"], "it is a directory"),
        (["--model", "gpt-5"], "unknown model 'gpt-5'"),
        (["--gpu", "rtx-9999"], "no profile of a device named 'rtx-9999'"),
        (["--kv-cache-memory", "1KiB"], "needs at least"),
        (["--executor", "cuda"], "on the GPU: there is no NVIDIA driver"),
        (["--max-num-seqs", "0"], "--max-num-seqs: must be a positive number"),
    ],
)
def test_errors(capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: Sequence[str], message: str) -> None:
    assert message in error_of(capsys, "--executor", "simulated", "--out", tmp_path / "out.json", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_options_that_do_not_matter_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--port", "--scheduler", "--profile"):
        with pytest.raises(SystemExit) as exit_info:
            profile(option, "1")
        assert exit_info.value.code == 2
    assert "unrecognized arguments" in capsys.readouterr().err
