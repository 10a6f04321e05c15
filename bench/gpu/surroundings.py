"""What the parts need around them on a machine where nothing of ours is installed."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MARKER = "GPU_CHECK_RUN"
"""A variable in the environment of everything that a check starts: so that it can find what is left."""
_WHEELS_TIMEOUT_S = 90.0


def has_gpu() -> bool:
    """Whether the driver is there and shows a device."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int()
    return library.cuInit(0) == 0 and library.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def unpack_wheels(wheels: Path, target: Path) -> dict[str, Any]:
    """Unpacks `*.whl` to a folder, without a network and without what they depend on; says which and what failed."""
    files = sorted(wheels.glob("*.whl"))
    if not files:
        return {"wheels": []}
    command = [
        sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir",
        "--disable-pip-version-check", "--upgrade", "--target", str(target), *map(str, files),
    ]  # fmt: skip
    names = [file.name for file in files]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_WHEELS_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"wheels": names, "error": str(error)}
    return {"wheels": names} | ({"error": result.stderr[-800:]} if result.returncode else {})


def make_importable(scratch: Path) -> list[str]:
    """Folders for PYTHONPATH: this checkout, its kernels under the name of their package, and the wheels."""
    packages, site = scratch / "packages", scratch / "site"
    packages.mkdir()
    site.mkdir()
    (packages / "agentserve_kernels").symlink_to(ROOT / "kernels", target_is_directory=True)
    folders = [str(ROOT), str(packages), str(site)]
    sys.path[:0] = [folder for folder in folders if folder not in sys.path]
    return folders


def missing(modules: Iterable[str]) -> list[str]:
    """Modules that cannot be imported. A new folder on the path is seen."""
    importlib.invalidate_caches()
    return [name for name in modules if not _is_there(name)]


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ImportError:  # the package it is in is missing or broken
        return False


def prepare_model(name: str, scratch: Path, dry_run: bool) -> tuple[str, str]:
    """What `--model` and `--load-format` are to be: real weights if they are here, else random ones.

    Without the modules that writing a tokenizer needs, the name alone has to do: parts that need no model run all the
    same. Raises AgentServeError or KeyError for a name that nobody knows.
    """
    try:  # after the wheels are unpacked
        from agentserve.models.registry import resolve_model  # noqa: PLC0415
        from bench.gpu.model import TINY, dummy_model, write_model  # noqa: PLC0415

        if dry_run:
            return str(write_model(scratch / "tiny", TINY)), "dummy"
        if resolve_model(name).path is not None:
            return name, "auto"
        return str(dummy_model(scratch / "model", name)), "dummy"
    except ImportError as error:
        print(f"no tokenizer for the model could be written: {error}")
        return name, "dummy"


def environment(folders: Iterable[str], marker: str) -> dict[str, str]:
    """For the parts. Options of the daemon come from them alone."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("AGENTSERVE_")}
    paths = [*folders, *filter(None, [environ.get("PYTHONPATH")])]
    return environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", MARKER: marker}


def conditions(argv: Iterable[str], commit: str | None) -> dict[str, Any]:
    """Machine, commit, command and date: what must be known to judge a number."""
    try:
        from agentserve.cli import machine  # noqa: PLC0415 - needs psutil, which may be missing

        described, found = machine.describe_machine(), machine.commit()
    except ImportError:
        described, found = platform.processor() or platform.machine(), ""
    words = [Path(word).name if word.startswith("/") else word for word in argv]
    return {
        "command": " ".join(["scripts/gpu_check", *words]),
        "commit": commit or found or "unknown",
        "machine": described,
        "system": platform.platform(),
        "num_cores": os.cpu_count(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def stop_leftovers(marker: str) -> int:
    """Ends every process that this check has started and that is still there; returns how many there were.

    A daemon is the head of a process group of its own, so it survives the part that started it.
    """
    pids = list(_marked(f"{MARKER}={marker}".encode()))
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # it ended by itself
            os.kill(pid, signal.SIGKILL)
    return len(pids)


def _marked(entry: bytes) -> Iterator[int]:
    for directory in Path("/proc").glob("[0-9]*"):
        pid = int(directory.name)
        with contextlib.suppress(OSError):  # it ended by now, or is not ours
            if pid != os.getpid() and entry in (directory / "environ").read_bytes().split(b"\0"):
                yield pid
