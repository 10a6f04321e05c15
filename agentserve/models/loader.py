"""From a `ModelSource` to a `DecoderModel` in memory."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch
from torch import Tensor

from agentserve.errors import ConfigError, ModelFormatError, UnknownModelError
from agentserve.models.config import ModelConfig
from agentserve.models.decoder import Decoder
from agentserve.models.gguf_file import read_gguf_header
from agentserve.models.interface import DecoderModel
from agentserve.models.layers import cpu_computes_bfloat16
from agentserve.models.llama import Llama
from agentserve.models.qwen2 import Qwen2
from agentserve.models.qwen3 import Qwen3
from agentserve.models.registry import ModelSource
from agentserve.models.weights import DummyWeights, GGUFWeights, SafetensorsWeights, Weights

logger = logging.getLogger(__name__)

_CLASSES: dict[str, type[Decoder]] = {"llama": Llama, "qwen2": Qwen2, "qwen3": Qwen3}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LOAD_FORMATS = ("auto", "dummy")
_REPORT_EVERY_S = 2.0


def load_model(
    source: ModelSource,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    load_format: str = "auto",
    seed: int = 0,
    report: Callable[[str], None] = logger.info,
) -> DecoderModel:
    """Loads a model.

    Args:
        source: what `resolve_model` returned.
        dtype: `auto`, `float32`, `bfloat16` or `float16`; `auto` is float32 on a CPU that does not compute with
            bfloat16, and bfloat16 elsewhere.
        device: as torch names it.
        load_format: `auto` reads the files, `dummy` makes random weights and needs no files.
        seed: of the random weights.
        report: called with a line now and then.

    Raises ConfigError for an unknown dtype or load format, UnknownModelError when there are no files, and
    ModelFormatError or UnsupportedModelError when they cannot be used.
    """
    if load_format not in _LOAD_FORMATS:
        raise ConfigError(f"unknown load format {load_format!r}; known are {', '.join(_LOAD_FORMATS)}")
    target = torch.device(device)
    start = time.monotonic()
    with torch.inference_mode():
        config, weights = _open(source, resolve_dtype(dtype, target), target, dummy=load_format == "dummy", seed=seed)
        report(f"loading {source.name} ({config.num_parameters / 1e6:,.0f} million parameters)")
        model = _CLASSES[config.architecture](config, _Progress(weights, config, report))
    report(f"loaded {source.name} in {time.monotonic() - start:.1f} s")
    return model


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that an option means on a device. Raises ConfigError for an unknown name."""
    if name == "auto":
        slow = device.type == "cpu" and not cpu_computes_bfloat16()
        return torch.float32 if slow else torch.bfloat16
    if name not in _DTYPES:
        raise ConfigError(f"unknown dtype {name!r}; known are auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _open(
    source: ModelSource, dtype: torch.dtype, device: torch.device, *, dummy: bool, seed: int
) -> tuple[ModelConfig, Weights]:
    if source.config is None:
        raise UnknownModelError(f"nothing is known of the shape of {source.name}")
    if dummy:
        return source.config, DummyWeights(seed, dtype=dtype, device=device)
    if source.path is None:
        raise UnknownModelError(f"no weights of {source.name} were found on this machine")
    if source.kind == "gguf":
        header = read_gguf_header(source.path)
        return source.config, GGUFWeights(header, source.config, dtype=dtype, device=device)
    if source.kind == "hf":
        return source.config, SafetensorsWeights(source.path, dtype=dtype, device=device)
    raise ModelFormatError(f"{source.path} has the unknown format {source.kind!r}")


class _Progress:
    """Passes weights through and says how far it is, at most once in a while."""

    def __init__(self, weights: Weights, config: ModelConfig, report: Callable[[str], None]) -> None:
        self._weights = weights
        self._report = report
        self._num_layers = config.num_layers
        self._last = time.monotonic()

    def get(self, name: str, *shape: int) -> Tensor:
        if name.startswith("model.layers.") and time.monotonic() - self._last > _REPORT_EVERY_S:
            self._last = time.monotonic()
            self._report(f"loading layer {int(name.split('.')[2]) + 1} of {self._num_layers}")
        return self._weights.get(name, *shape)

    def frequency_factors(self) -> Tensor | None:
        return self._weights.frequency_factors()
