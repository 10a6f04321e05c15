"""`scripts/gpu_check` where there is no GPU: time, targets, and what becomes of parts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from agentserve.errors import AgentServeError
from bench.gpu.check import Check, main
from bench.gpu.plan import CLOSING_S, PARTS, Part, choose, time_for
from bench.gpu.surroundings import MARKER, ROOT, conditions, environment, missing, unpack_wheels
from bench.gpu.targets import evaluate, render

# ---- time ----


def test_the_parts_fit_the_time_and_later_ones_keep_theirs() -> None:
    left_s, given = 540.0, []
    for index in range(len(PARTS)):
        given.append(time_for(PARTS, index, left_s))
        left_s -= given[-1]
    # Even if every part takes all that it gets, each one with a reserve runs, and nothing is overdrawn.
    assert [part.name for part, seconds in zip(PARTS, given, strict=True) if seconds == 0.0] == ["sanitizer"]
    assert left_s >= CLOSING_S
    assert given[0] == PARTS[0].limit_s
    assert all(seconds >= part.reserve_s for seconds, part in zip(given, PARTS, strict=True))


def test_a_part_without_time_is_left_out() -> None:
    parts = (Part("a", "", 100, 60), Part("b", "", 30, 20))
    assert time_for(parts, 0, 200) == 100
    assert time_for(parts, 0, 100) == 100 - CLOSING_S - 20
    assert time_for(parts, 1, CLOSING_S + 6.0) == 0.0  # not a third of what it needs
    assert time_for(parts, 1, CLOSING_S + 8.0) == 8.0


def test_parts_are_chosen_by_name() -> None:
    assert [part.name for part in choose(("steps", "device"))] == ["device", "steps"]
    assert choose(()) == PARTS
    with pytest.raises(AgentServeError, match="there is no part 'stepz'"):
        choose(("stepz",))


# ---- targets ----

HELD: dict[str, dict[str, Any]] = {
    "device": {
        "switch_us": {"slots": [132, 16], "total": 12.5},
        "slots": {"splits": [{"disjoint": True, "complete": True}]},
        "graph_affinity": {"keeps_the_slot_of_its_capture": True},
    },
    "tests": {"outcomes": {"counts": {"passed": 50}, "failures": []}},
    "steps": {
        "decode": [
            {"batch": 1, "context": 1024, "over_floor": 1.1},
            {"batch": 8, "context": 1024, "over_floor": 1.15},
            {"batch": 32, "context": 1024, "over_floor": 1.2},
            {"batch": 32, "context": 16384, "left_out": "it does not fit the memory"},
        ],
        "prefill": [
            {"chunk": 512, "start": 0, "share_of_matrix_rate": 0.4},
            {"chunk": 4096, "start": 0, "share_of_matrix_rate": 0.6},
        ],
        "gaps": [{"batch": 1, "gap_us": {"median": 40.0}}, {"batch": 8, "gap_us": {"median": 300.0}}],
    },
    "daemon": {
        "figures": [
            {
                "figure": "fig2",
                "panels": [
                    {"key": "fcfs", "quiet_ms": 8.0, "worst_ms": 400.0},
                    {"key": "predictive", "quiet_ms": 8.0, "worst_ms": 14.0},
                ],
            }
        ],
        "runs": [
            {"variant": "predictive", "workload": "victim_attacker (3 agents)", "cold_ttft_ms": 120.0},
            {"variant": "chunked", "workload": "victim_attacker (3 agents)", "cold_ttft_ms": 100.0},
            {"variant": "chunked", "workload": "react (3 agents)", "cold_ttft_ms": 1.0},
        ],
    },
    "sanitizer": {"num_errors": 0},
}


def test_targets_that_are_held() -> None:
    rows = {row["name"]: row for row in evaluate(HELD)}
    assert all(row["held"] is True for row in rows.values()), rows
    assert rows["decode step / floor, up to 8 sequences"]["measured"] == 1.15
    assert rows["decode step / floor, 9 to 32 sequences"]["measured"] == 1.2
    assert rows["gap between decode steps"]["measured"] == 0.3
    assert rows["worst stall / quiet gap, predictive"]["measured"] == 14 / 8
    assert rows["cold TTFT / that of chunked, predictive"]["measured"] == 1.2
    assert "MISSED" not in render(list(rows.values()))


def test_targets_that_are_missed_and_those_that_nobody_measured() -> None:
    rows = {row["name"]: row for row in evaluate({"steps": {"prefill": [HELD["steps"]["prefill"][0]]}})}
    assert {row["held"] for row in rows.values()} == {None}
    slow = {"steps": {"prefill": [{"chunk": 4096, "start": 0, "share_of_matrix_rate": 0.59}]}}
    overlap = {"device": {"slots": {"splits": [{"disjoint": True, "complete": True}, {"disjoint": False}]}}}
    failed = {"tests": {"outcomes": {"counts": {"passed": 3, "failed": 1}, "failures": [{}]}}}
    rows = {row["name"]: row for row in evaluate({**slow, **overlap, **failed})}
    missed = [name for name, row in rows.items() if row["held"] is False]
    assert missed == ["prefill of 4096 tokens / matrix rate", "splits that overlap or lack SMs", "tests that fail"]
    assert render(list(rows.values())).count("MISSED") == 3
    # No test was run at all: that is no success.
    assert evaluate({"tests": {"outcomes": {"counts": {"skipped": 9}, "failures": []}}})[9]["held"] is None


# ---- the command ----

_SLEEPER = """
import sys, types

def run(part):
    import subprocess, time
    part.put("first", 1)
    # As a daemon: the head of a group of its own.
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    part.put("child", subprocess.Popen(command, start_new_session=True).pid)
    part.say("sleeping")
    time.sleep(600)

