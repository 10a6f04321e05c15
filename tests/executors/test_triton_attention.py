"""The executor with our Triton kernels, interpreted on the CPU, against mirrors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from agentserve.core.batch import Lane
from agentserve.models.config import ModelConfig
from agentserve.models.interface import DecoderModel
from agentserve.models.loader import load_model
from agentserve.models.registry import ModelSource
from tests.contract.harness import Harness
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


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def model(request: pytest.FixtureRequest) -> DecoderModel:
    """Without and with norms of heads, which the kernel that rotates computes, too."""
    config = replace(CONFIG, architecture=request.param)
    return load_model(ModelSource("tiny", None, None, config), load_format="dummy", seed=3)


@pytest.fixture
def harness(model: DecoderModel) -> Iterator[Harness]:
    with interpreted():
        made = torch_harness(model, num_blocks=32, block_size=BLOCK_SIZE, attention="triton", lookahead=2)
        yield made
        made.executor.close()


def run(harness: Harness) -> list[list[int]]:
    """Two prompts, one of them in odd chunks beside the decodes of the other, then both together."""
    first = Generation("a", [5, 9, 23, 42], range(0, 8), block_size=BLOCK_SIZE)
    second = Generation("b", [(7 * i) % 90 for i in range(19)], range(8, 16), block_size=BLOCK_SIZE)
    step(harness, [first], lane=Lane.PREFILL)
    for size in (11, 5, 3):  # 19 in all
        step(harness, [second, first], max_tokens=size)
    for _ in range(2):
        step(harness, [first, second])
    # Two blocks of the second prompt are there already.
    third = Generation("c", second.token_ids[:18], (8, 9, *range(20, 26)), num_cached=16, block_size=BLOCK_SIZE)
    step(harness, [third, second, first])
    return [first.output, second.output, third.output]


def test_tokens_are_those_of_mirrors(model: DecoderModel, harness: Harness) -> None:
    reference = torch_harness(model, num_blocks=32, block_size=BLOCK_SIZE, attention="mirror")
    expected = run(reference)
    reference.executor.close()
    assert run(harness) == expected
    assert [len(output) for output in expected] == [7, 4, 1]
