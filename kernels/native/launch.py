"""Launchers: the arguments of the Triton kernels, for tensors of bfloat16 in host memory.

A launcher is called several times a layer, and a look at a tensor takes longer than a small kernel. So each first asks
in one expression whether all is well, and looks closer only to say what is wrong. Values (lengths, block ids, slots,
positions) are trusted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agentserve_kernels.checks import check_pages, check_tensor, require
from agentserve_kernels.native.library import load

HEAD_DIMS = (64, 96, 128, 256)
BLOCK_SIZES = (16, 32, 64, 128)
"""Multiples of the 16 keys that are read at once."""
MAX_GROUP = 16
"""Query heads that may share a KV head."""

_BF16 = (torch.bfloat16,)
_OUT_DTYPES = (torch.bfloat16, torch.float32)
_bf16, _int32, _int64, _float32 = torch.bfloat16, torch.int32, torch.int64, torch.float32


def paged_decode(
    query: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    out: Tensor,
    kv_lengths: Tensor,
    block_tables: Tensor,
    *,
    scale: float,
) -> None:
    """Attention of one token a sequence; see `agentserve_kernels.decode.paged_decode`. A length of 0 is padding.

    query, out      [s, num_heads, head_dim]
    k_pages         [num_blocks, num_kv_heads, block_size, head_dim], any stride in axis 0; v_pages likewise
    kv_lengths      [s] int32
    block_tables    [s, width] int32

    Raises KernelArgumentError, MemoryError without room for a workspace.
    """
    _check_attention(query, k_pages, v_pages, out, kv_lengths, block_tables)
    require(kv_lengths.shape[0] == query.shape[0], "kv_lengths and query differ in length")
    status = load().paged_decode(
        query.data_ptr(),
        k_pages.data_ptr(),
        v_pages.data_ptr(),
        k_pages.stride(0),
        out.data_ptr(),
        kv_lengths.data_ptr(),
        block_tables.data_ptr(),
        block_tables.stride(0),
        *query.shape[:2],
        k_pages.shape[1],
        query.shape[2],
        k_pages.shape[2],
        scale,
    )
    _check_status(status)


def paged_prefill(
    query: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    out: Tensor,
    query_starts: Tensor,
    kv_lengths: Tensor,
    block_tables: Tensor,
    *,
    scale: float,
) -> None:
    """Causal attention of chunks; see `agentserve_kernels.prefill.paged_prefill`.

    query, out      [n, num_heads, head_dim]; rows `query_starts[i] .. query_starts[i + 1]` are the last of sequence i
    query_starts    [s + 1] int32
    kv_lengths      [s] int32, chunks included; block_tables `[s, width]` int32

    Keys and values of a sequence are laid out anew for each call, in a workspace that the calling thread keeps: as much
    memory as they take in a layer. Raises KernelArgumentError, MemoryError without room for it.
    """
    _check_attention(query, k_pages, v_pages, out, kv_lengths, block_tables)
    if not (query_starts.dtype is _int32 and query_starts.is_contiguous() and len(query_starts) == len(kv_lengths) + 1):
        check_tensor("query_starts", query_starts, (kv_lengths.shape[0] + 1,), (torch.int32,))
    status = load().paged_prefill(
        query.data_ptr(),
        k_pages.data_ptr(),
        v_pages.data_ptr(),
        k_pages.stride(0),
        out.data_ptr(),
        query_starts.data_ptr(),
        kv_lengths.data_ptr(),
        block_tables.data_ptr(),
        block_tables.stride(0),
        kv_lengths.shape[0],
        query.shape[1],
        k_pages.shape[1],
        query.shape[2],
        k_pages.shape[2],
        scale,
    )
    _check_status(status)


def rope_and_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    query_out: Tensor,
    *,
    positions: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Norms (if there are weights) and rotates queries and keys; writes keys and values into their pages.

    See `agentserve_kernels.rope.rope_and_write`; `cos` and `sin` are tables `[max_positions, head_dim / 2]`. Raises
    KernelArgumentError.
    """
    num_tokens, num_heads, head_dim = query_out.shape
    num_kv_heads = k_pages.shape[1]
    if not (
        qkv.dtype is _bf16
        and query_out.dtype is _bf16
        and qkv.shape == (num_tokens, (num_heads + 2 * num_kv_heads) * head_dim)
        and qkv.stride(1) == 1
        and query_out.is_contiguous()
        and cos.dtype is sin.dtype is _float32
        and cos.shape == sin.shape
        and cos.shape[1] * 2 == head_dim
        and cos.is_contiguous()
        and sin.is_contiguous()
        and slots.dtype is positions.dtype is _int64
        and slots.shape == positions.shape == (num_tokens,)
        and slots.is_contiguous()
        and positions.is_contiguous()
        and _are_head_weights(q_weight, k_weight, head_dim)
        and _pages_fit(k_pages, v_pages, num_heads, head_dim)
    ):
        _check_rope(qkv, cos, sin, k_pages, v_pages, slots, query_out, positions, q_weight, k_weight)
    load().rope_and_write(
        qkv.data_ptr(),
        qkv.stride(0),
        cos.data_ptr(),
        sin.data_ptr(),
        cos.stride(0),
        positions.data_ptr(),
        None if q_weight is None else q_weight.data_ptr(),
        None if k_weight is None else k_weight.data_ptr(),
        eps,
        query_out.data_ptr(),
        k_pages.data_ptr(),
        v_pages.data_ptr(),
        k_pages.stride(0),
        slots.data_ptr(),
        num_tokens,
        num_heads,
        num_kv_heads,
        head_dim,
        k_pages.shape[2],
    )


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    """`residual += x`, and the RMSNorm of the sum in the memory of `x`; both `[n, width]`.

    Raises KernelArgumentError.
    """
    num_rows, width = x.shape
    if not (
        x.dtype is residual.dtype is weight.dtype is _bf16
        and residual.shape == x.shape
        and weight.shape == (width,)
        and x.is_contiguous()
        and residual.is_contiguous()
        and weight.is_contiguous()
    ):
        check_tensor("x", x, (None, None), _BF16)
        check_tensor("residual", residual, (num_rows, width), _BF16)
        check_tensor("weight", weight, (width,), _BF16)
    load().add_rms_norm(
        x.data_ptr(),
        x.stride(0),
        residual.data_ptr(),
        residual.stride(0),
        weight.data_ptr(),
        num_rows,
        width,
        eps,
    )


