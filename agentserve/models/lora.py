"""LoRA adapters (Hu et al., 2021) in the format of PEFT: `adapter_config.json` beside `adapter_model.safetensors`.

A linear layer `y = x W^T` becomes `y = x W^T + s (x A^T) B^T` with `A` `[rank, num_inputs]`, `B` `[num_outputs, rank]`
and `s = alpha / rank`, or `alpha / sqrt(rank)` (rsLoRA; Kalajdzievski, 2023). Only headers are read here, without
torch: hundreds of adapters may be registered, and a simulation needs no weights.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from agentserve.config import AdapterConfig
from agentserve.errors import ConfigError, ModelFormatError, UnsupportedModelError
from agentserve.models.config import ModelConfig

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_MAX_HEADER_BYTES = 100 << 20
_DTYPES = ("F64", "F32", "F16", "BF16")
_TENSOR = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)\.lora_([AB])\.weight")
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Ways to start the training that leave the base model as it is."""
_READ = frozenset({"peft_type", "task_type", "r", "lora_alpha", "use_rslora", "bias", "init_lora_weights"})
_HARMLESS = frozenset(
    {
        "alora_invocation_string",  # a note; its tokens are what counts
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
    }
)
"""What matters in training only, or shows in the tensors anyway."""


def linear_shapes(config: ModelConfig) -> Mapping[str, tuple[int, int]]:
    """Outputs and inputs of the linear layers of a decoder layer, by the names of Hugging Face."""
    hidden, heads, kv_heads = config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads
    return {
        "q_proj": (heads, hidden),
        "k_proj": (kv_heads * config.head_dim, hidden),
        "v_proj": (kv_heads * config.head_dim, hidden),
        "o_proj": (hidden, heads),
        "gate_proj": (config.intermediate_size, hidden),
        "up_proj": (config.intermediate_size, hidden),
        "down_proj": (hidden, config.intermediate_size),
    }


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """An adapter whose files fit the model."""

    name: str
    path: Path
    """Of the safetensors file."""
    rank: int
    scaling: float
    """`s` above."""
    tensors: Mapping[tuple[int, str], tuple[str, str]]
    """By layer and linear layer the names of `A` and `B`; what is not there is not adapted."""
    num_bytes: int
    """Of all tensors in the file."""
    fingerprint: str
    """Of names, sizes, scaling, and time of the last change."""

    def config(self, num_layers: int) -> AdapterConfig:
        """What the control plane knows of it: it is loaded layer by layer."""
        return AdapterConfig(self.name, self.num_bytes, num_layers, self.fingerprint)


def find_adapters(given: Iterable[str], directory: str | None) -> dict[str, Path]:
    """Directories of adapters by name: `NAME=DIRECTORY` each, and those in a directory of directories.

    Raises ConfigError for what is no such pair, a name that occurs twice, and a directory without adapters.
    """
    found: dict[str, Path] = {}
    for pair in given:
        name, separator, path = pair.partition("=")
        if not (separator and name.strip() and path.strip()):
            raise ConfigError(f"--lora needs NAME=DIRECTORY, not {pair!r}")
        if name.strip() in found:
            raise ConfigError(f"--lora: there are two adapters of the name {name.strip()!r}")
        found[name.strip()] = Path(path.strip()).expanduser()
    if directory is None:
        return found
    try:
        inside = sorted(path for path in Path(directory).expanduser().iterdir() if (path / CONFIG_FILE).is_file())
    except OSError as error:
        raise ConfigError(f"--lora-dir: cannot read {directory}: {error.strerror}") from None
    if not inside:
        raise ConfigError(f"--lora-dir: no directory in {directory} has an {CONFIG_FILE}")
    for adapter in inside:
        if adapter.name in found:
            raise ConfigError(f"--lora-dir: there is another adapter of the name {adapter.name!r}")
        found[adapter.name] = adapter
    return found


def read_adapter(name: str, directory: Path, config: ModelConfig, *, max_rank: int) -> LoraAdapter:
    """Reads what is said of an adapter, without its weights.

    Args:
        name: for requests.
        directory: with the two files.
        config: of the model that it is for.
        max_rank: the largest rank there is room for.

    Raises ModelFormatError for files that are missing or damaged or do not fit the model, UnsupportedModelError for
    adapters of another kind.
    """
    where = f"the adapter {name} ({directory})"
    path = directory / WEIGHTS_FILE
    settings = _read_settings(directory / CONFIG_FILE, where)
    rank, scaling = _check_settings(settings, where)
    if rank > max_rank:
        raise UnsupportedModelError(f"{where} has rank {rank}; --max-lora-rank is {max_rank}")
    header, stamp = _read_header(path, where)
    tensors = _match(header, config, rank, where)
    text = json.dumps([sorted(header.items()), rank, scaling, stamp], sort_keys=True)
    fingerprint = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    num_bytes = sum(end - start for start, end in (entry["data_offsets"] for entry in header.values()))
    return LoraAdapter(name, path, rank, scaling, MappingProxyType(tensors), num_bytes, fingerprint)


