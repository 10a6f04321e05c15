"""Where the weights of a model come from: safetensors, GGUF or a random generator, all under Hugging Face's names."""

from __future__ import annotations

import importlib
import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from agentserve.errors import ModelFormatError, UnsupportedModelError
from agentserve.models.config import ModelConfig
from agentserve.models.gguf_file import GGUFHeader, GGUFTensor

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class Weights(Protocol):
    """A named collection of tensors."""

    def get(self, name: str, *shape: int) -> Tensor:
        """The tensor `name` in the dtype and on the device of the model; not shared with anybody.

        Raises ModelFormatError when it is missing or has another shape, UnsupportedModelError when its type is not
        supported.
        """
        ...

    def frequency_factors(self) -> Tensor | None:
        """What to divide the rotary frequencies by, float32 `[head_dim / 2]` on the CPU."""
        ...


class SafetensorsWeights:
    """The `*.safetensors` files of a Hugging Face directory: one file, or several with an index."""

    def __init__(self, directory: Path, *, dtype: torch.dtype, device: torch.device) -> None:
        """Raises ModelFormatError when there are no such files or one of them is damaged."""
        self._directory = directory
        self._dtype = dtype
        self._device = device
        self._files: dict[str, Any] = {}
        self._file_of = self._read_index()

    def get(self, name: str, *shape: int) -> Tensor:
        if name not in self._file_of:
            raise ModelFormatError(f"the weights in {self._directory} have no tensor {name!r}")
        path = self._directory / self._file_of[name]
        try:
            tensor: Tensor = self._open(path).get_tensor(name)
        except SafetensorError as error:
            raise ModelFormatError(f"cannot read tensor {name!r} of {path}: {error}") from error
        _check_shape(str(path), name, tuple(tensor.shape), shape)
        if tensor.dtype not in _FLOATS:
            raise UnsupportedModelError(f"tensor {name!r} of {path} has dtype {tensor.dtype}, which is not supported")
        # Straight to the device, where it is nobody else's; on the CPU it is a view of the file.
        return tensor.to(dtype=self._dtype, copy=self._device.type == "cpu")

    def frequency_factors(self) -> Tensor | None:
        return None

    def _read_index(self) -> Mapping[str, str]:
        index_path = self._directory / "model.safetensors.index.json"
        if index_path.exists():
            try:
                weight_map = json.loads(index_path.read_bytes())["weight_map"]
                # A name in the index is no path: it must not lead out of the directory.
                return {str(name): Path(file).name for name, file in weight_map.items()}
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise ModelFormatError(f"{index_path} is no valid index of weights") from error
        path = self._directory / "model.safetensors"
        if not path.exists():
            raise ModelFormatError(f"{self._directory} holds no safetensors weights (model.safetensors)")
        return dict.fromkeys(self._open(path).keys(), path.name)

    def _open(self, path: Path) -> Any:
        if path.name not in self._files:
            try:
                self._files[path.name] = safe_open(path, framework="pt", device=str(self._device))
            except (OSError, SafetensorError) as error:
                raise ModelFormatError(f"cannot read {path}: {error}") from error
        return self._files[path.name]