def fail(part):
    part.put("before", f"in {part.scratch}")
    raise RuntimeError("this was to be expected")

def count(part):
    part.put("third", 3)
    part.png("picture").write_bytes(b"png")

for name, function in {"sleeper": run, "failing": fail, "counting": count}.items():
    module = types.ModuleType("bench.gpu." + name)
    module.run = function
    sys.modules["bench.gpu." + name] = module
"""


def test_a_part_that_is_stopped_or_fails_keeps_what_it_knew(tmp_path: Path) -> None:
    planted, out, scratch = (tmp_path / name for name in ("planted", "out", "scratch"))
    for directory in (planted, out, scratch):
        directory.mkdir()
    (planted / "sitecustomize.py").write_text(_SLEEPER, encoding="utf-8")
    check = Check(
        out=out,
        scratch=scratch,
        environ=environment([str(planted), str(ROOT)], "test_gpu_check"),
        options=("--model", "m", "--load-format", "dummy"),
        deadline_s=time.monotonic() + 100,
    )
    check.document["conditions"] = {"missing": [], "dry_run": False}
    parts = (
        Part("sleeper", "", 2.5, 1),
        Part("failing", "", 20, 1),
        Part("lacking", "", 20, 1, ("there_is_no_such_module",)),
        Part("counting", "", 20, 1),
    )
    assert check.run(parts) == 1
    document = json.loads((out / "gpu_check.json").read_text(encoding="utf-8"))
    found = document["parts"]
    statuses = {"sleeper": "stopped", "failing": "failed", "lacking": "skipped", "counting": "ok"}
    assert {name: entry["status"] for name, entry in found.items()} == statuses
    assert found["sleeper"]["result"]["first"] == 1 and found["sleeper"]["num_leftovers"] == 1
    with pytest.raises(ProcessLookupError):
        _wait_for_end(found["sleeper"]["result"]["child"])
    assert found["failing"]["result"]["before"] == "in SCRATCH/failing"
    assert found["failing"]["result"]["error"] == "RuntimeError: this was to be expected"
    assert "there_is_no_such_module" in found["lacking"]["why"]
    assert found["counting"]["result"] == {"third": 3}
    assert sorted(path.name for path in out.iterdir()) == ["gpu_check.json", "gpu_check.log", "picture.png"]
    assert "[sleeper] sleeping" in (out / "gpu_check.log").read_text(encoding="utf-8")
    assert {row["held"] for row in document["targets"]} == {None}


def _wait_for_end(pid: int) -> None:
    """Raises ProcessLookupError when it has gone."""
    deadline_s = time.monotonic() + 10
    while time.monotonic() < deadline_s:
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z":
            raise ProcessLookupError
        os.sched_yield()


def test_a_dry_run_walks_through_a_part(tmp_path: Path) -> None:
    """`scripts/gpu_check` itself, with the quickest part that uses torch; CI's dry run takes all of them."""
    command = [ROOT / "scripts" / "gpu_check", tmp_path / "out", "--dry-run", "--only", "device", "--commit", "abc"]
    environ = {**os.environ, "PYTHON": sys.executable}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environ, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    document = json.loads((tmp_path / "out" / "gpu_check.json").read_text(encoding="utf-8"))
    assert document["conditions"]["commit"] == "abc" and document["conditions"]["dry_run"] is True
    assert document["conditions"]["command"] == "scripts/gpu_check out --dry-run --only device --commit abc"
    found = document["parts"]["device"]["result"]
    assert set(found["planned"]) == {"RTX A5000", "RTX 4090", "RTX 5090", "H200"}
    assert found["table"][0].startswith("whole:")
    # Nothing of a CPU is held against the targets of a GPU.
    assert {row["held"] for row in document["targets"]} == {None}


def test_a_bare_interpreter_learns_what_is_missing(tmp_path: Path) -> None:
    """Nothing but the standard library (-S: no site-packages): every part is left out, with the reason, and kept."""
    command = [sys.executable, "-S", "-m", "bench.gpu.check", str(tmp_path), "--dry-run"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1, result.stderr
    assert result.stderr == ""
    assert "no tokenizer for the model could be written: No module named" in result.stdout
    document = json.loads((tmp_path / "gpu_check.json").read_text(encoding="utf-8"))
    assert list(document["parts"]) == [part.name for part in PARTS]
    for name, entry in document["parts"].items():
        assert entry["status"] == "skipped" and entry["why"].startswith("these modules are missing: torch")
        assert f"== {name}: skipped, {entry['why']}" in result.stdout


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("bench.gpu.surroundings.has_gpu", lambda: False)
    assert main(["out"]) == 2
    assert "--dry-run walks through the parts without one" in capsys.readouterr().err
    assert main(["out", "--only", "nothing"]) == 2
    assert "there is no part 'nothing'" in capsys.readouterr().err


def test_surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTSERVE_PORT", "1")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    environ = environment(["/a", "/b"], "id")
    assert environ["PYTHONPATH"] == "/a:/b:/elsewhere" and environ[MARKER] == "id" and "AGENTSERVE_PORT" not in environ
    assert missing(["json", "no_such_module", "no_such_package.module"]) == ["no_such_module", "no_such_package.module"]
    assert unpack_wheels(tmp_path, tmp_path / "site") == {"wheels": []}
    (tmp_path / "broken-1.0-py3-none-any.whl").write_bytes(b"no zip")
    unpacked = unpack_wheels(tmp_path, tmp_path / "site")
    assert unpacked["wheels"] == ["broken-1.0-py3-none-any.whl"] and unpacked["error"]
    assert conditions(["/secret/place/out", "--dry-run"], None)["command"] == "scripts/gpu_check out --dry-run"
