"""Calls of the CUDA driver through cuda-python, each one checked.

Differences between the bindings of CUDA 12.4 and 13.x are dealt with here: the name of the module, enumerations whose
names changed (flags are passed as integers, which every version takes; where a version insists on its enumeration it is
made from the number), and functions that an older one lacks.
"""

from __future__ import annotations

import ctypes
import importlib
from typing import Any

from agentserve.errors import EngineError

_MODULES = ("cuda.bindings.driver", "cuda.cuda")
"""The name since cuda-python 12.6, and the one before."""


def driver_library() -> ctypes.CDLL | None:
    """NVIDIA's driver, None if it is not installed: a look that takes no time and does not start it."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


class CudaUnavailableError(EngineError):
    """The driver cannot be called at all: no bindings, no libcuda, or one too old for a function."""


class CudaDriverError(EngineError):
    """The driver refused a call.

    `call` is the name of the function, `error` that of the error, such as CUDA_ERROR_OUT_OF_MEMORY.
    """

    def __init__(self, call: str, error: str, description: str) -> None:
        super().__init__(f"{call} failed with {error}" + (f": {description}" if description else ""))
        self.call = call
        self.error = error


class CudaDriver:
    """The driver. Safe for several threads, as the driver is."""

    def __init__(self, module: Any) -> None:
        """`module`: cuda.bindings.driver, or something that behaves like it."""
        self._module = module

    @property
    def bindings_version(self) -> int:
        """13000 for bindings made for CUDA 13.0."""
        return int(self._module.CUDA_VERSION)

    def has(self, name: str) -> bool:
        """Whether the bindings know the function; the driver may be older than they are."""
        return hasattr(self._module, name)

    def call(self, name: str, *arguments: object) -> Any:
        """Calls a function and returns what it returns without the error code: None, a value or a tuple.

        Raises CudaDriverError for an error of the driver, CudaUnavailableError if the function cannot be called.
        """
        function = getattr(self._module, name, None)
        if function is None:
            raise CudaUnavailableError(f"the installed cuda-python has no {name}; a newer one is needed")
        try:
            code, *values = function(*arguments)
        except RuntimeError as error:
            # What the bindings raise when libcuda is missing, or does not have the function.
            raise CudaUnavailableError(f"the CUDA driver cannot be called ({name}): {error}") from error
        if int(code) != 0:
            raise CudaDriverError(name, self._error_name(code), self._description(code))
        if len(values) <= 1:
            return values[0] if values else None
        return tuple(values)

    def enum(self, name: str, value: int) -> Any:
        """A member of an enumeration by its number."""
        return getattr(self._module, name)(value)

    def make(self, name: str) -> Any:
        """A structure of the driver, all zero."""
        structure = getattr(self._module, name, None)
        if structure is None:
            raise CudaUnavailableError(f"the installed cuda-python has no {name}; a newer one is needed")
        return structure()

    @staticmethod
    def _error_name(code: Any) -> str:
        return getattr(code, "name", None) or f"error {int(code)}"

    def _description(self, code: Any) -> str:
        status, text = self._module.cuGetErrorString(code)
        if int(status) != 0 or text is None:
            return ""
        return text.decode(errors="replace") if isinstance(text, bytes) else str(text)


def load_driver() -> CudaDriver:
    """The real driver.

    Raises CudaUnavailableError if cuda-python is not installed. libcuda is looked for by the first call only.
    """
    for name in _MODULES:
        try:
            return CudaDriver(importlib.import_module(name))
        except ImportError:
            continue  # an older or newer package has the other name
    raise CudaUnavailableError("cuda-python is not installed (pip install 'agentserve[cuda]')")
