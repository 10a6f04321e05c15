"""Masks on logits, and tokens that are made up within a mask."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agentserve.core.batch import SampleSpec
from agentserve.core.request import SamplingParams
from agentserve.errors import EngineError
from agentserve.executors.pytorch.device_sampler import DeviceSampler
from agentserve.executors.pytorch.sampler import apply_mask, enqueue, read, uniform
from agentserve.executors.simulated.constrained import ConstrainedTokens
from tests.kernels.interpreter import interpreted

VOCAB_SIZE = 50


def mask_of(token_ids: Iterable[int], size: int = 0) -> bytes:
    """A mask of at least `size` bytes in which these tokens are allowed."""
    bits = sum(1 << token_id for token_id in set(token_ids))
    return bits.to_bytes(max(size, -(-bits.bit_length() // 8)), "little")


def spec(output_index: int = 0, **values: object) -> SampleSpec:
    params = {"max_tokens": 100, "constrained": True, **values}
    return SampleSpec(SamplingParams(**params), output_index, (), 0)  # type: ignore[arg-type]


# ---- masks on logits ----


@given(allowed=st.sets(st.integers(0, VOCAB_SIZE - 1), min_size=1), size=st.integers(0, 12))
@settings(max_examples=60)
def test_a_mask_leaves_what_is_allowed_as_it_is(allowed: set[int], size: int) -> None:
    """Whether it is shorter than the vocabulary, of its size, or longer."""
    logits = torch.arange(VOCAB_SIZE, dtype=torch.float32) - 20.0
    row = logits.clone()
    apply_mask(row, mask_of(allowed, size))
    for token_id in range(VOCAB_SIZE):
        assert row[token_id] == (logits[token_id] if token_id in allowed else -math.inf)


def test_a_mask_ends_where_the_vocabulary_does() -> None:
    row = torch.zeros(10)
    apply_mask(row, mask_of([3, 9, 10, 200]))
    assert row.isfinite().nonzero().flatten().tolist() == [3, 9]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_constrained_rows_among_free_ones(temperature: float) -> None:
    """Bias and log-probabilities included: those are of the model, before the grammar."""
    logits = torch.randn(4, VOCAB_SIZE, generator=torch.Generator().manual_seed(1))
    specs = [
        spec(temperature=temperature, seed=seed, constrained=seed % 2 == 1, logprobs=1, logit_bias=((7, 100.0),))
        for seed in range(4)
    ]
    expected = torch.log_softmax(logits, dim=-1)
    choices = read(enqueue(logits.clone(), specs, None, {1: mask_of([11]), 3: mask_of([7, 30])}))
    assert [choice.token_id for choice in choices] == [7, 11, 7, 7]  # the bias decides, where it may
    assert choices[1].logprob == pytest.approx(expected[1, 11].item(), abs=1e-5)
    assert choices[1].top_logprobs[0][0] == int(expected[1].argmax())


# ---- rows that are mostly impossible, drawn by kernels ----


@pytest.fixture(scope="module")
def kernels() -> Iterator[None]:
    with interpreted():
        yield


FILTERS = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.5, "top_k": 20},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 1.0, "top_k": 40, "top_p": 0.5, "min_p": 0.01},
]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("num_allowed", [1, 2, 5])
def test_kernels_draw_from_the_few_that_are_left(num_allowed: int) -> None:
    """Each row with other filters; fewer tokens than top-k are left. The tokens are those that torch draws."""
    vocab_size = 3000
    generator = torch.Generator().manual_seed(num_allowed)
    specs = [spec(index, seed=index, **values) for index, values in enumerate(FILTERS * 2)]
    logits = 4 * torch.randn(len(specs), vocab_size, generator=generator)
    masks = {
        row: mask_of(torch.randint(vocab_size, (num_allowed,), generator=generator).tolist())
        for row in range(len(specs))
    }
    sampler = DeviceSampler(len(specs), vocab_size, torch.device("cpu"))
    drawn = [choice.token_id for choice in read(enqueue(logits.clone(), specs, sampler, masks))]
    expected = [choice.token_id for choice in read(enqueue(logits.clone(), specs, None, masks))]
    assert drawn == expected
    assert all(masks[row][token_id // 8] >> token_id % 8 & 1 for row, token_id in enumerate(drawn))


@pytest.mark.usefixtures("kernels")
def test_kernels_with_one_token_left_at_either_end_of_the_vocabulary() -> None:
    vocab_size = 1031
    specs = [spec(seed=seed, temperature=1.0, top_p=top_p) for seed in range(3) for top_p in (1.0, 0.5)]
    logits = torch.full((len(specs), vocab_size), -math.inf)
    places = [0, vocab_size - 1, 512, 0, vocab_size - 1, 512]
    logits[range(len(specs)), places] = torch.tensor([-1e30, 0.0, 1e30, 5.0, -5.0, 1.0])
    sampler = DeviceSampler(len(specs), vocab_size, torch.device("cpu"))
    numbers = [uniform(s.params.seed, s.output_index) for s in specs]
    assert sampler(logits, specs, numbers).tolist() == places


# ---- made-up tokens ----


class Masks:
    """Allows the same tokens all the time; remembers what was sampled."""

    def __init__(self, allowed: Iterable[int]) -> None:
        self._mask = mask_of(allowed)
        self.accepted: list[tuple[str, int]] = []

    def mask(self, request_id: str, output_index: int) -> bytes:
        del request_id, output_index
        return self._mask

    def accept(self, request_id: str, token_id: int) -> None:
        self.accepted.append((request_id, token_id))


STOP, CLOSE = 1, 2


def choose(masks: Masks, wanted: int, output_index: int, seed: int = 5) -> int:
    tokens = ConstrainedTokens(masks, (CLOSE,))
    return tokens.choose("r", spec(output_index, seed=seed, stop_token_ids=(STOP,)), wanted)


def test_what_is_wanted_comes_most_of_the_time_and_the_end_sometimes() -> None:
    masks = Masks([CLOSE, 10, 11])
    chosen = [choose(masks, 10, index) for index in range(400)]
    assert set(chosen) == {10, CLOSE}
    assert 60 < chosen.count(CLOSE) < 140  # one in four: 100
    assert masks.accepted == [("r", token_id) for token_id in chosen]


def test_the_end_comes_before_what_closes_something() -> None:
    assert {choose(Masks([STOP, CLOSE, 10]), 10, index) for index in range(50)} == {10, STOP}
    # A text that has become long enough ends as soon as it may.
    assert {choose(Masks([STOP, CLOSE, 10]), STOP, index) for index in range(50)} == {STOP}
    assert {choose(Masks([CLOSE, 10]), STOP, index) for index in range(50)} == {CLOSE}


def test_anything_that_is_allowed_if_nothing_else_is() -> None:
    chosen = {choose(Masks([20, 33, 47]), 10, index) for index in range(100)}
    assert chosen == {20, 33, 47}


def test_the_choice_depends_on_seed_and_index_only() -> None:
    allowed = range(20, 60)
    first = [choose(Masks(allowed), 10, index) for index in range(30)]
    assert first == [choose(Masks(allowed), 10, index) for index in range(30)]
    assert first != [choose(Masks(allowed), 10, index, seed=6) for index in range(30)]


def test_a_mask_without_any_token_is_an_error() -> None:
    with pytest.raises(EngineError, match="no token"):
        choose(Masks([]), 10, 0)
