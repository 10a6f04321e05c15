"""Norms and the activation of the MLP. Everything is computed in float32 and rounded once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from agentserve_kernels.checks import FLOAT_DTYPES, check_tensor, require
from agentserve_kernels.tuning import cdiv, next_power_of_two

_MAX_WIDTH = 32768
"""A row is held in the registers of one CTA."""

_SILU_TILE = 1024


@triton.jit
def _rms_norm_kernel(
    x,
    residual,
    weight,
    out,
    eps,
    stride_x,
    stride_residual,
    stride_out,
    adds: tl.constexpr,
    width: tl.constexpr,
    padded_width: tl.constexpr,
):
    """One row a program. With `adds`, `residual += x` comes first and the norm is that of the sum."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, padded_width)
    inside = columns < width
    values = tl.load(x + row * stride_x + columns, mask=inside, other=0.0).to(tl.float32)
    if adds:
        pointers = residual + row * stride_residual + columns
        # The norm sees what is stored, as if the sum had been an operation of its own.
        rounded = (values + tl.load(pointers, mask=inside, other=0.0).to(tl.float32)).to(residual.dtype.element_ty)
        tl.store(pointers, rounded, mask=inside)
        values = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / width + eps)
    factors = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * stride_out + columns, (values * scale * factors).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _silu_mul_kernel(gate_up, out, stride_in, stride_out, width, tile: tl.constexpr):
    """Programs `(row, tile)`: `silu(gate) * up`."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * tile + tl.arange(0, tile)
    inside = columns < width
    gate = tl.load(gate_up + row * stride_in + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride_in + width + columns, mask=inside, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * stride_out + columns, result.to(out.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """Scales each row of `x` `[n, width]` to root mean square 1 and by `weight` `[width]`, into `out` `[n, width]`.

    `out` may be `x`. The method is that of Zhang and Sennrich, 2019. Raises KernelArgumentError.
    """
    _launch_norm(x, None, weight, eps, out)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> None:
    """`residual += x`, then the RMSNorm of the sum into `out` (default: into `x`).

    `weight` is `[width]`, all others `[n, width]`.

    Raises KernelArgumentError.
    """
    _launch_norm(x, residual, weight, eps, x if out is None else out)


def silu_mul(gate_up: Tensor, out: Tensor) -> None:
    """`silu(gate) * up` for `gate_up` `[n, 2 * width]`, gates first, into `out` `[n, width]` (Shazeer, 2020).

    Raises KernelArgumentError.
    """
    check_tensor("out", out, (None, None), FLOAT_DTYPES)
    num_rows, width = out.shape
    check_tensor("gate_up", gate_up, (num_rows, 2 * width), (out.dtype,), out.device)
    if num_rows == 0:
        return
    _silu_mul_kernel[(num_rows, cdiv(width, _SILU_TILE))](
        gate_up, out, gate_up.stride(0), out.stride(0), width, tile=_SILU_TILE, num_warps=4
    )


def _launch_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor) -> None:
    check_tensor("x", x, (None, None), FLOAT_DTYPES)
    num_rows, width = x.shape
    check_tensor("weight", weight, (width,), FLOAT_DTYPES, x.device)
    check_tensor("out", out, (num_rows, width), (x.dtype,), x.device)
    if residual is not None:
        check_tensor("residual", residual, (num_rows, width), (x.dtype,), x.device)
    require(width <= _MAX_WIDTH, f"rows are {width} wide, expected at most {_MAX_WIDTH}")
    if num_rows == 0:
        return
    padded = next_power_of_two(width)
    _rms_norm_kernel[(num_rows,)](
        x,
        x if residual is None else residual,
        weight,
        out,
        eps,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        out.stride(0),
        adds=residual is not None,
        width=width,
        padded_width=padded,
        num_warps=min(16, max(1, padded // 512)),
    )
