"""What a machine says about itself, asked without torch: the driver through `libcuda`, the rest from the system.

`Probe` is what `build/doctor.py` asks, so that tests answer for machines that nobody has at hand.
"""

from __future__ import annotations

import ast
import ctypes
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil

from agentserve.errors import AgentServeError
from agentserve.executors.pytorch.devices.cuda_driver import driver_library, load_driver
from agentserve.executors.pytorch.devices.green_contexts import make_plan, read_facts
from agentserve.executors.pytorch.devices.green_plan import DeviceFacts
from agentserve.models.aliases import ALIASES
from agentserve.models.registry import ModelSource, resolve_model
from agentserve_kernels.native import compiler

_SMI_QUERY = ("--query-gpu=uuid,driver_version,memory.free", "--format=csv,noheader,nounits")
_SMI_TIMEOUT_S, _NVCC_TIMEOUT_S, _TORCH_TIMEOUT_S = 20.0, 20.0, 120.0
_ATTRIBUTE_SM_COUNT, _ATTRIBUTE_MAJOR, _ATTRIBUTE_MINOR = 16, 75, 76
"""Numbers of `CUdevice_attribute` in `cuda.h`."""
_TORCH_CODE = """
import json, torch
found = {"available": torch.cuda.is_available(), "archs": torch.cuda.get_arch_list(), "error": ""}
try:
    torch.cuda.init()
except Exception as error:
    found["error"] = str(error).splitlines()[0]
print(json.dumps(found))
"""


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """One GPU."""

    index: int
    name: str
    compute_capability: tuple[int, int]
    compute_units: int
    """Streaming multiprocessors."""
    memory_bytes: int
    free_bytes: int | None = None
    """None where nothing says so."""


@dataclass(frozen=True, slots=True)
class DriverFacts:
    """The NVIDIA driver and what it sees."""

    version: str | None = None
    """As in `580.95.05`; None where nothing says so."""
    cuda: tuple[int, int] | None = None
    """The newest CUDA that it runs; None without a driver."""
    gpus: tuple[GpuFacts, ...] = ()
    error: str | None = None
    """The name of the driver's error, if it is installed and does not work."""


@dataclass(frozen=True, slots=True)
class GreenFacts:
    """Whether and how the driver splits GPU 0."""

    device: DeviceFacts | None = None
    """What the driver says; None if it cannot be asked."""
    plan: str | None = None
    """The slots in words; None if there are none."""
    error: str | None = None


@dataclass(frozen=True, slots=True)
class TorchFacts:
    """An installed torch."""

    version: str
    cuda: str | None
    """The CUDA that it was built for; None for a build without."""
    sees_gpu: bool | None = None
    """None: not tried, because there is no GPU or the build has no CUDA."""
    archs: tuple[str, ...] = ()
    """Architectures that it has kernels for, as `sm_90`; empty where not tried."""
    error: str = ""
    """Why it cannot use the GPU."""


@dataclass(frozen=True, slots=True)
class ProcessorFacts:
    """The CPU, as far as this process may use it."""

    name: str
    num_cores: int
    """That this process may run on."""
    num_physical_cores: int | None
    features: tuple[str, ...]
    """Extensions that decide how fast it multiplies matrices."""
    compiler: str | None
    """The C++ compiler that would compile our kernels for it."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A model that has a name."""

    name: str
    path: str | None
    """Where its weights are; None if there are none on this machine."""
    kind: str | None
    weight_bytes: int
    """Of the files, or of bfloat16 weights of the published shape."""
    error: str | None = None
    """Why the files that are there cannot be used."""


class Probe(Protocol):
    """What the doctor asks. Nothing of it raises: what cannot be found out is None or empty."""

    def python(self) -> tuple[int, int, int]: ...

    def versions(self, distributions: tuple[str, ...]) -> Mapping[str, str | None]:
        """Versions of installed distributions, None for those that are not there."""
        ...

    def driver(self) -> DriverFacts: ...

    def green_contexts(self) -> GreenFacts:
        """Asks the driver which splits it offers; nothing is made or reserved."""
        ...

    def torch(self, *, try_gpu: bool) -> TorchFacts | None:
        """None if it is not installed. `try_gpu` starts a process that uses the GPU: some seconds."""
        ...

    def nvcc(self) -> str | None:
        """The version of the CUDA compiler."""
        ...

    def processor(self) -> ProcessorFacts: ...

    def memory(self) -> tuple[int, int]:
        """Bytes in all and bytes that are free."""
        ...

    def models(self) -> tuple[ModelFacts, ...]:
        """All aliases."""
        ...

    def address_error(self, host: str, port: int) -> str | None:
        """Why nobody could listen there, None if somebody could."""
        ...