class GGUFWeights:
    """A GGUF file, dequantized tensor by tensor."""

    def __init__(self, header: GGUFHeader, config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        """Raises ModelFormatError when the file ends before its last tensor, UnsupportedModelError for a type of
        tensor that is not known, and when the `gguf` package is missing.
        """
        try:  # part of the extras [cpu] and [cuda], not of the base install
            self._gguf = importlib.import_module("gguf")
        except ImportError as error:
            raise UnsupportedModelError("reading GGUF weights needs the gguf package: pip install gguf") from error
        self._header = header
        self._config = config
        self._dtype = dtype
        self._device = device
        for tensor in header.tensors.values():
            if tensor.offset + self._num_bytes(tensor) > header.num_bytes:
                raise ModelFormatError(
                    f"{header.path} is truncated: its {header.num_bytes} bytes end before tensor {tensor.name!r} does"
                )
        self._data = np.memmap(header.path, mode="r", dtype=np.uint8)

    def get(self, name: str, *shape: int) -> Tensor:
        tensor = self._tensor(gguf_name(name), shape)
        config = self._config
        if config.architecture == "llama" and ".self_attn." in name:
            # Llama files hold the rows of a head pairwise, for the interleaved rotary layout.
            if "q_proj" in name:
                tensor = _split_pairs(tensor, config.num_heads)
            elif "k_proj" in name:
                tensor = _split_pairs(tensor, config.num_kv_heads)
        return tensor.to(device=self._device, dtype=self._dtype)

    def frequency_factors(self) -> Tensor | None:
        if "rope_freqs.weight" not in self._header.tensors:
            return None
        return self._tensor("rope_freqs.weight", (self._config.head_dim // 2,))

    def _tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A fresh float32 tensor."""
        path = self._header.path
        info = self._header.tensors.get(name)
        if info is None:
            raise ModelFormatError(f"{path} has no tensor {name!r}")
        _check_shape(str(path), name, info.shape, shape)
        kind = self._gguf.GGMLQuantizationType(info.type_id)
        raw = self._data[info.offset : info.offset + self._num_bytes(info)]
        if kind.name in {"F32", "F16", "F64"}:
            raw = raw.view({"F32": "<f4", "F16": "<f2", "F64": "<f8"}[kind.name])
            values = raw.astype(np.float32).reshape(info.shape)
        else:
            raw = raw.reshape(self._gguf.quant_shape_to_byte_shape(info.shape, kind))
            try:
                values = self._gguf.dequantize(raw, kind)
            except NotImplementedError as error:
                raise UnsupportedModelError(f"tensor {name!r} of {path} has type {kind.name}: {error}") from error
        return torch.from_numpy(values)

    def _num_bytes(self, tensor: GGUFTensor) -> int:
        try:
            block_size: int
            type_size: int
            block_size, type_size = self._gguf.GGML_QUANT_SIZES[self._gguf.GGMLQuantizationType(tensor.type_id)]
        except (ValueError, KeyError) as error:
            raise UnsupportedModelError(
                f"tensor {tensor.name!r} of {self._header.path} has the unknown type {tensor.type_id}"
            ) from error
        return tensor.num_elements // block_size * type_size


class DummyWeights:
    """Random weights, the same ones for the same seed whatever the order in which they are asked for."""

    def __init__(self, seed: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self._seed = seed
        self._dtype = dtype
        self._device = device

    def get(self, name: str, *shape: int) -> Tensor:
        if "norm" in name:
            return torch.ones(shape, dtype=self._dtype, device=self._device)
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode(), self._seed & 0xFFFFFFFF))
        # Standard deviation 0.02, as these models are initialized; uniform, because that is quicker than normal.
        limit = 0.02 * 3**0.5
        tensor = torch.empty(shape, dtype=self._dtype, device=self._device)
        return tensor.uniform_(-limit, limit, generator=generator)

    def frequency_factors(self) -> Tensor | None:
        return None


def _check_shape(where: str, name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if shape != wanted:
        raise ModelFormatError(f"tensor {name!r} of {where} has shape {list(shape)}; {list(wanted)} is expected")


def _split_pairs(weight: Tensor, num_heads: int) -> Tensor:
    """Rows `(x0, y0, x1, y1, ...)` of each head to `(x0, x1, ..., y0, y1, ...)`."""
    rows, columns = weight.shape
    return weight.view(num_heads, rows // num_heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


_GGUF_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def gguf_name(name: str) -> str:
    """The name that GGUF files use for the Hugging Face name of a tensor."""
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if match is None:
        return _GGUF_NAMES[name]
    return f"blk.{match[1]}.{_GGUF_PARTS[match[2]]}.{match[3]}"
