"""Part `sanitizer`: NVIDIA's compute-sanitizer over the tests of the kernels."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from bench.gpu.record import PartRun
from bench.gpu.surroundings import ROOT
from bench.gpu.tests import gpu_test_files, run_pytest, summarize

_MARGIN_S = 5.0
_FOUND = 9
"""Exit code of a run in which it found something."""


def run(part: PartRun) -> None:
    program = sanitizer()
    part.put("program", program)
    files = gpu_test_files(ROOT / "tests" / "kernels")
    log = part.scratch / "sanitizer.log"
    prefix = [
        program or "compute-sanitizer", "--tool", "memcheck", "--target-processes", "all", "--print-limit", "20",
        "--error-exitcode", str(_FOUND), "--log-file", str(log),
    ]  # fmt: skip
    part.put("command", [Path(prefix[0]).name, *prefix[1:-1], "sanitizer.log"])
    if part.dry_run or program is None or not files:
        part.say("compute-sanitizer is not here" if program is None else f"would check {len(files)} files")
        part.put("files", [str(path.relative_to(ROOT)) for path in files])
        return
    code, outcomes = run_pytest(part, files, [], part.left_s - _MARGIN_S, prefix)
    part.put("exit_code", code)
    part.put("outcomes", summarize(outcomes))
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    part.put("num_errors", num_errors(text))
    part.put("report", text.splitlines()[:60])


def sanitizer() -> str | None:
    """The program, or None."""
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{home}/bin")


def num_errors(text: str) -> int | None:
    """The sum of its summaries, one a process; the errors so far if it was stopped, None if it said nothing."""
    summaries = re.findall(r"ERROR SUMMARY: (\d+) error", text)
    if summaries:
        return sum(map(int, summaries))
    return len(re.findall(r"^=+ (?:Invalid|Program hit|Race|Uninitialized)", text, re.MULTILINE)) if text else None
