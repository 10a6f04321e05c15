"""Tokens from logits: the same as those of the engine's sampler."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agentserve.core.request import SamplingParams
from agentserve.executors.pytorch.sampler import draw
from agentserve_kernels import reference
from agentserve_kernels.checks import KernelArgumentError
from agentserve_kernels.sampling import SampleScratch, num_candidates, sample
from tests.kernels.builders import randn

Row = tuple[float, int, float, float, float]
"""Temperature, top-k, top-p, min-p, uniform."""


def run(logits: torch.Tensor, rows: list[Row]) -> tuple[list[int], list[int]]:
    """Tokens and flags of all rows at once."""
    device, vocab_size = logits.device, logits.shape[1]
    columns = list(zip(*rows, strict=True))
    temperature, top_p, min_p, uniform = (
        torch.tensor(columns[i], dtype=torch.float64, device=device) for i in (0, 2, 3, 4)
    )
    top_k = torch.tensor(columns[1], dtype=torch.int32, device=device)
    tokens = torch.full((len(rows),), -1, dtype=torch.int64, device=device)
    flags = torch.full((len(rows),), -1, dtype=torch.int32, device=device)
    scratch = SampleScratch(len(rows), vocab_size, device=device)
    candidates = num_candidates(*columns[:4], vocab_size)
    sample(
        logits, temperature, top_k, top_p, min_p, uniform, tokens, flags, scratch, num_candidates=candidates
    )  # fmt: skip
    return tokens.tolist(), flags.tolist()


ROWS = st.tuples(
    st.sampled_from([0.0, 0.01, 0.7, 1.0, 3.0]),
    st.sampled_from([0, 1, 3, 20, 100000]),
    st.sampled_from([1.0, 0.9, 0.3, 0.0001]),
    st.sampled_from([0.0, 0.05, 1.0]),
    st.floats(0.0, 1.0, exclude_max=True),
)


@settings(max_examples=25)
@given(rows=st.lists(ROWS, min_size=1, max_size=6), vocab_size=st.sampled_from([7, 500, 5000]), seed=st.integers(0, 99))
def test_the_token_is_that_of_the_engine(device: torch.device, rows: list[Row], vocab_size: int, seed: int) -> None:
    logits = randn((len(rows), vocab_size), torch.float32, device, seed) * 4
    tokens, flags = run(logits, rows)
    assert flags == [0] * len(rows)
    for row, token, (temperature, top_k, top_p, min_p, uniform) in zip(logits.cpu(), tokens, rows, strict=True):
        expected = reference.draw(row, temperature, top_k, top_p, min_p, uniform)
        assert token == expected
        if temperature > 0.0:
            params = SamplingParams(max_tokens=1, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
            assert draw(row, params, uniform) == expected


def test_the_distribution(device: torch.device) -> None:
    # Over 4000 equally spaced numbers each token comes up in proportion, to within one.
    probabilities = torch.tensor([0.5, 0.125, 0.25, 0.125])
    count = 4000 if device.type == "cuda" else 100
    rows = [(1.0, 0, 1.0, 0.0, i / count) for i in range(count)]
    tokens, _ = run(probabilities.log().to(device).expand(count, 4).contiguous(), rows)
    counts = torch.bincount(torch.tensor(tokens), minlength=4)
    assert (counts - probabilities * count).abs().max() <= 1


def test_the_first_of_equals_is_the_greedy_token(device: torch.device) -> None:
    # The second and third chunk of the vocabulary, and the end of the first.
    logits = torch.zeros((3, 9000), device=device)
    logits[0, [4095, 4096, 8500]] = 1.0
    logits[1, [8192, 8999]] = 1.0
    assert run(logits, [(0.0, 0, 1.0, 0.0, 0.5)] * 3) == ([4095, 8192, 0], [0, 0, 0])


def test_the_ends_of_the_distribution(device: torch.device) -> None:
    logits = torch.full((4, 9000), -torch.inf, device=device)
    logits[:, [3, 4097, 8998]] = 0.0
    almost_one = 1.0 - 2.0**-52
    rows = [(1.0, 0, 1.0, 0.0, u) for u in (0.0, almost_one, 1 / 3 - 1e-9, 1 / 3 + 1e-9)]
    assert run(logits, rows) == ([3, 8998, 3, 4097], [0] * 4)


def test_tokens_that_are_ruled_out_never_come_up(device: torch.device) -> None:
    logits = torch.full((2, 5000), -torch.inf, device=device)
    logits[:, 4200] = -100.0
    assert run(logits, [(0.5, 0, 1.0, 0.0, 0.999), (0.5, 0, 0.9, 0.0, 0.999)])[0] == [4200, 4200]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_flagged(device: torch.device, temperature: float) -> None:
    logits = randn((5, 5000), torch.float32, device)
    logits[1, 4999] = torch.nan
    logits[2, 0] = torch.inf
    logits[3] = -torch.inf
    logits[4, 17] = -torch.inf
    tokens, flags = run(logits, [(temperature, 0, 1.0, 0.0, 0.5)] * 5)
    assert flags == [0, 1, 1, 1, 0]
    assert all(0 <= token < 5000 for token in tokens)


def test_how_many_candidates_a_batch_needs() -> None:
    greedy, plain = (0.0, 5, 0.5, 0.0), (1.0, 0, 1.0, 0.0)
    assert num_candidates(*zip(greedy, plain, strict=True), 1000) is None
    assert num_candidates(*zip(plain, (1.0, 20, 0.8, 0.0), (0.3, 5, 1.0, 0.0), strict=True), 1000) == 32
    assert num_candidates(*zip((1.0, 900, 1.0, 0.0), strict=True), 1000) == 1000
    assert num_candidates(*zip((1.0, 20, 1.0, 0.0), (1.0, 0, 0.9, 0.0), strict=True), 1000) == 1000
    assert num_candidates(*zip((1.0, 1000, 1.0, 0.0), strict=True), 1000) is None  # as good as no limit
    assert num_candidates(*zip((1.0, 0, 1.0, 0.1), strict=True), 1000) == 1000


def test_wrong_arguments_are_refused(device: torch.device) -> None:
    logits = torch.zeros((2, 5000), device=device)
    floats, ints = torch.ones(2, device=device), torch.ones(2, dtype=torch.int32, device=device)

    def call(scratch: SampleScratch, tokens: torch.Tensor, candidates: int | None = None) -> None:
        sample(logits, floats, ints, floats, floats, floats, tokens, ints, scratch, num_candidates=candidates)

    tokens = torch.empty(2, dtype=torch.int64, device=device)
    with pytest.raises(KernelArgumentError, match="scratch is too small"):
        call(SampleScratch(1, 5000, device=device), tokens)
    with pytest.raises(KernelArgumentError, match="scratch is too small"):
        call(SampleScratch(2, 4000, device=device), tokens)
    with pytest.raises(KernelArgumentError, match=r"out_tokens is torch\.int32"):
        call(SampleScratch(2, 5000, device=device), ints)
    with pytest.raises(KernelArgumentError, match="num_candidates is 5001"):
        call(SampleScratch(2, 5000, device=device), tokens, 5001)