def _read_settings(path: Path, where: str) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelFormatError(f"{where}: cannot read {path.name}: {error}") from error
    if not isinstance(settings, dict):
        raise ModelFormatError(f"{where}: {path.name} is no JSON object")
    return settings


def _check_settings(settings: dict[str, Any], where: str) -> tuple[int, float]:
    """Rank and scaling."""
    if settings.get("peft_type") != "LORA" or settings.get("task_type") not in {None, "CAUSAL_LM"}:
        kind = f"{settings.get('peft_type')!r} for {settings.get('task_type')!r}"
        raise UnsupportedModelError(f"{where} is of type {kind}; LORA for CAUSAL_LM is supported")
    if settings.get("bias", "none") != "none":
        raise UnsupportedModelError(f"{where} has bias {settings['bias']!r}; none is supported")
    init = settings.get("init_lora_weights")
    if init not in _PLAIN_INITS:
        raise UnsupportedModelError(f"{where} starts from {init!r}, which changes the model itself: convert it first")
    others = sorted(key for key, value in settings.items() if value and key not in _READ | _HARMLESS)
    if others:
        raise UnsupportedModelError(f"{where} uses {', '.join(others)}, which is not supported")
    rank, alpha = settings.get("r"), settings.get("lora_alpha", 8)
    if type(rank) is not int or rank < 1:
        raise ModelFormatError(f"{where} has the rank {rank!r}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ModelFormatError(f"{where} has the lora_alpha {alpha!r}")
    return rank, alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _read_header(path: Path, where: str) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and when the file was changed last."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length)) if length <= _MAX_HEADER_BYTES else None
        stat = path.stat()
    except (OSError, ValueError, struct.error) as error:
        raise ModelFormatError(f"{where}: cannot read {path.name}: {error}") from error
    if not isinstance(header, dict):
        raise ModelFormatError(f"{where}: {path.name} is no safetensors file")
    header.pop("__metadata__", None)
    try:
        for entry in header.values():
            start, end = entry["data_offsets"]
            if not 0 <= start <= end <= stat.st_size - 8 - length or entry["dtype"] not in _DTYPES:
                raise ValueError(entry)
            tuple(entry["shape"])
    except (KeyError, TypeError, ValueError) as error:
        raise ModelFormatError(f"{where}: {path.name} is truncated or has tensors of another type: {error}") from error
    return header, stat.st_mtime_ns


def _match(
    header: Mapping[str, Any], config: ModelConfig, rank: int, where: str
) -> dict[tuple[int, str], tuple[str, str]]:
    """The tensors by layer and linear layer, all of them, in pairs and of the right shape."""
    shapes = linear_shapes(config)
    names: dict[tuple[int, str], dict[str, str]] = {}
    for tensor, entry in header.items():
        match = _TENSOR.fullmatch(tensor)
        if match is None or match[2] not in shapes:
            raise UnsupportedModelError(
                f"{where} adapts {tensor.removeprefix('base_model.model.')}; supported are {', '.join(shapes)}"
            )
        if int(match[1]) >= config.num_layers:
            raise ModelFormatError(f"{where} adapts layer {match[1]} of a model with {config.num_layers}")
        num_outputs, num_inputs = shapes[match[2]]
        wanted = (rank, num_inputs) if match[3] == "A" else (num_outputs, rank)
        if tuple(entry["shape"]) != wanted:
            shape = list(entry["shape"])
            raise ModelFormatError(f"{where}: {tensor} has shape {shape}, but {list(wanted)} fits the model")
        names.setdefault((int(match[1]), match[2]), {})[match[3]] = tensor
    if not names:
        raise ModelFormatError(f"{where} has no tensors")
    for parts in names.values():
        if len(parts) < 2:
            raise ModelFormatError(f"{where} has {next(iter(parts.values()))} without its counterpart")
    return {place: (parts["A"], parts["B"]) for place, parts in names.items()}
