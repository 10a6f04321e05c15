"""Whatever is wrong with a model's files, the error is a `ModelError` of one line."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from agentserve.errors import ConfigError, ModelError, ModelFormatError, UnknownModelError, UnsupportedModelError
from agentserve.models.loader import load_model
from agentserve.models.registry import ModelSource, resolve_model
from tests.models.builders import SMOLLM2, requires_smollm2, save_tiny_model, write_tiny_gguf


def load(path: Path):
    return load_model(resolve_model(str(path)))


def fails(error: type[ModelError], message: str, path: Path) -> None:
    with pytest.raises(error, match=message) as caught:
        load(path)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model with its weights in one file, in several, and as GGUF."""
    root = tmp_path_factory.mktemp("tiny")
    model = save_tiny_model(root / "hf", "llama")
    save_tiny_model(root / "sharded", "llama", max_shard_size="40KB")
    write_tiny_gguf(root / "tiny.gguf", model)
    return root


@pytest.fixture
def hf(tiny, tmp_path):
    """A copy to damage."""
    for path in (tiny / "hf").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def edit(directory: Path, **changes) -> None:
    """Changes entries of config.json; None removes one."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


# ---- GGUF ----


def test_a_truncated_gguf(tiny, tmp_path):
    data = (tiny / "tiny.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    for length in [0, 3, 4, 7, 8, 20, 24, 60, 300, 1000, 3000, 5000, 6000, len(data) // 2, len(data) - 1]:
        path.write_bytes(data[:length])
        fails(ModelFormatError, "truncated|no GGUF file", path)
    path.write_bytes(data)
    assert load(path).config.num_layers == 3


@pytest.mark.smollm2
@requires_smollm2
def test_a_truncated_smollm2(tmp_path):
    path = tmp_path / "cut.gguf"
    with SMOLLM2.path.open("rb") as file:
        data = file.read(4_000_000)
    # Within the list of tokens, within the merges, within the weights.
    for length in [100_000, 1_500_000, 4_000_000]:
        path.write_bytes(data[:length])
        fails(ModelFormatError, "truncated", path)


def test_a_gguf_with_random_damage_loads_or_is_refused(tiny, tmp_path):
    data = (tiny / "tiny.gguf").read_bytes()
    generator = random.Random(0)
    path = tmp_path / "damaged.gguf"
    num_refused = 0
    for _ in range(80):
        damaged = bytearray(data)
        for _ in range(generator.randint(1, 4)):
            damaged[generator.randrange(6000)] = generator.choice([0, 1, 9, 127, 128, 255])
        path.write_bytes(damaged)
        try:
            load(path)
        except ModelError as error:
            num_refused += 1
            assert "\n" not in str(error)
    assert num_refused > 20


def test_other_gguf_files(tiny, tmp_path):
    path = tmp_path / "other.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    fails(ModelFormatError, "no GGUF file", path)
    path.write_bytes(b"GGUF" + (1).to_bytes(4, "little") + bytes(100))
    fails(UnsupportedModelError, "version 1", path)
    model = save_tiny_model(tmp_path / "hf", "llama")
    write_tiny_gguf(path, model, llama__expert_count=8)
    fails(UnsupportedModelError, "mixture of experts", path)
    write_tiny_gguf(path, model, split__count=2)
    fails(UnsupportedModelError, "several parts", path)
    write_tiny_gguf(path, model, llama__rope__dimension_count=8)
    fails(UnsupportedModelError, "part of each head", path)
    model.config.model_type = "gemma3"
    write_tiny_gguf(path, model)
    fails(UnsupportedModelError, "architecture 'gemma3'; supported are llama, qwen2, qwen3", path)
    model.config.model_type = "llama"
    model.config.num_key_value_heads = 4
    write_tiny_gguf(path, model)
    fails(ModelFormatError, r"'blk.0.attn_k.weight' .* shape \[32, 64\]; \[64, 64\] is expected", path)
    model.config.num_key_value_heads, model.config.num_hidden_layers = 2, 4
    write_tiny_gguf(path, model)
    fails(ModelFormatError, "no tensor 'blk.3.attn_norm.weight'", path)


# ---- safetensors ----


def test_truncated_safetensors(hf):
    path = hf / "model.safetensors"
    data = path.read_bytes()
    for length in [0, 5, 8, 500, len(data) // 2, len(data) - 1]:
        path.write_bytes(data[:length])
        fails(ModelFormatError, "cannot read .*model.safetensors", hf)


def test_missing_and_wrong_tensors(hf):
    path = hf / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, path)
    fails(ModelFormatError, f"no tensor '{name}'", hf)
    save_file(tensors | {name: tensors[name][:-1].clone()}, path)
    fails(ModelFormatError, r"has shape \[95, 64\]; \[96, 64\] is expected", hf)
    save_file(tensors | {name: tensors[name].to(torch.int8)}, path)
    fails(UnsupportedModelError, "dtype torch.int8", hf)


def test_missing_files(hf, tmp_path, tiny):
    (hf / "model.safetensors").unlink()
    fails(ModelFormatError, "no safetensors weights", hf)
    (hf / "config.json").unlink()
    fails(ModelFormatError, "no config.json", hf)
    readme = tmp_path / "README.md"
    readme.write_text("hello")
    fails(ModelFormatError, "no .gguf file", readme)


def test_damaged_index(tiny, tmp_path):
    for path in (tiny / "sharded").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    index = tmp_path / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    shard = good["weight_map"]["model.norm.weight"]
    (tmp_path / shard).rename(tmp_path / "elsewhere")
    fails(ModelFormatError, f"cannot read .*{shard}", tmp_path)
    for bad in ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}']:
        index.write_text(bad)
        fails(ModelFormatError, "no valid index", tmp_path)
    index.write_text('{"weight_map": {"model.embed_tokens.weight": "../../outside.safetensors"}}')
    fails(ModelFormatError, f"cannot read {tmp_path}/outside.safetensors", tmp_path)


# ---- configuration ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mixtral"}, "architecture 'mixtral'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized"),
        ({"hidden_act": "gelu"}, "activation is gelu"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"attention_bias": True}, "attention_bias"),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "sliding-window"),
        ({"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, "sliding-window"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1.0}}, "scaling 'yarn'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "scaling 'dynamic'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "part of each head"),
    ],
)
def test_unsupported_features(changes, message, hf):
    edit(hf, **changes)
    fails(UnsupportedModelError, message, hf)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": None}, "no entry 'model_type'"),
        ({"hidden_size": None}, "no entry 'hidden_size'"),
        ({"hidden_size": "64"}, "'hidden_size' .* is '64'"),
        ({"vocab_size": 0}, "vocab_size 0, which is not positive"),
        ({"num_attention_heads": 0}, "not positive"),
        ({"num_key_value_heads": 3}, "4 heads, which 3 key-value heads do not divide"),
        ({"head_dim": 15}, "needs an even one"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps -1.0"),
        ({"max_position_embeddings": 10**12}, "cannot be"),
        ({"tie_word_embeddings": 1}, "'tie_word_embeddings' .* is 1"),
        ({"rope_parameters": {"rope_type": "linear"}}, "no entry 'factor'"),
        ({"eos_token_id": ["</s>"]}, "'eos_token_id'"),
    ],
)
def test_wrong_configuration(changes, message, hf):
    edit(hf, **changes)
    fails(ModelFormatError, message, hf)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff", "[" * 100_000])
def test_config_that_is_no_json_object(text, hf):
    (hf / "config.json").write_text(text, encoding="latin-1")
    fails(ModelFormatError, "no valid JSON|not hold a JSON object", hf)


# ---- options ----


def test_wrong_options_and_missing_weights(hf):
    source = resolve_model(str(hf))
    with pytest.raises(ConfigError, match="unknown dtype 'int3'; known are auto, float32"):
        load_model(source, dtype="int3")
    with pytest.raises(ConfigError, match="unknown load format 'pickle'"):
        load_model(source, load_format="pickle")
    with pytest.raises(UnknownModelError, match="no weights of ghost"):
        load_model(ModelSource("ghost", None, None, source.config))
    with pytest.raises(UnknownModelError, match="shape of ghost"):
        load_model(ModelSource("ghost", None, None, None), load_format="dummy")
