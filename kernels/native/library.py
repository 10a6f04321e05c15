"""Compiles and loads the kernels.

The compiler of the machine does it at the first use, in a few seconds, and leaves the library in the user's cache,
where the next process finds it under the hash of all that it depends on. A wheel with compiled code would need one
build for each platform and would still have to choose at run time.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from agentserve_kernels.native import compiler

logger = logging.getLogger(__name__)

_SOURCES = ("attention.cpp", "layers.cpp", "linear.cpp")
_HEADERS = ("simd.h", "tiles.h")
_NEEDED = ("avx512_bf16", "avx512_bw", "avx512_vl", "avx512_dq", "amx_tile", "amx_bf16")
_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-fopenmp"),
    *("-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
)
_COMPILE_TIMEOUT_S = 300.0

_pointer, _int64, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_SIGNATURES = {
    "add_rms_norm": [_pointer, _int64, _pointer, _int64, _pointer, _int64, _int64, _float],
    "silu_mul": [_pointer, _int64, _pointer, _int64, _int64, _int64],
    "rope_and_write": [
        *(_pointer, _int64, _pointer, _pointer, _int64, _pointer, _pointer, _pointer, _float),
        *(_pointer, _pointer, _pointer, _int64, _pointer, _int64, _int64, _int64, _int64, _int64),
    ],
    "pack_linear": [_pointer, _pointer, _int64, _int64, _int64],
    "linear": [_pointer, _int64, _pointer, _pointer, _pointer, *(_int64,) * 6],
    "paged_decode": [*(_pointer,) * 3, _int64, *(_pointer,) * 3, *(_int64,) * 6, _float],
    "paged_prefill": [*(_pointer,) * 3, _int64, *(_pointer,) * 4, *(_int64,) * 6, _float],
}


class NativeBuildError(RuntimeError):
    """The kernels cannot be compiled or loaded here; the message says why."""


def cpu_obstacle() -> str | None:
    """Why this machine cannot run the kernels, or None. Says nothing of the compiler."""
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        return f"the kernels are for Linux on x86_64, not {sys.platform} on {platform.machine()}"
    capabilities = torch.cpu.get_capabilities()
    missing = [name for name in _NEEDED if not capabilities.get(name, False)]
    return f"the CPU has no {' and no '.join(missing)}" if missing else None


@functools.cache
def load() -> ctypes.CDLL:
    """The library; compiled if no process has done so yet. Raises NativeBuildError."""
    obstacle = cpu_obstacle()
    if obstacle is not None:
        raise NativeBuildError(obstacle)
    path = compiled(cache_dir())
    try:
        library = ctypes.CDLL(str(path))
        for name, arguments in _SIGNATURES.items():
            getattr(library, name).argtypes = arguments
    except (OSError, AttributeError) as error:
        raise NativeBuildError(f"cannot load {path}: {error}") from error
    if library.allow_tiles() != 0:
        raise NativeBuildError("the operating system does not allow AMX tiles")
    if not _shares_threads(library):
        raise NativeBuildError("torch has an OpenMP runtime of its own, whose threads the kernels would not share")
    return library


def _shares_threads(library: ctypes.CDLL) -> bool:
    """Whether the kernels have the threads that torch gives a thread: else they would leave the cores of their slot."""
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        return bool(library.num_threads() == before + 1)
    finally:
        torch.set_num_threads(before)


def cache_dir() -> Path:
    """Where compiled kernels are kept: in `$XDG_CACHE_HOME`, else in `~/.cache`."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "agentserve" / "kernels"


def compiled(directory: Path) -> Path:
    """The library in `directory`, which is made if it is missing. Raises NativeBuildError."""
    path = compiler.find()
    if path is None:
        raise NativeBuildError(f"no C++ compiler ({', '.join(compiler.wanted())})")
    here = Path(__file__).parent
    sources = [here / name for name in _SOURCES]
    digest = hashlib.sha256(" ".join((path, _run([path, "--version"]), *_FLAGS)).encode())
    for source in (*sources, *(here / name for name in _HEADERS)):
        digest.update(source.read_bytes())
    target = directory / f"native-{digest.hexdigest()[:16]}.so"
    if target.exists():
        return target
    logger.info("compiling the CPU kernels with %s: some seconds, once", path)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=directory, suffix=".so")
        os.close(handle)
    except OSError as error:
        raise NativeBuildError(f"no place for compiled kernels: {error}") from error
    unfinished = Path(name)
    try:
        _run([path, *_FLAGS, *map(str, sources), "-o", name])
        # Whoever compiles at the same time ends with the same file; nobody ever loads half of one.
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
    return target


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_COMPILE_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeBuildError(f"{command[0]}: {error}") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise NativeBuildError(f"{command[0]} ended with {done.returncode}: {lines[0] if lines else 'no message'}")
    return done.stdout
