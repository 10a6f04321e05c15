"""The executor with our Triton kernels, interpreted on the CPU, against mirrors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from unittest import mock

import pytest
import torch

from agentserve.core.batch import Lane
from agentserve.core.request import SamplingParams
from agentserve.executors.pytorch import sampler
from agentserve.models import decoder, layers
from agentserve.models.config import ModelConfig
from agentserve.models.interface import DecoderModel
from agentserve.models.loader import load_model
from agentserve.models.registry import ModelSource
from tests.contract.harness import Harness, chunk
from tests.executors.builders import Generation, step, torch_harness
from tests.kernels.interpreter import interpreted

BLOCK_SIZE = 8  # the smallest that there is a kernel for, as are heads of 64
CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=96,
    hidden_size=64,
    intermediate_size=64,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=64,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    rope_theta=10_000.0,
    tie_word_embeddings=False,
)


def tiny(architecture: str = "llama") -> DecoderModel:
    source = ModelSource("tiny", None, None, replace(CONFIG, architecture=architecture))
    return load_model(source, load_format="dummy", seed=3)


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def model(request: pytest.FixtureRequest) -> DecoderModel:
    """Without and with norms of heads, which the kernel that rotates computes, too."""
    return tiny(request.param)


@pytest.fixture(scope="module")
def gpu_model() -> DecoderModel:
    """The same Llama with gate and up as one product, as it is on a GPU; of three rows at a time."""
    with mock.patch.object(decoder, "joins_gate_up", lambda *_: True), mock.patch.object(layers, "_MLP_ROWS", 3):
        return tiny()


@pytest.fixture
def harness(model: DecoderModel) -> Iterator[Harness]:
    with interpreted():
        made = torch_harness(model, num_blocks=32, block_size=BLOCK_SIZE, attention="triton", lookahead=2)
        yield made
        made.executor.close()


PARAMS = (
    SamplingParams(max_tokens=9, temperature=0.9, seed=5),
    SamplingParams(max_tokens=9, temperature=1.3, top_k=12, top_p=0.9, seed=6),
    SamplingParams(max_tokens=9, temperature=0.7, min_p=0.02, repetition_penalty=1.2, seed=7, logprobs=2),
)


def run(harness: Harness, params: Sequence[SamplingParams | None] = (None, None, None)) -> list[list[int]]:
    """Two prompts, one of them in odd chunks beside the decodes of the other, then both together."""
    first = Generation("a", [5, 9, 23, 42], range(0, 8), block_size=BLOCK_SIZE, params=params[0])
    second = Generation("b", [(7 * i) % 90 for i in range(19)], range(8, 16), block_size=BLOCK_SIZE, params=params[1])
    step(harness, [first], lane=Lane.PREFILL)
    for size in (11, 5, 3):  # 19 in all
        step(harness, [second, first], max_tokens=size)
    for _ in range(2):
        step(harness, [first, second])
    # Two blocks of the second prompt are there already.
    third = Generation(
        "c", second.token_ids[:18], (8, 9, *range(20, 26)), num_cached=16, block_size=BLOCK_SIZE, params=params[2]
    )
    step(harness, [third, second, first])
    return [first.output, second.output, third.output]


def test_tokens_are_those_of_mirrors(model: DecoderModel, harness: Harness) -> None:
    reference = torch_harness(model, num_blocks=32, block_size=BLOCK_SIZE, attention="mirror")
    expected = run(reference)
    reference.executor.close()
    assert run(harness) == expected
    assert [len(output) for output in expected] == [7, 4, 1]


def reference(model: DecoderModel, params: Sequence[SamplingParams | None]) -> list[list[int]]:
    """Over mirrors, with torch's operations and the sampler of the CPU."""
    harness = torch_harness(model, num_blocks=32, block_size=BLOCK_SIZE, attention="mirror")
    try:
        return run(harness, params)
    finally:
        harness.executor.close()


def test_tokens_that_kernels_draw_are_those_that_torch_draws(model: DecoderModel, harness: Harness) -> None:
    expected = reference(model, PARAMS)
    assert expected != reference(model, (None, None, None))
    with (
        mock.patch.object(sampler, "draw_rows", side_effect=AssertionError),
        mock.patch.object(sampler, "draw", side_effect=AssertionError),
    ):
        assert run(harness, PARAMS) == expected


@pytest.mark.parametrize("attention", ["triton", "torch"])
def test_a_model_as_it_is_on_a_gpu_gives_the_same_tokens(gpu_model: DecoderModel, attention: str) -> None:
    """With one product for gate and up, activated by our kernel or, where Triton is missing, by torch."""
    expected = reference(tiny(), (None, PARAMS[1], None))
    with interpreted(), mock.patch.object(layers, "_MLP_ROWS", 3):
        harness = torch_harness(gpu_model, num_blocks=32, block_size=BLOCK_SIZE, attention=attention, lookahead=2)
        try:
            assert run(harness, (None, PARAMS[1], None)) == expected
        finally:
            harness.executor.close()


def test_float32_logits_of_fused_layers(model: DecoderModel) -> None:
    """Greedy tokens in float32 are to be the same, so the logits may differ by rounding only."""
    ids, positions = torch.arange(7), torch.arange(7)
    chunk_of = chunk("a", tuple(range(7)), (0,), block_size=BLOCK_SIZE)
    logits = []
    with interpreted(), torch.inference_mode():
        for attention in ("mirror", "triton"):
            harness = torch_harness(model, num_blocks=4, block_size=BLOCK_SIZE, attention=attention)
            opened = harness.executor._backend.open(Lane.PREFILL, [chunk_of], [-1], 1)
            logits.append(model.logits(model.forward(ids, positions, opened.attention)))
            opened.close()
            harness.executor.close()
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-6)
