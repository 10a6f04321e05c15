"""Layers over flat batches `[num_tokens, ...]`. Weights are plain tensors; callers run under `torch.inference_mode`."""

from __future__ import annotations

import functools
import math
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from agentserve.models.config import ModelConfig, RopeScaling
from agentserve.models.interface import (
    Attention,
    FusedOperations,
    HeadNormWeights,
    LayerAdapters,
    Product,
    ProjectedAttention,
    RotaryTables,
)
from agentserve_kernels.native import launch, library

_MLP_ROWS = 512
"""Enough to be bound by multiplying, not by reading the weights again for the next rows, on any GPU we know."""

Rotation: TypeAlias = tuple[Tensor, Tensor]
"""Cosine and signed sine of a batch, each `[num_tokens, 1, head_dim]`."""


_HAS_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


def cpu_computes_bfloat16() -> bool:
    """Whether this CPU multiplies matrices of bfloat16 (AMX), which is several times faster than float32."""
    return _HAS_ONEDNN and bool(torch.cpu.get_capabilities().get("amx_bf16", False))


@functools.cache
def native_kernels() -> Any:
    """The launchers of our C++ kernels, compiled if need be; None where they do not run."""
    try:
        library.load()
    except library.NativeBuildError:
        return None  # the executor says why when it chooses its attention
    return launch


class Linear:
    """`x @ weight.T + bias` for `weight` `[num_outputs, num_inputs]`."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, is_gated: bool = False) -> None:
        """`is_gated`: the first half of the outputs are gates of the second, as `activated` wants them; no bias."""
        self._weight = weight
        self._bias = bias
        self._is_gated = is_gated
        self._num_outputs, self._num_inputs = weight.shape
        self._packed = False
        """Whether the weight is laid out for oneDNN."""
        self._native: Any = None
        """The launchers of our kernels, if it is laid out for those."""

    def pack(self) -> Linear:
        """Lays the weight out for a CPU where that helps, keeps no plain copy; returns self.

        That is float32 (for oneDNN), and bfloat16 on a CPU that computes with it (for our kernels, else for oneDNN).

        A packed weight is read at full memory bandwidth whatever the batch size, so that a decode step for eight
        sequences takes hardly longer than one for a single sequence.
        """
        dtype = self._weight.dtype
        if not self._weight.is_cpu or self._packed or self._native is not None:
            return self
        if dtype is torch.bfloat16 and self._num_inputs % launch.INPUTS_AT_ONCE == 0:
            self._native = native_kernels()
        if self._native is not None:
            self._weight = self._native.pack_linear(self._weight.contiguous(), is_gated=self._is_gated)
        elif _HAS_ONEDNN and (dtype is torch.float32 or (dtype is torch.bfloat16 and cpu_computes_bfloat16())):
            self._weight = torch.ops.mkldnn._reorder_linear_weight(self._weight, None)
            self._packed = True
        return self

    @property
    def activates(self) -> bool:
        """Whether there is `activated`."""
        return self._native is not None and self._is_gated

    def activated(self, x: Tensor) -> Tensor:
        """`silu(gates) * values` in one pass, `[n, num_outputs / 2]`."""
        out = x.new_empty((x.shape[0], self._num_outputs // 2))
        self._native.linear(x, self._weight, out, num_outputs=self._num_outputs, is_gated=True, activates=True)
        return out

    def wide(self, x: Tensor) -> Tensor:
        """`self(x)` in float32, without rounding in between where that is to be had."""
        return self(x).float() if self._native is None else self._computed(x, torch.float32)

    def _computed(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        out = x.new_empty((x.shape[0], self._num_outputs), dtype=dtype)
        self._native.linear(
            x, self._weight, out, num_outputs=self._num_outputs, bias=self._bias, is_gated=self._is_gated
        )
        return out

    def __call__(self, x: Tensor) -> Tensor:
        if self._native is not None:
            return self._computed(x, x.dtype)
        if self._packed:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
            return y
        return functional.linear(x, self._weight, self._bias)

    def silu(self, x: Tensor) -> Tensor:
        """`silu(self(x))`; packed weights do it in one pass, without rounding in between."""
        if self._packed:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "swish", [], "")
            return y
        return functional.silu(self(x))

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """`self(x) + other`; packed weights do it in one pass."""
        return self._with("add", x, other) if self._packed else self(x).add_(other)

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """`self(x) * other`; packed weights do it in one pass."""
        return self._with("mul", x, other) if self._packed else self(x).mul_(other)

    def _with(self, operation: str, x: Tensor, other: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, self._weight, self._bias, operation)
        return y


class RMSNorm:
    """Scales each row to root mean square 1, then by `weight` (Zhang and Sennrich, 2019)."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self._weight = weight
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self._weight, self._eps)

    def after_adding(self, x: Tensor, residual: Tensor, operations: FusedOperations) -> Tensor:
        """`residual += x`, and the norm of the sum in the memory of `x`."""
        return operations.add_rms_norm(x, residual, self._weight, self._eps)


