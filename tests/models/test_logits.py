"""Our decoders give the logits of transformers, alone, token by token and in flat batches."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers

from agentserve.models.gguf_file import read_gguf_header
from agentserve.models.loader import load_model
from agentserve.models.registry import resolve_model
from agentserve.models.weights import GGUFWeights
from agentserve.text.chat import load_chat_template
from agentserve.text.tokenizer import load_tokenizer
from tests.models.builders import (
    ARCHITECTURES,
    SMOLLM2,
    reference_logits,
    requires_smollm2,
    save_tiny_model,
    write_tiny_gguf,
)
from tests.models.reference import DenseCache, flat_logits

TOKENS = [1, 17, 4, 99, 159, 0, 23, 23, 64, 8, 120, 3]
OTHER = [5, 90, 31, 7]
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def assert_close(ours: torch.Tensor, reference: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert ours.shape == reference.shape
    assert ours.dtype is torch.float32
    assert (ours - reference).abs().max().item() < tolerance


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_full_forward(arch, tmp_path):
    reference = save_tiny_model(tmp_path, arch)
    model = load_model(resolve_model(str(tmp_path)))
    assert_close(flat_logits(model, DenseCache(), ("a", TOKENS))[0], reference_logits(reference, TOKENS))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_token_by_token_and_in_odd_chunks(arch, tmp_path):
    reference = reference_logits(save_tiny_model(tmp_path, arch, max_shard_size="40KB"), TOKENS)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model = load_model(resolve_model(str(tmp_path)))
    for sizes in ([1] * 12, [5, 1, 3, 2, 1]):
        cache, start, pieces = DenseCache(), 0, []
        for size in sizes:
            pieces += flat_logits(model, cache, ("a", TOKENS[start : start + size]))
            start += size
        assert_close(torch.cat(pieces), reference)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_sequences_in_one_flat_batch_do_not_touch_each_other(arch, tmp_path):
    hf_model = save_tiny_model(tmp_path, arch)
    model = load_model(resolve_model(str(tmp_path)))
    cache = DenseCache()
    first = flat_logits(model, cache, ("a", TOKENS[:7]), ("b", OTHER[:1]))
    second = flat_logits(model, cache, ("b", OTHER[1:]), ("a", TOKENS[7:]))
    assert_close(torch.cat([first[0], second[1]]), reference_logits(hf_model, TOKENS))
    assert_close(torch.cat([first[1], second[0]]), reference_logits(hf_model, OTHER))


@pytest.mark.parametrize(
    "overrides",
    [
        {"tie_word_embeddings": True},
        {"rope_parameters": LLAMA3_ROPE},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}},
        {"rms_norm_eps": 0.1, "num_key_value_heads": 4},
    ],
    ids=["tied", "llama3-rope", "linear-rope", "eps-mha"],
)
def test_variants(overrides, tmp_path):
    reference = save_tiny_model(tmp_path, "llama", **overrides)
    model = load_model(resolve_model(str(tmp_path)))
    tokens = TOKENS * 8  # beyond the 32 tokens of the unscaled window
    assert_close(flat_logits(model, DenseCache(), ("a", tokens))[0], reference_logits(reference, tokens))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near(dtype, tmp_path):
    reference = save_tiny_model(tmp_path, "qwen3")
    model = load_model(resolve_model(str(tmp_path)), dtype=dtype)
    assert model.dtype is getattr(torch, dtype)
    expected = reference_logits(reference, TOKENS)
    # bfloat16 has 8 bits of precision: a few per cent after three layers.
    assert_close(flat_logits(model, DenseCache(), ("a", TOKENS))[0], expected, 0.08 * expected.abs().max().item())


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_gguf_equals_the_model_it_was_written_from(arch, tmp_path):
    reference = save_tiny_model(tmp_path / "hf", arch)
    write_tiny_gguf(tmp_path / "tiny.gguf", reference)
    source = resolve_model(str(tmp_path / "tiny.gguf"))
    from_hf = resolve_model(str(tmp_path / "hf"))
    assert source.name == "tiny"
    assert dataclasses.replace(
        source.config, bos_token_id=1, rms_norm_eps=1e-6, rope_theta=10000.0
    ) == dataclasses.replace(from_hf.config, rms_norm_eps=1e-6, rope_theta=10000.0)
    model = load_model(source)
    assert_close(flat_logits(model, DenseCache(), ("a", TOKENS))[0], reference_logits(reference, TOKENS))


def test_gguf_rope_factors_are_llama3_scaling(tmp_path):
    reference = save_tiny_model(tmp_path, "llama", rope_parameters=LLAMA3_ROPE)
    # The factor of each frequency: what plain frequencies are divided by to get the scaled ones.
    plain = 1.0 / 10000.0 ** (torch.arange(0, 16, 2) / 16)
    reference.register_buffer("rope_freqs_weight", plain / reference.model.rotary_emb.inv_freq)
    reference.state_dict = _rename(reference.state_dict, "rope_freqs_weight", "rope_freqs.weight")
    write_tiny_gguf(tmp_path / "tiny.gguf", reference)
    model = load_model(resolve_model(str(tmp_path / "tiny.gguf")))
    tokens = TOKENS * 8
    assert_close(flat_logits(model, DenseCache(), ("a", tokens))[0], reference_logits(reference, tokens))


def _rename(state_dict, old, new):
    return lambda: {new if name == old else name: value for name, value in state_dict().items()}


def test_quantized_gguf(tmp_path):
    reference = save_tiny_model(tmp_path, "qwen2")
    write_tiny_gguf(tmp_path / "tiny.gguf", reference, quantize="Q8_0")
    model = load_model(resolve_model(str(tmp_path / "tiny.gguf")))
    expected = reference_logits(reference, TOKENS)
    logits = flat_logits(model, DenseCache(), ("a", TOKENS))[0]
    # 8 bits a weight: near, but visibly not the same.
    assert_close(logits, expected, 0.05 * expected.abs().max().item())
    assert (logits - expected).abs().max().item() > 1e-4


@pytest.mark.smollm2
@requires_smollm2
def test_smollm2_equals_transformers_on_the_same_weights(smollm2_model):
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        reference = transformers.LlamaForCausalLM(config).eval()
    weights = GGUFWeights(
        read_gguf_header(SMOLLM2.path), SMOLLM2.config, dtype=torch.float32, device=torch.device("cpu")
    )
    state = {
        name: weights.get(name, *value.shape) for name, value in reference.state_dict().items() if "lm_head" not in name
    }
    reference.load_state_dict(state, strict=False, assign=True)
    reference.tie_weights()
    reference.model.rotary_emb = type(reference.model.rotary_emb)(config)
    tokens = list(range(300, 340))
    expected = reference_logits(reference, tokens)
    cache = DenseCache()
    ours = flat_logits(smollm2_model, cache, ("a", tokens[:33]), ("b", tokens[:5]))
    rest = flat_logits(smollm2_model, cache, ("b", tokens[5:6]), ("a", tokens[33:]))
    assert_close(torch.cat([ours[0], rest[1]]), expected, 2e-4)
    assert_close(torch.cat([ours[1], rest[0]]), expected[:6], 2e-4)


@pytest.mark.smollm2
@requires_smollm2
def test_smollm2_knows_the_capital_of_france(smollm2_model):
    # A wrong order of rows in q and k would show here, whatever the reference does.
    tokenizer = load_tokenizer(SMOLLM2)
    prompt = load_chat_template(SMOLLM2, tokenizer).render(
        [{"role": "user", "content": "What is the capital of France?"}]
    )
    new, output, cache = tokenizer.encode(prompt), [], DenseCache()
    for _ in range(12):
        token = int(flat_logits(smollm2_model, cache, ("a", new))[0][-1].argmax())
        if token in tokenizer.eos_token_ids:
            break
        output.append(token)
        new = [token]
    assert tokenizer.decode(output) == "The capital of France is Paris."
