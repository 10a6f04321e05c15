"""Wrong usage and input: one clear line and exit code 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agentserve.cli import main
from tests.models.builders import SMOLLM2, requires_smollm2, save_tiny_model


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()  # what making the input has written
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("agentserve: error: ")
    assert captured.err.count("\n") == 1, "more than a line"
    assert captured.out == ""
    return captured.err.removeprefix("agentserve: error: ").strip()


@pytest.fixture(autouse=True)
def no_environment_and_no_daemon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path))

    async def serve(*_: object) -> None:
        raise AssertionError("the daemon started")

    monkeypatch.setattr("agentserve.cli.serve._serve", serve)
    monkeypatch.setattr("agentserve.build.parts.driver_library", lambda: None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "gpt-5"], "unknown model 'gpt-5'"),
        (["--model", "qwen2.5-7"], "did you mean qwen2.5-7b"),
        (["/no/such/model.gguf"], "unknown model"),
        (["--port", "99999"], "--port: must be a port from 0 to 65535"),
        (["--max-model-len", "0"], "--max-model-len: must be a positive number"),
        (["-c", "-5"], "--max-model-len: must be a positive number"),
        (["--max-num-seqs", "x"], "--max-num-seqs: must be a whole number"),
        (["--dtype", "int3"], "--dtype: must be one of auto, float32, bfloat16, float16"),
        (["--kv-cache-memory", "lots"], "--kv-cache-memory: must be a size"),
        (["--host", "0.0.0.0", "--executor", "simulated"], "can be reached from other machines"),
        (["--executor", "cuda"], "on the GPU: there is no NVIDIA driver"),
        (["--executor", "simulated", "--gpu", "rtx-9999"], "no profile of a device named 'rtx-9999'"),
        (["--executor", "simulated", "--gpu", "rtx-a5000", "--model", "qwen3-32b"], "does not fit"),
        (["--executor", "simulated", "--model", "qwen2.5-7b", "-c", "999999"], "exceeds the 32768 tokens"),
        (["--executor", "simulated", "--kv-cache-memory", "64MiB", "-c", "8192"], "fewer than the window"),
        (["--executor", "simulated", "--kv-cache-memory", "1KiB"], "needs at least"),
        (["--executor", "cpu", "--model", "qwen2.5-7b"], "cannot serve qwen2.5-7b on the CPU"),
        (["one", "--model", "two"], "two models"),
        (["--scheduler", "fcfs", "--controller", "static"], "--controller needs --scheduler lanes"),
        (["--scheduler", "chunked", "--tpot-target-ms", "50"], "--tpot-target-ms needs --scheduler lanes"),
        (["--slots", "purple"], "--slots: must be one of auto, cap, stream, off, green"),
        (["--slots", "green"], "--slots green needs a GPU"),
        (["--executor", "simulated", "--attention-backend", "triton"], "simulated timing computes no attention"),
        (["--executor", "cpu", "--load-format", "dummy", "--attention-backend", "flashinfer"], "does not run here"),
        (["--tpot-target-ms", "0"], "--tpot-target-ms: must be a positive number"),
        (["--theta-low", "2"], "theta_low must be positive and below theta_high"),
        (["--executor", "simulated", "--profile", "/no/such/profile.json"], "/no/such/profile.json"),
        (["--config", "/no/such/file.toml"], "cannot read the configuration file"),
        (["--executor", "simulated", "--record", "/no/such/directory/file"], "cannot record"),
    ],
)
def test_serve(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert message in error_of(capsys, "serve", *arguments)


def test_a_bad_configuration_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("[network]\nport = \n", encoding="utf-8")
    assert "is not valid TOML" in error_of(capsys, "serve", "--config", str(path))
    path.write_text("[network]\nprot = 1\n", encoding="utf-8")
    assert "has no option 'prot'" in error_of(capsys, "serve", "--config", str(path))


def test_a_bad_environment_variable(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTSERVE_PORT", "http")
    assert "AGENTSERVE_PORT: must be a whole number" in error_of(capsys, "serve")


@requires_smollm2
@pytest.mark.smollm2
@pytest.mark.parametrize("num_bytes", [0, 3, 100, 1 << 20, 50 << 20])
def test_a_truncated_gguf(capsys: pytest.CaptureFixture[str], tmp_path: Path, num_bytes: int) -> None:
    assert SMOLLM2.path is not None
    path = tmp_path / "cut.gguf"
    with SMOLLM2.path.open("rb") as file:
        path.write_bytes(file.read(num_bytes))
    assert str(path) in error_of(capsys, "serve", str(path))


@pytest.mark.parametrize("damage", ["truncated", "missing", "config", "architecture", "no config"])
def test_a_damaged_directory(capsys: pytest.CaptureFixture[str], tmp_path: Path, damage: str) -> None:
    directory = tmp_path / "model"
    save_tiny_model(directory, "llama")
    weights, config = directory / "model.safetensors", directory / "config.json"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "missing":
        weights.unlink()
    elif damage == "config":
        config.write_text("{", encoding="utf-8")
    elif damage == "architecture":
        config.write_text(json.dumps({**json.loads(config.read_text(encoding="utf-8")), "model_type": "mamba"}))
    else:
        config.unlink()
    assert str(directory) in error_of(capsys, "serve", str(directory), "--executor", "cpu")


def test_replay_of_something_else(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("hello\n", encoding="utf-8")
    assert "not the header of a recording" in error_of(capsys, "replay", str(path))
    assert "cannot read" in error_of(capsys, "replay", str(tmp_path / "missing"))


def test_no_verb_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "serve" in capsys.readouterr().out


def test_abbreviated_and_unknown_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--mod", "--no-such-option"):
        with pytest.raises(SystemExit) as exit_info:
            main(["serve", option, "x"])
        assert exit_info.value.code == 2
    assert "unrecognized arguments" in capsys.readouterr().err