class HeadNorm:
    """RMSNorm of each query and key head on its own (Qwen3). Values pass through `[num_tokens, heads, head_dim]`."""

    def __init__(self, query: Tensor, key: Tensor, num_heads: int, num_kv_heads: int, eps: float) -> None:
        """`query` and `key` are the two weights, `[head_dim]` each."""
        self.weights = HeadNormWeights(query, key, eps)
        self._weight = torch.cat([query.expand(num_heads, -1), key.expand(num_kv_heads, -1)])
        self._eps = eps

    def __call__(self, query_key: Tensor) -> Tensor:
        return rms_norm(query_key, self._weight, self._eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scales the last dimension of `x` to root mean square 1, then by `weight`, rounding once at the end.

    `weight` is of the last dimensions of `x`, one or several. On a CPU torch's own makes more passes over the rows.
    """
    if not x.is_cpu:
        if weight.dim() == 1:
            return functional.rms_norm(x, list(weight.shape), weight, eps)
        return functional.rms_norm(x, [x.shape[-1]], None, eps) * weight
    y = x.to(torch.float32, copy=True)
    scale = torch.linalg.vector_norm(y, dim=-1, keepdim=True).square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
    return y.mul_(scale).mul_(weight).to(x.dtype)


class Rotary:
    """Rotary position embedding (Su et al., 2021) from tables for all positions, in the half-split layout."""

    def __init__(self, config: ModelConfig, *, device: torch.device, frequency_factors: Tensor | None = None) -> None:
        """`frequency_factors` `[head_dim / 2]` divide the frequencies; GGUF files state Llama 3 scaling that way."""
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
        frequencies = 1.0 / config.rope_theta**exponents
        if config.rope_scaling is not None:
            frequencies = scale_frequencies(frequencies, config.rope_scaling)
        if frequency_factors is not None:
            frequencies = frequencies / frequency_factors
        angles = torch.outer(torch.arange(config.max_position_embeddings).float(), frequencies)
        self._cos = angles.cos().to(device)
        self._sin = angles.sin().to(device)

    def at(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """The rotation of tokens at `positions` `[num_tokens]`, to be used by all layers."""
        cos = self._cos.index_select(0, positions)
        sin = self._sin.index_select(0, positions)
        # With the sign in the table, swapping the halves of a head needs no negation.
        both_cos, both_sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        return both_cos.unsqueeze(1).to(dtype), both_sin.unsqueeze(1).to(dtype)

    def tables(self, positions: Tensor) -> RotaryTables:
        """The same for an attention that rotates."""
        return RotaryTables(self._cos, self._sin, positions)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotates heads `[num_tokens, num_heads, head_dim]`."""
    cos, sin = rotation
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def scale_frequencies(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Frequencies `[head_dim / 2]` in radians a token, for a longer context than the model was first trained with."""
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    assert scaling.kind == "llama3", scaling.kind
    # Llama 3.1: wavelengths far below the old window stay, those beyond it are stretched, in between is a blend.
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return kept * frequencies + (1.0 - kept) * frequencies / scaling.factor


class SelfAttention:
    """Grouped-query attention with rotary embedding; the cache and the attention itself are the caller's."""

    def __init__(
        self, config: ModelConfig, layer: int, *, qkv: Linear, output: Linear, head_norm: HeadNorm | None = None
    ) -> None:
        """`qkv` yields queries, keys and values side by side: one matrix product is faster than three."""
        self._layer = layer
        self._qkv = qkv
        self._output = output
        self._head_norm = head_norm
        self._num_heads = config.num_heads
        self._num_kv_heads = config.num_kv_heads
        self._head_dim = config.head_dim

    def fused(
        self, x: Tensor, tables: RotaryTables, attention: ProjectedAttention, adapters: LayerAdapters | None
    ) -> Tensor:
        """Attention for the rows of `x` `[num_tokens, hidden_size]`; the residual is the caller's."""
        weights = None if self._head_norm is None else self._head_norm.weights
        projected = self._qkv(x)
        if adapters is not None:
            adapters.add(Product.QKV, x, projected)
        attended = attention.attend_projected(self._layer, projected, tables, weights)
        output = self._output(attended)
        if adapters is not None:
            adapters.add(Product.OUTPUT, attended, output)
        return output

    def __call__(
        self,
        x: Tensor,
        rotation: Rotation,
        attention: Attention,
        residual: Tensor,
        adapters: LayerAdapters | None,
    ) -> Tensor:
        """Attention for the rows of `x` `[num_tokens, hidden_size]`, plus `residual`."""
        projected = self._qkv(x)
        if adapters is not None:
            adapters.add(Product.QKV, x, projected)
        num_query_key = self._num_heads + self._num_kv_heads
        heads = projected.view(x.shape[0], num_query_key + self._num_kv_heads, self._head_dim)
        query_key = heads[:, :num_query_key]
        if self._head_norm is not None:
            query_key = self._head_norm(query_key)
        query_key = rotate(query_key, rotation)
        query, key = query_key[:, : self._num_heads], query_key[:, self._num_heads :]
        attended = attention.attend(self._layer, query, key, heads[:, num_query_key:])
        output = self._output.plus(attended, residual)
        if adapters is not None:
            adapters.add(Product.OUTPUT, attended, output)
        return output


class SwiGLU:
    """`down(silu(gate(x)) * up(x))` (Shazeer, 2020). Gate and up stay apart: in float32 that is as fast."""

    def __init__(self, gate: Linear, up: Linear, down: Linear) -> None:
        self._gate = gate
        self._up = up
        self._down = down

    def __call__(self, x: Tensor, residual: Tensor, adapters: LayerAdapters | None) -> Tensor:
        """The MLP for the rows of `x` `[num_tokens, hidden_size]`, plus `residual`."""
        activated = self._activated(x, adapters)
        output = self._down.plus(activated, residual)
        if adapters is not None:
            adapters.add(Product.DOWN, activated, output)
        return output

    def fused(
        self,
        x: Tensor,
        operations: FusedOperations,  # noqa: ARG002 - packed products fuse on their own
        adapters: LayerAdapters | None,
    ) -> Tensor:
        """The MLP for the rows of `x`; the residual is the caller's."""
        activated = self._activated(x, adapters)
        output = self._down(activated)
        if adapters is not None:
            adapters.add(Product.DOWN, activated, output)
        return output

    def _activated(self, x: Tensor, adapters: LayerAdapters | None) -> Tensor:
        if adapters is None:
            return self._up.times(x, self._gate.silu(x))
        gate, up = self._gate(x), self._up(x)
        adapters.add(Product.GATE, x, gate)
        adapters.add(Product.UP, x, up)
        return functional.silu(gate).mul_(up)


def joins_gate_up(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a model has a `JoinedSwiGLU`: where one of our kernels activates."""
    return device.type != "cpu" or (dtype is torch.bfloat16 and native_kernels() is not None)


class JoinedSwiGLU:
    """A `SwiGLU` whose gate and up are one matrix product, which one kernel activates.

    The result is the widest tensor of a model. It is made for some rows at a time, because torch's allocator keeps as
    much for every slot: for 2048 rows of Qwen2.5-7B it would be 155 MB in each.
    """

    def __init__(self, gate_up: Linear, down: Linear) -> None:
        """`gate_up` yields gates and ups side by side."""
        self._gate_up = gate_up
        self._down = down

    def __call__(self, x: Tensor, residual: Tensor, adapters: LayerAdapters | None) -> Tensor:
        """The MLP for the rows of `x` `[num_tokens, hidden_size]`, plus `residual`."""
        pieces = enumerate(torch.split(x, _MLP_ROWS))
        return torch.cat([self._rows(rows, adapters, index * _MLP_ROWS) for index, rows in pieces]).add_(residual)

    def fused(self, x: Tensor, operations: FusedOperations, adapters: LayerAdapters | None) -> Tensor:
        """The MLP for the rows of `x`, perhaps in their memory; the residual is the caller's."""
        if x.shape[0] <= _MLP_ROWS:
            return self._rows(x, adapters, 0, operations)
        for index, rows in enumerate(torch.split(x, _MLP_ROWS)):
            rows.copy_(self._rows(rows, adapters, index * _MLP_ROWS, operations))
        return x

    def _rows(
        self, x: Tensor, adapters: LayerAdapters | None, first_row: int, operations: FusedOperations | None = None
    ) -> Tensor:
        """The MLP for a few rows of a batch, from `first_row`."""
        if adapters is None and self._gate_up.activates:
            activated = self._gate_up.activated(x)
        else:
            gate_up = self._gate_up(x)
            if adapters is not None:
                adapters.add(Product.GATE_UP, x, gate_up, first_row)
            if operations is None:
                gate, up = gate_up.chunk(2, -1)
                activated = functional.silu(gate).mul_(up)
            else:
                activated = operations.silu_mul(gate_up)
        output = self._down(activated)
        if adapters is not None:
            adapters.add(Product.DOWN, activated, output, first_row)
        return output
