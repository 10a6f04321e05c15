"""Compiles the kernels ahead of time for GPUs that need not be there, and reports what they take.

    python -m agentserve_kernels.compile_check [--arch 90] [--model qwen2.5-7b] [--kernel prefill] [--dtype float16]

The launchers themselves run, on tensors without data, and say what they would launch: so what is compiled here is what
runs there, tile sizes included. The exit code is 1 if something does not compile or does not fit.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from agentserve_kernels import attention, blocks, decode, elementwise, prefill, rope, sampling, tuning

ARCHITECTURES = (80, 86, 89, 90, 120)
_MODULES = (attention, blocks, decode, elementwise, prefill, rope, sampling)
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Shape:
    """What the kernels need to know of a model."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    vocab_size: int
    has_head_norm: bool = False


SHAPES = (
    Shape("qwen2.5-7b", 28, 4, 128, 3584, 18944, 28, 152064),
    Shape("qwen2.5-3b", 16, 2, 128, 2048, 11008, 36, 151936),
    Shape("smollm2-135m", 9, 3, 64, 576, 1536, 30, 49152),
    Shape("llama-3-8b", 32, 8, 128, 4096, 14336, 32, 128256),
    Shape("qwen3-0.6b", 16, 8, 128, 1024, 3072, 28, 151936, has_head_norm=True),
    Shape("qwen3-1.7b", 16, 8, 128, 2048, 6144, 28, 151936, has_head_norm=True),
    Shape("qwen3-4b", 32, 8, 128, 2560, 9728, 36, 151936, has_head_norm=True),
    Shape("qwen3-8b", 32, 8, 128, 4096, 12288, 36, 151936, has_head_norm=True),
    Shape("qwen3-14b", 40, 8, 128, 5120, 17408, 40, 151936, has_head_norm=True),
    Shape("qwen3-32b", 64, 8, 128, 5120, 25600, 64, 151936, has_head_norm=True),
)
"""Every model that has a name; what several have in common is compiled once."""


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch that a launcher asked for."""

    kernel: triton.JITFunction
    arguments: dict[str, Any]
    num_warps: int

    @property
    def name(self) -> str:
        return str(self.kernel.__name__).strip("_").removesuffix("_kernel")


@dataclass(frozen=True, slots=True)
class Report:
    """What ptxas made of a kernel; sizes in bytes."""

    model: str
    kernel: str
    variant: str
    arch: int
    num_warps: int
    num_stages: int
    registers: int
    shared_bytes: int
    shared_limit_bytes: int
    spill_bytes: int
    """Local memory of a thread: registers that did not fit."""

    @property
    def fits(self) -> bool:
        """Whether it can be launched."""
        threads = 32 * self.num_warps
        return self.shared_bytes <= self.shared_limit_bytes and self.registers * threads <= 65536


class _Recorder:
    """Stands where a kernel was and notes launches."""

    def __init__(self, kernel: triton.JITFunction, launches: list[Launch]) -> None:
        self._kernel = kernel
        self._launches = launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            arguments = dict(zip(self._kernel.arg_names, args, strict=False)) | kwargs
            num_warps = arguments.pop("num_warps")
            self._launches.append(Launch(self._kernel, arguments, num_warps))

        return launch


@contextmanager
def recorded(capability: tuple[int, int]) -> Iterator[list[Launch]]:
    """While it is open, launchers launch nothing; what they would launch on `capability` is in the list."""
    launches: list[Launch] = []
    with ExitStack() as stack:
        for module in _MODULES:
            if hasattr(module, "device_capability"):
                stack.enter_context(mock.patch.object(module, "device_capability", lambda _: capability))
            for name, value in list(vars(module).items()):
                if isinstance(value, triton.JITFunction) and name.endswith("_kernel"):
                    stack.enter_context(mock.patch.object(module, name, _Recorder(value, launches)))
        yield launches


def launches_of(shape: Shape, capability: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> dict[str, Launch]:
    """All launches of a model, by kernel and variant."""
    found: dict[str, Launch] = {}
    for variant, calls in _VARIANTS.items():
        with recorded(capability) as launches:
            calls(shape, dtype)
        for launch in launches:
            found.setdefault(f"{launch.name}/{variant}", launch)
    return found


def compile_launch(launch: Launch, arch: int) -> triton.compiler.CompiledKernel:
    """Compiles for compute capability `arch / 10`, as a launch would: with the same hints about sizes and alignment."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], object] = {}
    hints: dict[tuple[int, ...], list[list[object]]] = {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        specializes = isinstance(value, int) and not parameter.do_not_specialize
        is_constant = parameter.is_constexpr or (specializes and value == 1)
        kind = signature[parameter.name] = "constexpr" if is_constant else _type_of(value)
        if kind == "constexpr":
            constants[index,] = value
        elif isinstance(value, torch.Tensor) or (specializes and isinstance(value, int) and value % 16 == 0):
            hints[index,] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, hints)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": launch.num_warps})


