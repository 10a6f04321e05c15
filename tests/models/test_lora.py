"""Reading adapters: what fits is described, what does not is refused with a reason."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from agentserve.errors import AgentServeError, ConfigError, ModelFormatError, UnsupportedModelError
from agentserve.models.config import ModelConfig
from agentserve.models.lora import CONFIG_FILE, WEIGHTS_FILE, find_adapters, read_adapter
from agentserve.models.registry import resolve_model
from tests.models.adapters import save_adapter
from tests.models.builders import save_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ModelConfig]:
    directory = tmp_path_factory.mktemp("model")
    reference = save_tiny_model(directory, "llama")
    config = resolve_model(str(directory)).config
    assert config is not None
    return reference, config


@pytest.mark.parametrize(
    ("settings", "scaling"), [({}, 8 / 4), ({"lora_alpha": 3, "use_rslora": True}, 3 / math.sqrt(4))]
)
def test_what_an_adapter_is(
    model: tuple[Any, ModelConfig], tmp_path: Path, settings: dict[str, Any], scaling: float
) -> None:
    save_adapter(tmp_path, model[0], seed=0, targets=("q_proj", "down_proj"), **settings)
    adapter = read_adapter("x", tmp_path, model[1], max_rank=4)
    assert (adapter.rank, adapter.scaling) == (4, scaling)
    assert adapter.tensors.keys() == {(layer, name) for layer in range(3) for name in ("q_proj", "down_proj")}
    # q: 64 in, 64 out; down: 96 in, 64 out; rank 4, 3 layers, 4 bytes.
    assert adapter.num_bytes == 3 * 4 * (64 + 64 + 96 + 64) * 4
    assert adapter.config(3).num_parts == 3


def test_another_adapter_of_the_same_name_has_another_fingerprint(
    model: tuple[Any, ModelConfig], tmp_path: Path
) -> None:
    prints = []
    for alpha in (8, 9):
        save_adapter(tmp_path, model[0], seed=0, lora_alpha=alpha)
        prints.append(read_adapter("x", tmp_path, model[1], max_rank=4).fingerprint)
    assert prints[0] != prints[1]


def change(directory: Path, **settings: Any) -> None:
    path = directory / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def rename(directory: Path, old: str, new: str) -> None:
    tensors = load_file(directory / WEIGHTS_FILE)
    save_file({name.replace(old, new): tensor for name, tensor in tensors.items()}, directory / WEIGHTS_FILE)


def truncate(directory: Path, num_bytes: int) -> None:
    path = directory / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:num_bytes])


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (lambda d: change(d, bias="all"), UnsupportedModelError, "bias"),
        (lambda d: change(d, use_dora=True), UnsupportedModelError, "use_dora"),
        (lambda d: change(d, modules_to_save=["lm_head"]), UnsupportedModelError, "modules_to_save"),
        (lambda d: change(d, rank_pattern={"q_proj": 2}), UnsupportedModelError, "rank_pattern"),
        (lambda d: change(d, new_feature_of_peft=1), UnsupportedModelError, "new_feature_of_peft"),
        (lambda d: change(d, init_lora_weights="pissa_niter_4"), UnsupportedModelError, "pissa"),
        (lambda d: change(d, peft_type="LOHA"), UnsupportedModelError, "LOHA"),
        (lambda d: change(d, task_type="SEQ_CLS"), UnsupportedModelError, "SEQ_CLS"),
        (lambda d: change(d, r=0), ModelFormatError, "rank 0"),
        (lambda d: change(d, r=5), UnsupportedModelError, "--max-lora-rank is 4"),
        (lambda d: change(d, r=2), ModelFormatError, "shape"),
        (lambda d: change(d, lora_alpha="x"), ModelFormatError, "lora_alpha"),
        (lambda d: (d / CONFIG_FILE).write_text("{"), ModelFormatError, CONFIG_FILE),
        (lambda d: (d / CONFIG_FILE).write_text("[]"), ModelFormatError, "no JSON object"),
        (lambda d: (d / CONFIG_FILE).unlink(), ModelFormatError, CONFIG_FILE),
        (lambda d: (d / WEIGHTS_FILE).unlink(), ModelFormatError, WEIGHTS_FILE),
        (lambda d: truncate(d, 4), ModelFormatError, WEIGHTS_FILE),
        (lambda d: truncate(d, 100), ModelFormatError, WEIGHTS_FILE),
        (lambda d: truncate(d, -1), ModelFormatError, "truncated"),
        (lambda d: (d / WEIGHTS_FILE).write_bytes(b"\xff" * 64), ModelFormatError, "safetensors"),
        (lambda d: rename(d, "layers.2", "layers.7"), ModelFormatError, "layer 7"),
        (lambda d: rename(d, "self_attn.q_proj", "self_attn.qkv"), UnsupportedModelError, "qkv"),
        (lambda d: rename(d, "0.self_attn.q_proj.lora_A", "0.self_attn.k_proj.lora_A"), ModelFormatError, "without"),
        (lambda d: save_file({"x": torch.zeros(1)}, d / WEIGHTS_FILE), UnsupportedModelError, "adapts x"),
        (lambda d: save_file({}, d / WEIGHTS_FILE), ModelFormatError, "no tensors"),
    ],
)
def test_what_is_refused(
    model: tuple[Any, ModelConfig],
    tmp_path: Path,
    damage: Callable[[Path], None],
    error: type[AgentServeError],
    words: str,
) -> None:
    save_adapter(tmp_path, model[0], seed=0, targets=("q_proj",))
    damage(tmp_path)
    with pytest.raises(error, match=words):
        read_adapter("x", tmp_path, model[1], max_rank=4)


def test_adapters_are_found_by_name_and_in_a_directory(tmp_path: Path) -> None:
    for name in ("b", "a", "no-adapter"):
        (tmp_path / name).mkdir()
    for name in "ab":
        (tmp_path / name / CONFIG_FILE).touch()
    assert find_adapters(["x=/some/where"], None) == {"x": Path("/some/where")}
    assert list(find_adapters(["x=/y"], str(tmp_path))) == ["x", "a", "b"]
    for given, directory in [
        (["x"], None),
        (["x=1", "x=2"], None),
        (["a=1"], tmp_path),
        ([], tmp_path / "a"),
        ([], "?"),
    ]:
        with pytest.raises(ConfigError, match="--lora"):
            find_adapters(given, None if directory is None else str(directory))
