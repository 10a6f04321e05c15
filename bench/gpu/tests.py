"""Part `tests`: `pytest -m gpu`, with every outcome kept as it comes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.gpu.record import PartRun
from bench.gpu.surroundings import ROOT, missing

LOG_VARIABLE = "GPU_CHECK_OUTCOMES"
_MARGIN_S = 6.0
_PLUGIN_OPTIONS = {"pytest_asyncio": "asyncio", "pytest_timeout": "timeout"}
"""Options of plugins that may be missing; `--strict-config` refuses what it does not know."""
_MAX_TEXT, _MAX_SLOWEST = 3000, 15


def run(part: PartRun) -> None:
    files = gpu_test_files(ROOT / "tests")
    part.put("files", [str(path.relative_to(ROOT)) for path in files])
    if not files:
        part.say("there are no tests that need a GPU")
        return
    options = ["--collect-only", "-qq"] if part.dry_run else []
    code, outcomes = run_pytest(part, files, options, part.left_s - _MARGIN_S)
    part.put("exit_code", code)
    part.put("outcomes", summarize(outcomes))
    counts = part.result["outcomes"]["counts"]
    part.say(f"pytest ended with {code}: {counts}")


def gpu_test_files(directory: Path) -> list[Path]:
    """Files with tests that are marked, by themselves or by a module beside them: others may import what is missing."""
    marking = [path for path in directory.rglob("*.py") if "mark.gpu" in path.read_text(encoding="utf-8")]
    helped = {path.parent for path in marking if not path.name.startswith("test_")}
    found = {path for path in directory.rglob("test_*.py") if path.parent in helped}
    return sorted(found | {path for path in marking if path.name.startswith("test_")})


def run_pytest(
    part: PartRun, files: Sequence[Path], options: Sequence[str], limit_s: float, prefix: Sequence[str] = ()
) -> tuple[int | None, list[dict[str, Any]]]:
    """Runs pytest on files; returns its exit code, None if it was stopped, and the outcomes until then.

    `prefix`: a program that runs it.
    """
    log = part.scratch / "outcomes.jsonl"
    config = part.scratch / "pytest.ini"
    config.write_text(ini(ROOT / "pyproject.toml"), encoding="utf-8")
    command = [
        *prefix, sys.executable, "-m", "pytest", "-c", str(config), f"--rootdir={ROOT}", "-m", "gpu", "-v", "-ra",
        "-p", "bench.gpu.outcomes", "-p", "no:cacheprovider", "--continue-on-collection-errors", "--tb=short",
        *options, *map(str, files),
    ]  # fmt: skip
    environ = {**os.environ, LOG_VARIABLE: str(log)}
    try:
        # Not in a process group of its own: it ends with this part.
        code = subprocess.run(command, cwd=ROOT, env=environ, check=False, timeout=max(1.0, limit_s)).returncode
    except subprocess.TimeoutExpired:
        code = None
    return code, read_outcomes(log)


def ini(pyproject: Path) -> str:
    """The project's settings of pytest, without those of plugins that are not installed.

    Warnings are not errors here: those of other versions of the libraries must not hide what the tests say.
    """
    options = tomllib.loads(pyproject.read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
    absent = tuple(_PLUGIN_OPTIONS[module] for module in missing(_PLUGIN_OPTIONS))
    lines = ["[pytest]"]
    for name, value in options.items():
        if name in {"testpaths", "filterwarnings"} or (absent and name.startswith(absent)):
            continue
        text = "\n    ".join(["", *map(str, value)]) if isinstance(value, list) else str(value)
        lines.append(f"{name} = {text}")
    return "\n".join(lines) + "\n"


def read_outcomes(log: Path) -> list[dict[str, Any]]:
    """What `bench.gpu.outcomes` has written; a last line that is cut off is left out."""
    if not log.is_file():
        return []
    lines = log.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def summarize(outcomes: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Counts, failures with their text, reasons of skips, and the slowest tests."""
    found = list(outcomes)
    failures = [
        {"test": o["test"], "when": o["when"], "text": o["text"][-_MAX_TEXT:]}
        for o in found
        if o["outcome"] == "failed"
    ]
    skips = Counter(o["text"] for o in found if o["outcome"] == "skipped")
    slowest = sorted(found, key=lambda o: -o["seconds"])[:_MAX_SLOWEST]
    return {
        "counts": dict(Counter(o["outcome"] for o in found)),
        "failures": failures,
        "skips": dict(skips),
        "slowest": {o["test"]: round(o["seconds"], 2) for o in slowest},
    }
