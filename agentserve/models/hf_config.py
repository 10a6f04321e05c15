"""`ModelConfig` from a Hugging Face directory: `config.json` and `generation_config.json`. Needs no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from agentserve.errors import ModelFormatError, UnsupportedModelError
from agentserve.models.checks import check_architecture, check_sizes
from agentserve.models.config import ModelConfig, RopeScaling

T = TypeVar("T")
_MISSING: Any = object()


def read_hf_config(directory: Path) -> ModelConfig:
    """The shape of the model in `directory`; both the layout of transformers 4 and that of 5 are understood.

    Raises ModelFormatError when a file or an entry is missing or wrong, and UnsupportedModelError for another
    architecture or a feature that is not supported.
    """
    config = _Entries(read_json(directory / "config.json"), directory / "config.json")
    architecture = check_architecture(config.get("model_type", str), str(config.path))
    _check_features(config, architecture)
    num_heads = config.get("num_attention_heads", int)
    hidden_size = config.get("hidden_size", int)
    num_layers = config.get("num_hidden_layers", int)
    rope_values = config.get("rope_parameters", dict, None) or config.get("rope_scaling", dict, None)
    rope = _Entries(rope_values or {}, config.path)
    default_head_dim = 128 if architecture == "qwen3" else hidden_size // max(num_heads, 1)
    result = ModelConfig(
        architecture=architecture,
        vocab_size=config.get("vocab_size", int),
        hidden_size=hidden_size,
        intermediate_size=config.get("intermediate_size", int),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=config.get("num_key_value_heads", int, num_heads),
        head_dim=config.get("head_dim", int, None) or default_head_dim,
        max_position_embeddings=config.get("max_position_embeddings", int),
        rms_norm_eps=config.number("rms_norm_eps", 1e-6),
        rope_theta=rope.number("rope_theta", config.number("rope_theta", 10000.0)),
        tie_word_embeddings=config.get("tie_word_embeddings", bool, False),
        eos_token_ids=_end_token_ids(directory, config),
        bos_token_id=config.get("bos_token_id", int, None),
        rope_scaling=_rope_scaling(rope),
        attention_bias=architecture == "qwen2",
    )
    check_sizes(result, str(config.path))
    return result


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ModelFormatError when there is none."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelFormatError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ModelFormatError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelFormatError(f"{path} does not hold a JSON object")
    return value


class _Entries:
    """Typed access, with errors that name the file and the key. `null` counts as absent."""

    def __init__(self, values: dict[str, Any], path: Path) -> None:
        self._values = values
        self.path = path

    def get(self, key: str, kind: type[T], default: Any = _MISSING) -> T:
        value = self._values.get(key)
        if value is None:
            if default is _MISSING:
                raise ModelFormatError(f"{self.path} has no entry {key!r}")
            return default  # type: ignore[no-any-return]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ModelFormatError(f"entry {key!r} of {self.path} is {value!r:.60}")
        return value

    def number(self, key: str, default: Any = _MISSING) -> float:
        value = self._values.get(key)
        return float(value) if isinstance(value, int) and not isinstance(value, bool) else self.get(key, float, default)


def _check_features(config: _Entries, architecture: str) -> None:
    obstacle = None
    if config.get("quantization_config", dict, None):
        obstacle = "its weights are quantized (quantization_config)"
    elif config.get("hidden_act", str, "silu") != "silu":
        obstacle = f"its activation is {config.get('hidden_act', str)}"
    elif config.get("mlp_bias", bool, False):
        obstacle = "its MLP has biases (mlp_bias)"
    elif architecture != "qwen2" and config.get("attention_bias", bool, False):
        obstacle = "its attention has an output bias (attention_bias)"
    elif _has_sliding_window(config):
        obstacle = "it uses sliding-window attention"
    if obstacle is not None:
        raise UnsupportedModelError(f"the model of {config.path} is not supported: {obstacle}")


def _has_sliding_window(config: _Entries) -> bool:
    layer_types = config.get("layer_types", list, None)
    if layer_types is not None:
        return any(kind != "full_attention" for kind in layer_types)
    # Before transformers 5: layers from `max_window_layers` on slide, if the switch is on.
    if not config.get("use_sliding_window", bool, False) or config.get("sliding_window", int, None) is None:
        return False
    return config.get("max_window_layers", int, 28) < config.get("num_hidden_layers", int)


def _rope_scaling(rope: _Entries) -> RopeScaling | None:
    kind = rope.get("rope_type", str, None) or rope.get("type", str, "default")
    if rope.number("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModelError(f"{rope.path} rotates only a part of each head, which is not supported")
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", rope.number("factor"))
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            rope.number("factor"),
            rope.number("low_freq_factor"),
            rope.number("high_freq_factor"),
            rope.get("original_max_position_embeddings", int),
        )
    raise UnsupportedModelError(f"{rope.path} uses rotary scaling {kind!r}; supported are linear and llama3")


def _end_token_ids(directory: Path, config: _Entries) -> tuple[int, ...]:
    """Those of `generation_config.json` first (it is what the model's authors generate with), then the others."""
    path = directory / "generation_config.json"
    sources = [_Entries(read_json(path), path)] if path.exists() else []
    token_ids: list[Any] = []
    for entries in [*sources, config]:
        value = entries.get("eos_token_id", object, [])  # a number or a list of numbers
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(token_id, int) and not isinstance(token_id, bool) for token_id in values):
            raise ModelFormatError(f"entry 'eos_token_id' of {entries.path} is {value!r:.60}")
        token_ids += values
    return tuple(dict.fromkeys(token_ids))