class SystemProbe:
    """This machine."""

    def python(self) -> tuple[int, int, int]:
        return sys.version_info[:3]

    def versions(self, distributions: tuple[str, ...]) -> Mapping[str, str | None]:
        return {name: _version(name) for name in distributions}

    def driver(self) -> DriverFacts:
        library = driver_library()
        if library is None:
            return DriverFacts()
        return read_driver(library, _run("nvidia-smi", *_SMI_QUERY, timeout_s=_SMI_TIMEOUT_S))

    def green_contexts(self) -> GreenFacts:
        device = None
        try:
            driver = load_driver()
            device = read_facts(driver)
            return GreenFacts(device, make_plan(driver, device).describe())
        except AgentServeError as error:
            return GreenFacts(device, error=str(error))

    def torch(self, *, try_gpu: bool) -> TorchFacts | None:
        version, spec = _version("torch"), importlib.util.find_spec("torch")
        if version is None or spec is None or spec.origin is None:
            return None
        cuda = torch_cuda(Path(spec.origin).with_name("version.py").read_text(encoding="utf-8"))
        if cuda is None or not try_gpu:
            return TorchFacts(version, cuda)
        answer = _run(sys.executable, "-c", _TORCH_CODE, timeout_s=_TORCH_TIMEOUT_S)
        if answer is None:
            return TorchFacts(version, cuda, False, (), "it did not answer")
        found = json.loads(answer.splitlines()[-1])
        return TorchFacts(version, cuda, found["available"], tuple(found["archs"]), found["error"])

    def nvcc(self) -> str | None:
        home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
        program = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
        answer = _run(program, "--version", timeout_s=_NVCC_TIMEOUT_S) if program else None
        found = re.search(r"release (\d+\.\d+)", answer or "")
        return found[1] if found else None

    def processor(self) -> ProcessorFacts:
        path = Path("/proc/cpuinfo")
        name, features = read_cpuinfo(path.read_text(encoding="utf-8") if path.is_file() else "")
        allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count() or 1
        cores = psutil.cpu_count(False)
        return ProcessorFacts(name or platform.processor() or "unknown", allowed, cores, features, compiler.find())

    def memory(self) -> tuple[int, int]:
        memory = psutil.virtual_memory()
        return memory.total, memory.available

    def models(self) -> tuple[ModelFacts, ...]:
        return tuple(model_facts(name) for name in ALIASES)

    def address_error(self, host: str, port: int) -> str | None:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind, protocol) as probe:
                # As the server does: a port that was just closed is free.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except OSError as error:
            return error.strerror or str(error)
        return None


# ---- reading ----


def read_driver(library: Any, smi: str | None) -> DriverFacts:
    """Asks `libcuda`; `smi` is what nvidia-smi said of UUIDs, driver and free memory, or None."""
    lines = [[part.strip() for part in line.split(",")] for line in (smi or "").splitlines()]
    rows = {fields[0]: fields for fields in lines if len(fields) == 3}
    version = next((fields[1] for fields in rows.values()), None)
    # Answered without `cuInit`, too: it says what a driver is that finds no device.
    number = _int(library.cuDriverGetVersion)
    cuda = (number // 1000, number % 1000 // 10)
    code = library.cuInit(0)
    if code:
        return DriverFacts(version, cuda, (), _error_name(library, code))
    gpus = tuple(_read_gpu(library, index, rows) for index in range(_int(library.cuDeviceGetCount)))
    return DriverFacts(version, cuda, gpus)


def _read_gpu(library: Any, index: int, rows: Mapping[str, list[str]]) -> GpuFacts:
    device, memory = ctypes.c_int(), ctypes.c_size_t()
    name, uuid = ctypes.create_string_buffer(256), ctypes.create_string_buffer(16)
    library.cuDeviceGet(ctypes.byref(device), index)
    library.cuDeviceGetName(name, len(name), device)
    library.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    library.cuDeviceGetUuid(uuid, device)
    digits = uuid.raw.hex()
    key = f"GPU-{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"
    free_mib = rows[key][2] if key in rows else ""

    def attribute(which: int) -> int:
        value = ctypes.c_int()
        library.cuDeviceGetAttribute(ctypes.byref(value), which, device)
        return value.value

    return GpuFacts(
        index=index,
        name=name.value.decode(errors="replace"),
        compute_capability=(attribute(_ATTRIBUTE_MAJOR), attribute(_ATTRIBUTE_MINOR)),
        compute_units=attribute(_ATTRIBUTE_SM_COUNT),
        memory_bytes=memory.value,
        free_bytes=int(free_mib) << 20 if free_mib.isdigit() else None,
    )


def _int(function: Any) -> int:
    value = ctypes.c_int()
    function(ctypes.byref(value))
    return value.value


def _error_name(library: Any, code: int) -> str:
    text = ctypes.c_char_p()
    library.cuGetErrorName(code, ctypes.byref(text))
    return text.value.decode() if text.value else f"error {code}"


def torch_cuda(source: str) -> str | None:
    """The CUDA version in the text of `torch/version.py`, or None."""
    found = re.search(r"^cuda\b[^=\n]*=\s*(.+)$", source, re.MULTILINE)
    value = ast.literal_eval(found[1].strip()) if found else None
    return str(value) if value else None


def read_cpuinfo(text: str) -> tuple[str, tuple[str, ...]]:
    """Name and matrix extensions of the processor, from `/proc/cpuinfo`."""
    name = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    flags = re.search(r"^flags\s*: (.*)$", text, re.MULTILINE)
    known = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
    present = set(flags[1].split()) if flags else set()
    return (name[1].strip() if name else ""), tuple(flag for flag in known if flag in present)


def model_facts(name: str) -> ModelFacts:
    """What is known of an alias."""
    published_bytes = 2 * ALIASES[name].config.num_parameters
    try:
        source = resolve_model(name)
    except AgentServeError as error:
        return ModelFacts(name, None, None, published_bytes, str(error))
    if source.path is None:
        return ModelFacts(name, None, None, published_bytes)
    return ModelFacts(name, str(source.path), source.kind, _weight_bytes(source))


def _weight_bytes(source: ModelSource) -> int:
    assert source.path is not None
    files = [source.path] if source.path.is_file() else list(source.path.glob("*.safetensors"))
    return sum(file.stat().st_size for file in files)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _run(*command: str, timeout_s: float) -> str | None:
    """Output of a program; None if it is not there, fails or takes too long."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout_s)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout if result.returncode == 0 else None