def silu_mul(gate_up: Tensor, out: Tensor) -> None:
    """`silu(gate) * up` of `[n, 2 * width]`, gates first, into `[n, width]`: perhaps the gates' own memory.

    Raises KernelArgumentError.
    """
    num_rows, width = out.shape
    if not (
        gate_up.dtype is out.dtype is _bf16
        and gate_up.shape == (num_rows, 2 * width)
        and gate_up.is_contiguous()
        and out.stride(1) == 1
    ):
        check_tensor("gate_up", gate_up, (num_rows, 2 * width), _BF16)
        check_tensor("out", out, (None, None), _BF16)
    load().silu_mul(gate_up.data_ptr(), gate_up.stride(0), out.data_ptr(), out.stride(0), num_rows, width)


INPUTS_AT_ONCE = 32
"""The inputs of a product with packed weights are a multiple of so many."""
_OUTPUTS_AT_ONCE = 32
_PLAIN, _GATED, _ACTIVATED = range(3)


def pack_linear(weight: Tensor, *, is_gated: bool = False) -> Tensor:
    """Lays `weight` `[num_outputs, num_inputs]` out for `linear`: `[n]`, of the same size up to padding.

    With `is_gated` the first half of its rows are gates and the second what they gate; a half is a multiple of 16.
    Raises KernelArgumentError.
    """
    check_tensor("weight", weight, (None, None), _BF16, num_packed=2)
    num_outputs, num_inputs = weight.shape
    require(num_inputs % INPUTS_AT_ONCE == 0, f"num_inputs is {num_inputs}, no multiple of {INPUTS_AT_ONCE}")
    require(not is_gated or num_outputs % _OUTPUTS_AT_ONCE == 0, f"{num_outputs} gates and values are not blocks of 32")
    packed = weight.new_empty(-(-num_outputs // _OUTPUTS_AT_ONCE) * _OUTPUTS_AT_ONCE * num_inputs)
    load().pack_linear(weight.data_ptr(), packed.data_ptr(), num_outputs, num_inputs, is_gated)
    return packed


def linear(
    x: Tensor,
    packed: Tensor,
    out: Tensor,
    *,
    num_outputs: int,
    bias: Tensor | None = None,
    is_gated: bool = False,
    activates: bool = False,
) -> None:
    """`x W^T + bias` for weights `W` that `pack_linear` laid out.

    x             [n, num_inputs]
    out           [n, num_outputs], bfloat16 or float32; with `activates` [n, num_outputs / 2]
    num_outputs   of the weights
    bias          [num_outputs]; not with gated weights
    is_gated      as it was packed; then `activates` makes it `silu(gates) * values`

    Raises KernelArgumentError, MemoryError without room for a workspace.
    """
    num_rows, num_inputs = x.shape
    if not (
        x.dtype is packed.dtype is _bf16
        and x.stride(1) == 1
        and len(packed) == -(-num_outputs // _OUTPUTS_AT_ONCE) * _OUTPUTS_AT_ONCE * num_inputs
        and out.shape == (num_rows, num_outputs // 2 if activates else num_outputs)
        and out.is_contiguous()
        and out.dtype in _OUT_DTYPES
        and (
            bias is None
            or (not is_gated and bias.dtype is _bf16 and bias.shape == (num_outputs,) and bias.is_contiguous())
        )
        and (is_gated or not activates)
    ):
        _check_linear(x, packed, out, num_outputs, bias, is_gated=is_gated, activates=activates)
    status = load().linear(
        x.data_ptr(),
        x.stride(0),
        packed.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        out.stride(0),
        num_rows,
        num_outputs,
        num_inputs,
        _ACTIVATED if activates else _GATED if is_gated else _PLAIN,
        out.dtype is _float32,
    )
    _check_status(status)


def _check_linear(
    x: Tensor, packed: Tensor, out: Tensor, num_outputs: int, bias: Tensor | None, *, is_gated: bool, activates: bool
) -> None:
    require(is_gated or not activates, "only gated weights can be activated")
    require(bias is None or not is_gated, "gated weights have no bias")
    num_rows, num_inputs = x.shape
    check_tensor("x", x, (None, None), _BF16)
    size = -(-num_outputs // _OUTPUTS_AT_ONCE) * _OUTPUTS_AT_ONCE * num_inputs
    check_tensor("packed", packed, (size,), _BF16)
    check_tensor("out", out, (num_rows, num_outputs // 2 if activates else num_outputs), _OUT_DTYPES)
    if bias is not None:
        check_tensor("bias", bias, (num_outputs,), _BF16)


def _check_attention(
    query: Tensor, k_pages: Tensor, v_pages: Tensor, out: Tensor, kv_lengths: Tensor, block_tables: Tensor
) -> None:
    _, num_heads, head_dim = query.shape
    if (
        query.dtype is out.dtype is _bf16
        and out.shape == query.shape
        and query.is_contiguous()
        and out.is_contiguous()
        and kv_lengths.dtype is block_tables.dtype is _int32
        and kv_lengths.is_contiguous()
        and block_tables.stride(1) == 1
        and block_tables.shape[0] == kv_lengths.shape[0]
        and _pages_fit(k_pages, v_pages, num_heads, head_dim)
    ):
        return
    _check_pages(k_pages, v_pages, num_heads, head_dim)
    check_tensor("query", query, (None, None, None), _BF16, num_packed=3)
    check_tensor("out", out, tuple(query.shape), _BF16, num_packed=3)
    check_tensor("kv_lengths", kv_lengths, (None,), (torch.int32,))
    check_tensor("block_tables", block_tables, (kv_lengths.shape[0], None), (torch.int32,))


def _check_rope(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    query_out: Tensor,
    positions: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
) -> None:
    num_tokens, num_heads, head_dim = query_out.shape
    _check_pages(k_pages, v_pages, num_heads, head_dim)
    check_tensor("qkv", qkv, (num_tokens, (num_heads + 2 * k_pages.shape[1]) * head_dim), _BF16)
    check_tensor("query_out", query_out, (None, None, None), _BF16, num_packed=3)
    for name, table in (("cos", cos), ("sin", sin)):
        check_tensor(name, table, (None, head_dim // 2), (torch.float32,))
    require(cos.shape == sin.shape and cos.stride() == sin.stride(), "cos and sin differ in shape or strides")
    for name, indices in (("slots", slots), ("positions", positions)):
        check_tensor(name, indices, (num_tokens,), (torch.int64,))
    require((q_weight is None) == (k_weight is None), "q_weight and k_weight go together")
    if q_weight is not None and k_weight is not None:
        check_tensor("q_weight", q_weight, (head_dim,), _BF16)
        check_tensor("k_weight", k_weight, (head_dim,), _BF16)


def _are_head_weights(q_weight: Tensor | None, k_weight: Tensor | None, head_dim: int) -> bool:
    if q_weight is None or k_weight is None:
        return q_weight is k_weight
    return (
        q_weight.dtype is k_weight.dtype is _bf16
        and q_weight.shape == k_weight.shape == (head_dim,)
        and q_weight.is_contiguous()
        and k_weight.is_contiguous()
    )


def _pages_fit(k_pages: Tensor, v_pages: Tensor, num_heads: int, head_dim: int) -> bool:
    shape, strides = k_pages.shape, k_pages.stride()
    _, num_kv_heads, block_size, page_dim = shape
    return (
        k_pages.dtype is v_pages.dtype is _bf16
        and k_pages.is_cpu
        and v_pages.shape == shape
        and v_pages.stride() == strides
        and strides[1:] == (block_size * page_dim, page_dim, 1)
        and page_dim == head_dim
        and head_dim in HEAD_DIMS
        and block_size in BLOCK_SIZES
        and num_heads % num_kv_heads == 0
        and num_heads <= MAX_GROUP * num_kv_heads
    )


def _check_pages(k_pages: Tensor, v_pages: Tensor, num_heads: int, head_dim: int) -> None:
    check_pages(k_pages, v_pages, num_heads=num_heads, head_dim=head_dim)
    require(k_pages.dtype is torch.bfloat16 and k_pages.is_cpu, "pages must be bfloat16 in host memory")
    require(head_dim in HEAD_DIMS, f"head_dim is {head_dim}, expected one of {HEAD_DIMS}")
    require(k_pages.shape[2] in BLOCK_SIZES, f"block_size is {k_pages.shape[2]}, expected one of {BLOCK_SIZES}")
    require(num_heads // k_pages.shape[1] <= MAX_GROUP, f"more than {MAX_GROUP} query heads share a KV head")


def _check_status(status: int) -> None:
    if status != 0:
        raise MemoryError("no memory for the workspace of a kernel")
