"""Runs Triton kernels on the CPU, in whatever order modules were imported.

`TRITON_INTERPRET=1` works only if it is set before Triton is first imported: functions are wrapped when they are
defined. Other tests may have imported Triton by then (transformers does), so this swaps the wrappers for a while
instead, in our modules and in Triton's own library of functions, and puts them back.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

import agentserve_kernels


@contextmanager
def interpreted() -> Iterator[None]:
    """While it is open, launchers of `agentserve_kernels` take tensors on the CPU, and no kernel can be compiled."""
    for info in pkgutil.iter_modules(agentserve_kernels.__path__, "agentserve_kernels."):
        importlib.import_module(info.name)
    modules = [module for name, module in sorted(sys.modules.items()) if name.startswith("agentserve_kernels.")]
    swapped: dict[Callable[..., object], interpreter.InterpretedFunction] = {}
    builder = interpreter.InterpreterBuilder
    with ExitStack() as stack:
        for module in (*modules, tl, tl.standard):
            for name, value in list(vars(module).items()):
                if isinstance(value, JITFunction):
                    swapped.setdefault(value.fn, interpreter.InterpretedFunction(value.fn))
                    stack.enter_context(mock.patch.object(module, name, swapped[value.fn]))
        for name, change in (("create_dot", _widening), ("cast_impl", _rounding)):
            stack.enter_context(mock.patch.object(builder, name, change(getattr(builder, name))))
        patch = _indexing(interpreter._patch_lang_tensor)
        stack.enter_context(mock.patch.object(interpreter, "_patch_lang_tensor", patch))
        # Triton's functions are replaced once. The interpreter would do so again in every call of a function, which
        # takes most of its time, and would not undo it.
        scope = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        stack.callback(scope.restore)
        stack.enter_context(mock.patch.object(interpreter, "_patch_lang", lambda _: interpreter._LangPatchScope()))
        stack.enter_context(mock.patch.dict(os.environ, TRITON_INTERPRET="1"))
        yield


def _indexing(patch_lang_tensor):
    """The interpreter makes indices of arrays with one element, which numpy 2.4 refuses."""

    def patched(tensor, scope):
        patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return patched


def _rounding(cast_impl):
    """The interpreter cuts the bits off that bfloat16 does not have; GPUs round to the nearest."""

    def rounded(self, source, dtype):
        if source.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
            bits = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16).view(torch.int16)
            return interpreter.TensorHandle(bits.numpy().view(np.uint16), tl.bfloat16)
        return cast_impl(self, source, dtype)

    return rounded


def _widening(create_dot):
    """The interpreter keeps bfloat16 as the bits of an integer, and would multiply those."""

    def widened(self, a, b, d, *rest):
        return create_dot(self, _float32(a), _float32(b), d, *rest)

    return widened


def _float32(handle):
    if handle.dtype.scalar == tl.bfloat16:
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
    if handle.dtype.scalar == tl.float16:
        return interpreter.TensorHandle(handle.data.astype(np.float32), tl.float32)
    return handle
