"""`agentserve simulate`: results, files, and that the same inputs give the same bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from agentserve.build.simulation import make_plans, run_plan
from agentserve.cli import main
from agentserve.core.batch import BatchOutput
from agentserve.core.engine import StepResult
from agentserve.core.events import Command
from agentserve.errors import ConfigError
from agentserve.runtime.recording import Recorder
from agentserve.runtime.virtual import VirtualDriver
from agentserve.sim import sweep
from agentserve.sim.cells import Cell, expand, varying
from agentserve.sim.orchestrator import simulate
from agentserve.sim.programs import Program, Turn, Workload, dump_programs
from tests.core import builders

TINY = ("--workload", "react:programs=3,scale=0.1", "--gpu", "rtx-4090", "--model", "qwen2.5-3b")


def files_of(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


# ---- the cross product ----


def test_lists_make_a_cross_product() -> None:
    cells = expand({"gpu": "rtx-5090,rtx-4090", "agents": "1,2,4", "workload": "react:scale=0.5,programs=6"})
    assert [(cell.gpu, cell.agents) for cell in cells] == [
        (gpu, agents) for agents in (1, 2, 4) for gpu in ("rtx-5090", "rtx-4090")
    ]
    assert {cell.workload for cell in cells} == {"react:scale=0.5,programs=6"}
    assert varying(cells) == ("agents", "gpu")
    two = expand({"workload": "react:scale=0.5,programs=6,fanout,react:agents=2", "kv_cache_memory": "1GiB,512MiB"})
    assert [cell.workload for cell in two[::2]] == ["react:scale=0.5,programs=6", "fanout", "react:agents=2"]
    assert [cell.kv_cache_memory for cell in two[:2]] == [1 << 30, 1 << 29]


def test_options_that_mean_nothing_in_a_combination_are_left_out() -> None:
    cells = expand({"scheduler": "lanes,chunked", "controller": "predictive,static"})
    assert [(cell.scheduler, cell.controller) for cell in cells] == [
        ("lanes", "predictive"),
        ("lanes", "static"),
        ("chunked", None),
    ]
    cells = expand({"router": "round_robin,session_affinity", "overload": "wait,move", "link_gb_per_s": "1,2"})
    assert [(c.router, c.overload, c.link_gb_per_s) for c in cells] == [
        ("round_robin", None, None),
        ("session_affinity", "wait", None),
        ("session_affinity", "move", 1.0),
        ("session_affinity", "move", 2.0),
    ]
    with pytest.raises(ConfigError, match="--slots needs --scheduler lanes"):
        expand({"scheduler": "fcfs", "slots": "stream"})
    with pytest.raises(ConfigError, match="--link-gb-per-s needs --overload move"):
        expand({"link_gb_per_s": "3"})


# ---- wrong input ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "rtx-9999"], "no profile of a device named 'rtx-9999'"),
        (["--gpu", "rtx-4090,"], "--gpu: there is an empty value"),
        (["--gpu", "rtx-4090,rtx-4090"], "--gpu: a value occurs twice"),
        (["--gpu", "rtx-4090", "--profile", "h100"], "--gpu and --profile are two devices"),
        (["--gpu", "rtx-a5000", "--model", "qwen3-32b"], "does not fit"),
        (["--model", "gpt-5"], "unknown model 'gpt-5'"),
        (["--workload", "nothing"], "nothing is neither a file nor a workload; there are react"),
        (["--workload", "react:agent=3"], "there is no 'agent'; there are agents, programs, scale, rate"),
        (["--workload", "react:agents=x"], "agents must be a number, not 'x'"),
        (["--workload", "react:agents=2", "--agents", "3"], "react:agents=2 says agents, too"),
        (["--workload", "react", "--format", "mooncake"], "--format is for files"),
        (["--agents", "0"], "--agents: must be a positive number"),
        (["--agents", "2,x"], "--agents: must be a whole number"),
        (["--rate", "1", "--workload", "fanout"], "fanout has no arrivals of its own"),
        (["--tools", "nothing"], "nothing is neither a file nor a tool profile"),
        (["--scheduler", "best"], "--scheduler: must be one of lanes, chunked, prefill-first, fcfs"),
        (["--router", "random"], "--router: must be one of round_robin, least_loaded, session_affinity"),
        (["--instances", "0"], "--instances: must be a positive number"),
        (["--kv-cache-memory", "1KiB"], "needs at least"),
        (["--kv-cache-memory", "64MiB", "--max-model-len", "8192"], "fewer than the window"),
        (["--jobs", "0"], "--jobs: must be a positive number"),
        (["--tpot-target-ms", "-1"], "--tpot-target-ms: must be a positive number"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], message: str
) -> None:
    out = tmp_path / "out"
    assert main(["simulate", *arguments, "--out", str(out)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("agentserve: error: ") and captured.err.count("\n") == 1
    assert message in captured.err
    assert captured.out == "" and not out.exists()


def test_a_directory_that_is_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("x")
    assert main(["simulate", *TINY, "--out", str(path)]) == 2
    assert "it is not a directory" in capsys.readouterr().err
    assert path.read_text() == "x"


def test_a_malformed_file_of_programs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "programs.jsonl"
    path.write_text('{"program_id": "a", "turns": [{"append_tokens": 0, "output_tokens": 1}]}\n')
    assert main(["simulate", "--workload", str(path)]) == 2
    assert f"{path}:1: turns[0].append_tokens: expected a whole number" in capsys.readouterr().err


# ---- results ----


def test_the_same_inputs_give_the_same_bytes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = ["simulate", *TINY, "--instances", "1,2"]
    assert main([*command, "--out", str(tmp_path / "one"), "--jobs", "1"]) == 0
    first = capsys.readouterr().out
    assert main([*command, "--out", str(tmp_path / "many"), "--jobs", "2"]) == 0
    assert capsys.readouterr().out == first
    one, many = files_of(tmp_path / "one"), files_of(tmp_path / "many")
    assert one == many
    cells = [name for name in one if name.startswith("cells/")]
    assert len(cells) == 2 and len({one[name] for name in cells}) == 2
    pictures = {"cdf.png", "sweep-instances.png", "kv-1.png", "kv-2.png", "lanes-1.png", "lanes-2.png"}
    assert set(one) == {*cells, *pictures, "results.json", "table.txt"}
    assert all(one[name].startswith(b"\x89PNG") for name in pictures)
    assert one["table.txt"].decode() == first
    collected = json.loads(one["results.json"])
    assert collected["varying"] == ["instances"]
    assert [result["parameters"]["instances"] for result in collected["results"]] == [1, 2]
    for result in collected["results"]:
        assert result["summary"]["all"]["num_errors"] == 0
        assert sum(instance["num_calls"] for instance in result["instances"]) == result["workload"]["num_turns"]
        assert "calls" not in result
    for title in ("TTFT", "TPOT", "gap p95", "JCT", "hits", "preempt.", "KV mean"):
        assert title in first


def test_finished_cells_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int | None] = []

    def counted(plan: sweep.Plan, *rest: Any) -> sweep.Result:
        ran.append(plan.cell.agents)
        return run_plan(plan, *rest)

    monkeypatch.setattr("agentserve.build.simulation.run_plan", counted)
    monkeypatch.setattr("agentserve.cli.simulate.importlib.util.find_spec", lambda _: None)  # no pictures
    command = ["simulate", *TINY, "--jobs", "1", "--out", str(tmp_path)]
    assert main([*command, "--agents", "1"]) == 0
    assert main([*command, "--agents", "1,2"]) == 0
    assert ran == [1, 2]
    monkeypatch.setattr(sweep, "code_version", lambda: "another version of the code")
    assert main([*command, "--agents", "1"]) == 0
    assert ran == [1, 2, 1]


def test_a_damaged_result_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = ["simulate", *TINY, "--out", str(tmp_path)]
    assert main(command) == 0
    (path,) = (tmp_path / "cells").iterdir()
    path.write_text("{")
    capsys.readouterr()
    assert main(command) == 2
    assert f"cannot read {path}, delete it to run it again" in capsys.readouterr().err


def test_a_file_of_programs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    dump_programs([Program("a", (Turn(400, 8, 50.0), Turn(30, 4)))], path)
    assert main(["simulate", *TINY[2:], "--workload", str(path), "--out", str(tmp_path / "out")]) == 0
    assert "mine.jsonl" in capsys.readouterr().out
    (result,) = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert result["workload"]["num_turns"] == 2
    # 400 + 8 tokens but the last one are known: 400 of them in whole blocks of 16.
    assert result["summary"]["num_cached_tokens"] == 400


def test_programs_that_do_not_fit_the_window_are_noted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", *TINY, "--max-model-len", "320"]) == 0
    captured = capsys.readouterr()
    assert "note: " in captured.err and "need more than the window of 320 tokens" in captured.err


# ---- what-if from life ----


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    """A recorded run of the test device, whose profile is in the header."""
    path = tmp_path / "life.jsonl"
    values: dict[str, Any] = {"num_blocks": 256, "max_model_len": 512}
    driver: VirtualDriver = builders.virtual(**values)
    recorder = Recorder(path, builders.header(**values))
    step = driver.core.step

    def recorded_step(now_ns: int, completions: Sequence[BatchOutput], commands: Sequence[Command]) -> StepResult:
        result = step(now_ns, completions, commands)
        recorder.write(now_ns, completions, commands, result)
        return result

    driver.core.step = recorded_step  # type: ignore[method-assign]
    programs = (
        Program("a", (Turn(60, 8, 300.0), Turn(12, 5)), arrival_ms=0.0),
        Program("b", (Turn(90, 6),), arrival_ms=20.0),
    )
    simulate(Workload("w", programs, None), driver, fast_forward=False)
    recorder.close()
    return path


def test_a_recording_is_predicted_with_its_own_header(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, recording: Path
) -> None:
    out = tmp_path / "out"
    assert main(["simulate", "--workload", str(recording), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "a test device as recorded" in printed
    assert "recorded  predicted" in printed
    (result,) = json.loads((out / "results.json").read_text())["results"]
    # It was recorded on the same virtual device: the prediction is exact.
    assert result["summary"] == result["recorded"]
    assert "+0.0%" in printed


def test_a_recording_with_other_options(capsys: pytest.CaptureFixture[str], recording: Path) -> None:
    (own,) = make_plans(expand({"workload": str(recording)}))
    changes = {"workload": str(recording), "kv_cache_memory": "512000", "controller": "reactive", "max_num_seqs": "1"}
    (changed,) = make_plans(expand({**changes, "tpot_target_ms": "20"}))
    assert (own.header.config.num_blocks, own.header.config.max_num_seqs) == (256, 8)
    assert changed.header.device == own.header.device
    config = changed.header.config
    # Blocks of 4 tokens of 1000 bytes.
    assert (config.num_blocks, config.max_num_seqs, config.control.controller) == (128, 1, "reactive")
    assert config.control.tpot_target_ns == 20_000_000
    assert config.prefill_chunk == own.header.config.prefill_chunk == 16
    (other,) = make_plans(expand({"workload": str(recording), "gpu": "rtx-4090", "model": "qwen2.5-3b"}))
    assert other.header.device is not None and other.header.device.name == "rtx-4090"
    assert other.header.config.prefill_chunk == 16
    assert main(["simulate", "--workload", str(recording), "--agents", "2"]) == 2
    assert "a recording has arrival times" in capsys.readouterr().err
    assert main(["simulate", "--workload", str(recording), "--gpu", "rtx-4090"]) == 2
    assert "unknown model 'test'" in capsys.readouterr().err


# ---- no torch ----


def test_it_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom agentserve.cli import main\n"
        f"assert main({['simulate', *TINY, '--out', str(tmp_path)]!r}) == 0\n"
        "loaded = [name for name in ('torch', 'transformers', 'aiohttp') if name in sys.modules]\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_every_option_has_an_effect() -> None:
    """Each changes the plan: none is accepted and ignored."""
    base = {
        "workload": "react", "instances": "2", "overload": "move", "controller": "static", "kv_offloading_size": "2",
        "cxl_size": "2",
    }  # fmt: skip
    others = {
        "workload": "plan_execute", "agents": "3", "programs": "5", "scale": "0.5", "rate": "2", "tools": "swe-bench",
        "seed": "1", "gpu": "rtx-4090", "profile": "h100", "model": "qwen2.5-3b", "dtype": "float32",
        "kv_cache_memory": "4GiB", "block_size": "32", "max_model_len": "4096", "instances": "3",
        "router": "round_robin", "overload": "wait", "overload_calls": "3", "link_gb_per_s": "1",
        "scheduler": "chunked", "controller": "reactive", "slots": "stream", "tpot_target_ms": "9", "max_num_seqs": "4",
        "time_slice_ms": "20",
        "max_num_batched_tokens": "512", "prefill_chunk": "64", "kv_offloading_size": "8", "cxl_size": "4",
        "host_link_gb_per_s": "9", "cxl_link_gb_per_s": "9", "kv_write_back": "on_evict",
        "policy": "evict_always", "order": "plas", "protect_anchors": "true", "prefetch_distance": "3",
        "prediction": "false", "max_loras": "2", "lora_rank": "32", "admission": "working_set",
        "speculate": "lost_context", "speculate_tokens": "64", "tool_allow": "*=grep",
    }  # fmt: skip
    beside = {
        "prefetch_distance": {"policy": "invocation_distance"},
        "prediction": {"policy": "transition"},
        "speculate_tokens": {"speculate": "next_turn"},
        "max_loras": {"workload": "independent"},
        "lora_rank": {"workload": "independent"},
    }
    assert set(others) | {"format"} == set(Cell.__dataclass_fields__)
    for name, text in others.items():
        (plain,) = make_plans(expand({**base, **beside.get(name, {})}))
        values = {**base, **beside.get(name, {}), name: text}
        if name == "router":
            del values["overload"]
        if name == "scheduler":
            del values["controller"]
        (plan,) = make_plans(expand(values))
        differs = [
            part
            for part in ("header", "workload", "overload", "overload_calls", "link")
            if getattr(plan, part) != getattr(plain, part)
        ]
        assert differs or name in {"instances", "router"}, name
