"""Random weights, dtypes, packing and progress."""

from __future__ import annotations

import torch

from agentserve.models.config import ModelConfig
from agentserve.models.layers import Linear
from agentserve.models.loader import load_model
from agentserve.models.registry import ModelSource
from tests.models.reference import DenseCache, flat_logits

CONFIG = ModelConfig(
    architecture="qwen3",
    vocab_size=90,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    tie_word_embeddings=False,
)
SOURCE = ModelSource("tiny", None, None, CONFIG)


def dummy_logits(seed: int, **options) -> torch.Tensor:
    model = load_model(SOURCE, load_format="dummy", seed=seed, **options)
    return flat_logits(model, DenseCache(), ("a", [3, 1, 4, 1, 5]))[0]


def test_dummy_weights_depend_on_the_seed_only():
    first = dummy_logits(1)
    assert first.shape == (5, 90)
    assert torch.isfinite(first).all()
    assert torch.equal(first, dummy_logits(1))
    assert not torch.allclose(first, dummy_logits(2), atol=1e-3)


def test_auto_is_float32_on_a_cpu():
    model = load_model(SOURCE, load_format="dummy")
    assert (model.dtype, model.device.type) == (torch.float32, "cpu")
    assert dummy_logits(1, dtype="bfloat16").dtype is torch.float32  # logits always are


def test_progress_is_reported():
    lines = []
    load_model(SOURCE, load_format="dummy", report=lines.append)
    assert lines[0] == "loading tiny (0 million parameters)"
    assert lines[-1].startswith("loaded tiny in ")


def test_packed_linear_equals_the_plain_one():
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(40, 24, generator=generator), torch.randn(40, generator=generator)
    with torch.inference_mode():
        for num_tokens in (0, 1, 3, 17):
            x = torch.randn(num_tokens, 24, generator=generator)
            expected = x.double() @ weight.double().T + bias.double()
            packed = Linear(weight.clone(), bias).pack()
            assert packed.pack() is packed  # a second time is harmless
            assert torch.allclose(packed(x).double(), expected, atol=1e-5)
            assert torch.allclose(Linear(weight, bias)(x).double(), expected, atol=1e-5)
