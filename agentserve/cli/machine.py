"""What a file that is kept says about where it was made."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import time
from pathlib import Path

import psutil


def describe_processor() -> str:
    """The processor and its cores: `Intel Xeon, 2 cores`."""
    name = _processor_name() or platform.processor() or platform.machine() or "unknown processor"
    num_cores = psutil.cpu_count() or 1
    return f"{name}, {num_cores} {'core' if num_cores == 1 else 'cores'}"


def describe_machine() -> str:
    """Processor, memory, system and the versions that matter, in a line."""
    parts = [
        describe_processor(),
        f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        platform.system(),
        f"Python {platform.python_version()}",
    ]
    try:
        parts.append(f"torch {importlib.metadata.version('torch')}")
    except importlib.metadata.PackageNotFoundError:
        parts.append("no torch")
    return ", ".join(parts)


class Neighbours:
    """How much of the processor other processes use while something is measured."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._started_s, self._busy_s = time.monotonic(), self._others_s()

    def share(self) -> float:
        """Share of all cores that others have used since this was made, from 0 to 1."""
        elapsed_s = max(1e-3, time.monotonic() - self._started_s)
        share = (self._others_s() - self._busy_s) / elapsed_s / (psutil.cpu_count() or 1)
        # The system counts in ticks, so that little use may come out negative.
        return min(1.0, max(0.0, share))

    def _others_s(self) -> float:
        everybody, ours = psutil.cpu_times(), self._process.cpu_times()
        return float(everybody.user + everybody.system - ours.user - ours.system)


def commit() -> str:
    """The commit of the checkout that this package runs from, `-dirty` if it was changed; empty if there is none."""
    root = Path(__file__).parents[2]
    # Installed into somebody else's repository it would be their commit.
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""  # no git here: the file says so by leaving it out
    return result.stdout.strip() if result.returncode == 0 else ""


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