def check(
    archs: Iterable[int] = ARCHITECTURES,
    shapes: Iterable[Shape] = SHAPES,
    *,
    kernels: str = "",
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[Report]:
    """Compiles everything whose `kernel/variant` contains `kernels`; a failure is the compiler's own exception."""
    shapes = tuple(shapes)
    for arch in archs:
        capability = divmod(arch, 10)
        for shape in shapes:
            for key, launch in launches_of(shape, capability, dtype).items():
                if kernels not in key:
                    continue
                kernel, variant = key.split("/")
                compiled = compile_launch(launch, arch)
                registers, spill_bytes = resources(compiled.asm["cubin"])
                yield Report(
                    model=shape.name,
                    kernel=kernel,
                    variant=variant,
                    arch=arch,
                    num_warps=launch.num_warps,
                    num_stages=launch.arguments.get("stages", 1),
                    registers=registers,
                    shared_bytes=compiled.metadata.shared,
                    shared_limit_bytes=tuning.shared_memory_limit_bytes(capability),
                    spill_bytes=spill_bytes,
                )


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory of a thread, read from the binary by the tool that comes with Triton."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "-res-usage", path], check=True, capture_output=True, text=True).stdout
    registers, stack, local = (re.search(rf"\b{name}:(\d+)", text) for name in ("REG", "STACK", "LOCAL"))
    if registers is None or stack is None or local is None:
        raise RuntimeError(f"cuobjdump said nothing of registers: {text!r}")
    return int(registers[1]), max(int(stack[1]), int(local[1]))


def _type_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + _TYPES[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -_INT32_MAX <= value <= _INT32_MAX else "i64"
    if isinstance(value, float):
        return "fp32"
    raise TypeError(f"a kernel cannot take {type(value)}")


_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
}


def _empty(*sizes: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(sizes, dtype=dtype, device="meta")


def _pages(shape: Shape, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    pool = _empty(4096, shape.num_layers, 2, shape.num_kv_heads, 16, shape.head_dim, dtype=dtype)
    return pool[:, 1, 0], pool[:, 1, 1]


def _prefill(num_tokens: int, num_sequences: int, *, splits: bool) -> Callable[[Shape, torch.dtype], None]:
    def run(shape: Shape, dtype: torch.dtype) -> None:
        query = _empty(num_tokens, shape.num_heads, shape.head_dim, dtype=dtype)
        ints = (_empty(num_sequences + 1, dtype=torch.int32), _empty(num_sequences, dtype=torch.int32))
        tables = _empty(num_sequences, 1024, dtype=torch.int32)
        scratch = attention.DecodeScratch(1 << 20, shape.head_dim, device="meta") if splits else None
        pages = _pages(shape, dtype)
        prefill.paged_prefill(query, *pages, query, *ints, tables, scratch, scale=0.1, num_units=132)

    return run


def _decode(num_sequences: int, max_blocks: int) -> Callable[[Shape, torch.dtype], None]:
    def run(shape: Shape, dtype: torch.dtype) -> None:
        query = _empty(num_sequences, shape.num_heads, shape.head_dim, dtype=dtype)
        lengths = _empty(num_sequences, dtype=torch.int32)
        tables = _empty(num_sequences, max_blocks, dtype=torch.int32)
        scratch = attention.DecodeScratch(1 << 20, shape.head_dim, device="meta")
        pages = _pages(shape, dtype)
        decode.paged_decode(query, *pages, query, lengths, tables, scratch, scale=0.1, num_units=132)

    return run


def _others(shape: Shape, dtype: torch.dtype) -> None:
    """One launch of every other kernel, for 8 tokens."""
    heads = shape.num_heads + 2 * shape.num_kv_heads
    qkv = _empty(8, heads * shape.head_dim, dtype=dtype)
    table = _empty(32768, shape.head_dim // 2, dtype=torch.float32)
    int64 = _empty(8, dtype=torch.int64)
    query = _empty(8, shape.num_heads, shape.head_dim, dtype=dtype)
    weight = _empty(shape.head_dim, dtype=dtype) if shape.has_head_norm else None
    rope.rope_and_write(
        qkv, table, table, *_pages(shape, dtype), int64, query,
        positions=int64, q_weight=weight, k_weight=weight, eps=1e-6,
    )  # fmt: skip
    hidden = _empty(8, shape.hidden_size, dtype=dtype)
    norm = _empty(shape.hidden_size, dtype=dtype)
    elementwise.add_rms_norm(hidden, hidden, norm, 1e-6)
    gate_up = _empty(8, 2 * shape.intermediate_size, dtype=dtype)
    elementwise.silu_mul(gate_up, gate_up[:, : shape.intermediate_size])
    pool = _empty(64, shape.num_layers, 2, shape.num_kv_heads, 16, shape.head_dim, dtype=dtype)
    blocks.gather_blocks(pool, _empty(8, dtype=torch.int32), pool[:8], num_units=4)
    logits = _empty(8, shape.vocab_size, dtype=torch.float32)
    floats, int32 = _empty(8, dtype=torch.float32), _empty(8, dtype=torch.int32)
    scratch = sampling.SampleScratch(8, shape.vocab_size, device="meta")
    sampling.sample(
        logits, floats, int32, floats, floats, _empty(8, dtype=torch.float64), int64, int32, scratch,
        num_candidates=None,
    )  # fmt: skip


def _plain(shape: Shape, dtype: torch.dtype) -> None:
    """The other forms of kernels that have two: a norm without an addition, blocks on their way back."""
    hidden = _empty(8, shape.hidden_size, dtype=dtype)
    elementwise.rms_norm(hidden, _empty(shape.hidden_size, dtype=dtype), 1e-6, hidden)
    pool = _empty(64, shape.num_layers, 2, shape.num_kv_heads, 16, shape.head_dim, dtype=dtype)
    blocks.scatter_blocks(pool[:8], _empty(8, dtype=torch.int32), pool, num_units=4)


_VARIANTS: dict[str, Callable[[Shape, torch.dtype], None]] = {
    "long": _prefill(4096, 1, splits=False),
    "resume": _prefill(16, 1, splits=True),
    "few-rows": _prefill(4, 4, splits=True),
    "split": _decode(8, 1024),
    "whole": _decode(256, 64),
    "": _others,
    "plain": _plain,
}


def main() -> int:
    """Compiles, prints a table, returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--arch", type=int, action="append", choices=ARCHITECTURES, help="may be repeated; default: all"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    names = [shape.name for shape in SHAPES]
    parser.add_argument("--model", action="append", choices=names, help="may be repeated; default: all")
    parser.add_argument("--kernel", default="", help="only those whose name contains this")
    parser.add_argument("--json", type=Path, help="write the reports to this file")
    options = parser.parse_args()
    shapes = [shape for shape in SHAPES if not options.model or shape.name in options.model]
    reports = []
    header = (
        f"{'arch':>4} {'model':<14} {'kernel':<24} {'warps':>5} {'stages':>6} {'regs':>5} {'spill':>6} {'shared':>7}"
    )
    print(header)  # noqa: T201
    for report in check(
        options.arch or ARCHITECTURES, shapes, kernels=options.kernel, dtype=getattr(torch, options.dtype)
    ):
        reports.append(report)
        name = f"{report.kernel} {report.variant}"
        note = "" if report.fits else f"  DOES NOT FIT: limit {report.shared_limit_bytes}"
        print(  # noqa: T201
            f"{report.arch:>4} {report.model:<14} {name:<24} {report.num_warps:>5} {report.num_stages:>6} "
            f"{report.registers:>5} {report.spill_bytes:>6} {report.shared_bytes:>7}{note}",
            flush=True,
        )
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(report) for report in reports], indent=1) + "\n", encoding="utf-8")
    return 0 if all(report.fits for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
