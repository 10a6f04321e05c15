"""Which attention runs on a device, and why."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from agentserve.errors import ConfigError
from agentserve.executors.pytorch.attention.paged_kernels import AttentionShape

AUTO = "auto"
_FLASHINFER_MIN_CAPABILITY = (8, 0)
_FLASHINFER_HEAD_DIMS = (64, 128, 256)
_FLASHINFER_MIN_VERSION = (0, 6)
_TRITON_MIN_CAPABILITY = (8, 0)
_TRITON_HEAD_DIMS = (64, 80, 96, 128, 256)
_TRITON_BLOCK_SIZES = (8, 16, 32, 64, 128)
_HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class AttentionFacts:
    """What the choice depends on."""

    device_type: str
    """`cpu` or `cuda`."""
    compute_capability: tuple[int, int] | None
    """None on a CPU."""
    shape: AttentionShape
    triton_version: str | None
    """None: not installed."""
    is_interpreted: bool
    """Whether Triton kernels run on the CPU, slowly: for tests (`TRITON_INTERPRET=1`)."""
    flashinfer_version: str | None
    can_build_flashinfer: bool
    """Whether there is a CUDA compiler, or modules that were compiled before. FlashInfer compiles what it needs."""
    native_obstacle: str | None = None
    """Why our C++ kernels do not run here; None on a CPU that they were compiled and loaded on."""


@dataclass(frozen=True, slots=True)
class AttentionChoice:
    """`native`, `mirror`, `flashinfer`, `triton` or `torch`, and a sentence why."""

    name: str
    reason: str
    is_fused: bool = False
    """Whether our kernels do what lies between the matrix products: rotation and writing, norms, activation."""


def choose_attention(wanted: str, facts: AttentionFacts) -> AttentionChoice:
    """Picks the attention; `wanted` is a name or `auto`.

    On a CPU `auto` means our C++ kernels if they run there, else dense mirrors. On a GPU it means FlashInfer if it is
    installed and can do it, else our Triton kernels, else torch, which is correct and slow.

    Raises ConfigError if what is wanted by name does not run here.
    """
    if wanted == AUTO:
        return _best(facts)
    if wanted not in _OBSTACLES:
        raise ConfigError(f"there is no attention {wanted!r}, only {', '.join((AUTO, *_OBSTACLES))}")
    obstacle = _OBSTACLES[wanted](facts)
    if obstacle is not None:
        raise ConfigError(f"{wanted} attention does not run here: {obstacle}")
    return _paged_choice(wanted, facts, ["it was asked for"])


def _best(facts: AttentionFacts) -> AttentionChoice:
    if facts.device_type == "cpu":
        obstacle = _no_native(facts)
        if obstacle is None:
            return _paged_choice("native", facts, [])
        return AttentionChoice("mirror", f"attention over dense mirrors (not native: {obstacle})")
    reasons: list[str] = []
    for name in ("flashinfer", "triton"):
        obstacle = _OBSTACLES[name](facts)
        if obstacle is None:
            return _paged_choice(name, facts, reasons)
        reasons.append(f"not {name}: {obstacle}")
    return _paged_choice("torch", facts, ["which is slow", *reasons])


def _paged_choice(name: str, facts: AttentionFacts, reasons: list[str]) -> AttentionChoice:
    """With the rest of a layer fused if that is possible beside the attention `name`."""
    fuses = name == "native"
    if name in {"flashinfer", "triton"}:
        obstacle = _no_triton(facts)
        fuses = obstacle is None
        if obstacle is not None:
            reasons = [*reasons, f"layers are not fused: {obstacle}"]
    because = f" ({'; '.join(reasons)})" if reasons else ""
    return AttentionChoice(name, f"{name} attention{because}", fuses)


def read_facts(torch_device: torch.device, shape: AttentionShape) -> AttentionFacts:
    """Looks at the device and at what is installed."""
    is_cuda = torch_device.type == "cuda"
    has_kernels = importlib.util.find_spec("agentserve_kernels") is not None
    return AttentionFacts(
        device_type=torch_device.type,
        compute_capability=torch.cuda.get_device_capability(torch_device) if is_cuda else None,
        shape=shape,
        triton_version=_version("triton") if has_kernels else None,
        is_interpreted=os.environ.get("TRITON_INTERPRET") == "1",
        flashinfer_version=_version("flashinfer-python"),
        can_build_flashinfer=_can_build_flashinfer(),
        native_obstacle=_native_obstacle(torch_device, shape),
    )


def _native_obstacle(torch_device: torch.device, shape: AttentionShape) -> str | None:
    """Compiles the kernels where they can run, if that has not been done."""
    if torch_device.type != "cpu":
        return "the C++ kernels are for CPUs"
    from agentserve_kernels.native import launch, library  # noqa: PLC0415 - a GPU needs neither

    hindrances = {
        f"the C++ kernels do not compute in {str(shape.dtype).removeprefix('torch.')}": shape.dtype
        is not torch.bfloat16,
        f"no C++ kernel for heads of {shape.head_dim}": shape.head_dim not in launch.HEAD_DIMS,
        f"no C++ kernel for blocks of {shape.block_size} tokens": shape.block_size not in launch.BLOCK_SIZES,
        f"more than {launch.MAX_GROUP} query heads share keys": shape.num_heads > launch.MAX_GROUP * shape.num_kv_heads,
    }
    found = [sentence for sentence, holds in hindrances.items() if holds]
    if found:
        return found[0]
    try:
        library.load()
    except library.NativeBuildError as error:
        return str(error)
    return None


def _no_native(facts: AttentionFacts) -> str | None:
    return facts.native_obstacle


def _no_mirror(facts: AttentionFacts) -> str | None:
    return None if facts.device_type == "cpu" else "mirrors are for CPUs"


def _no_torch(facts: AttentionFacts) -> str | None:  # noqa: ARG001 - runs anywhere
    return None


def _no_triton(facts: AttentionFacts) -> str | None:
    shape = facts.shape
    if facts.triton_version is None:
        return "Triton is not installed"
    if shape.head_dim not in _TRITON_HEAD_DIMS:
        return f"no kernel for heads of {shape.head_dim}"
    if shape.block_size not in _TRITON_BLOCK_SIZES:
        return f"no kernel for blocks of {shape.block_size} tokens"
    if facts.device_type == "cpu":
        return None if facts.is_interpreted else "Triton needs a GPU"
    return _too_old(facts, _TRITON_MIN_CAPABILITY)


def _no_flashinfer(facts: AttentionFacts) -> str | None:
    version, shape = facts.flashinfer_version, facts.shape
    if version is None:
        return "FlashInfer is not installed"
    if facts.device_type == "cpu":
        return "FlashInfer needs a GPU"
    hindrances = {
        f"FlashInfer {version} is older than {'.'.join(map(str, _FLASHINFER_MIN_VERSION))}": (
            _numbers(version) < _FLASHINFER_MIN_VERSION
        ),
        f"FlashInfer does not compute in {str(shape.dtype).removeprefix('torch.')}": shape.dtype not in _HALVES,
        f"FlashInfer has no kernel for heads of {shape.head_dim}": shape.head_dim not in _FLASHINFER_HEAD_DIMS,
        "FlashInfer needs a CUDA compiler, or modules that were compiled before": not facts.can_build_flashinfer,
    }
    found = [sentence for sentence, holds in hindrances.items() if holds]
    return found[0] if found else _too_old(facts, _FLASHINFER_MIN_CAPABILITY)


_OBSTACLES: dict[str, Callable[[AttentionFacts], str | None]] = {
    "native": _no_native,
    "mirror": _no_mirror,
    "flashinfer": _no_flashinfer,
    "triton": _no_triton,
    "torch": _no_torch,
}


def _too_old(facts: AttentionFacts, least: tuple[int, int]) -> str | None:
    capability = facts.compute_capability
    assert capability is not None, "a GPU has a compute capability"
    if capability >= least:
        return None
    return f"compute capability {capability[0]}.{capability[1]} is below {least[0]}.{least[1]}"


def _numbers(version: str) -> tuple[int, ...]:
    """`0.6.13.post1` -> (0, 6)."""
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _can_build_flashinfer() -> bool:
    if shutil.which("nvcc") is not None:
        return True
    home = os.environ.get("CUDA_HOME")
    if home is not None and (Path(home) / "bin" / "nvcc").exists():
        return True
    package = importlib.util.find_spec("flashinfer")
    if package is None or package.origin is None:
        return False
    return any((Path(package.origin).parent / "data" / "aot").glob("*/*.so"))
