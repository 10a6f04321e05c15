"""Names, aliases and the local cache; no torch needed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from agentserve.errors import UnknownModelError
from agentserve.models.aliases import ALIASES
from agentserve.models.config import RopeScaling
from agentserve.models.hf_config import read_hf_config
from agentserve.models.registry import resolve_model
from tests.models.builders import SMOLLM2, requires_smollm2, save_tiny_model, tiny_config


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def add_snapshot(cache, repo_id: str, *, weights: bool = True):
    """A repository in the layout of the Hugging Face cache."""
    repository = cache / f"models--{repo_id.replace('/', '--')}"
    snapshot = repository / "snapshots" / "abc123"
    save_tiny_model(snapshot, "qwen2")
    if not weights:
        (snapshot / "model.safetensors").unlink()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc123")
    return snapshot


@pytest.mark.parametrize(
    ("name", "billions"),
    # What the model cards say.
    [
        ("smollm2-135m", 0.135),
        ("qwen2.5-3b", 3.09),
        ("qwen2.5-7b", 7.61),
        ("llama-3-8b", 8.03),
        ("qwen3-0.6b", 0.6),
        ("qwen3-1.7b", 1.7),
        ("qwen3-4b", 4.0),
        ("qwen3-8b", 8.2),
        ("qwen3-14b", 14.8),
        ("qwen3-32b", 32.8),
    ],
)
def test_published_sizes(name, billions):
    assert ALIASES[name].config.num_parameters / 1e9 == pytest.approx(billions, rel=0.015)


def test_every_alias_is_covered_above():
    assert len(ALIASES) == 10


def test_an_alias_without_files_has_a_shape_only():
    source = resolve_model("Qwen2.5-7B")
    assert (source.name, source.kind, source.path) == ("qwen2.5-7b", None, None)
    assert source.config is ALIASES["qwen2.5-7b"].config
    assert resolve_model("Qwen/Qwen2.5-7B-Instruct").config is source.config


@pytest.mark.smollm2
@requires_smollm2
def test_smollm2_is_found_in_its_package():
    published = ALIASES["smollm2-135m"].config
    assert SMOLLM2.kind == "gguf"
    assert SMOLLM2.path.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    # The file states the epsilon in float32.
    assert SMOLLM2.config.rms_norm_eps == pytest.approx(published.rms_norm_eps)
    assert {**_fields(SMOLLM2.config), "rms_norm_eps": 1e-5} == _fields(published)


def _fields(config):
    return {name: getattr(config, name) for name in config.__slots__}


def test_the_local_cache_is_used(empty_cache):
    snapshot = add_snapshot(empty_cache, "some-org/some.model")
    source = resolve_model("some-org/some.model")
    assert (source.name, source.kind, source.path) == ("some-org/some.model", "hf", snapshot)
    assert source.config.architecture == "qwen2"
    add_snapshot(empty_cache, "Qwen/Qwen3-4B")
    assert resolve_model("qwen3-4b").kind == "hf"


def test_a_half_finished_download_does_not_count_for_an_alias(empty_cache):
    add_snapshot(empty_cache, "Qwen/Qwen3-4B", weights=False)
    assert resolve_model("qwen3-4b").path is None


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_HUB_CACHE")
    add_snapshot(tmp_path / "home" / "hub", "a/b")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    assert resolve_model("a/b").kind == "hf"
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    add_snapshot(tmp_path / "xdg" / "huggingface" / "hub", "c/d")
    assert resolve_model("c/d").kind == "hf"


def test_unknown_names_are_helped():
    with pytest.raises(UnknownModelError) as caught:
        resolve_model("qwen2.5-8b")
    message = str(caught.value)
    assert message.startswith("unknown model 'qwen2.5-8b'; did you mean qwen2.5-7b or qwen2.5-3b")
    assert all(name in message for name in ALIASES)
    with pytest.raises(UnknownModelError, match=r"hf download org/model"):
        resolve_model("org/model")
    for name in ["", "../x/y", "a/b/c", "x" * 10_000, "nul\0byte"]:
        with pytest.raises(UnknownModelError):
            resolve_model(name)


def test_configuration_of_transformers_4_and_5(tmp_path):
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = tiny_config("llama", rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, **scaling})
    config.save_pretrained(tmp_path)
    new = read_hf_config(tmp_path)
    assert (new.rope_theta, new.rope_scaling) == (500000.0, RopeScaling("llama3", 8.0, 1.0, 4.0, 8192))
    entries = json.loads((tmp_path / "config.json").read_text())
    assert entries.pop("rope_parameters")["rope_type"] == "llama3"
    # The older layout: the base beside the scaling, and integers where floats are meant.
    entries |= {"rope_theta": 500000, "rope_scaling": {"rope_type": "llama3", **scaling, "factor": 8}}
    (tmp_path / "config.json").write_text(json.dumps(entries))
    assert read_hf_config(tmp_path) == new


def test_an_inactive_sliding_window_is_no_obstacle(tmp_path):
    tiny_config("qwen2", use_sliding_window=False, sliding_window=32768, max_window_layers=3).save_pretrained(tmp_path)
    assert read_hf_config(tmp_path).attention_bias


def test_end_tokens_come_from_the_generation_config_first(tmp_path):
    tiny_config("qwen3", eos_token_id=5).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 5, 9]}')
    config = read_hf_config(tmp_path)
    assert config.eos_token_ids == (7, 5, 9)
    assert config.head_dim == 24


def test_nothing_here_needs_torch(tmp_path):
    tiny_config("llama").save_pretrained(tmp_path)
    script = f"""
import sys
for name in ("torch", "gguf", "numpy", "transformers", "safetensors"):
    sys.modules[name] = None  # importing it fails
import agentserve.models.config
from agentserve.models.registry import resolve_model
assert resolve_model({str(tmp_path)!r}).config.num_layers == 3
print(resolve_model("smollm2-135m").config.num_layers)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("30\n", "")
