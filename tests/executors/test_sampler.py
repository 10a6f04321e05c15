"""The sampler against a naive reference, and its distribution against the expected one."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agentserve.core.batch import SampleSpec
from agentserve.core.request import SamplingParams
from agentserve.errors import EngineError
from agentserve.executors.pytorch.sampler import Choice, draw, draw_rows, enqueue, process_logits, read, uniform

# Critical values of chi-square at 0.1 %, by degrees of freedom. The seeds are fixed: a test fails always or never.
CHI_SQUARE_LIMIT = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 9: 27.88, 99: 148.23}


def params(**values) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 100, **values})


def make_spec(output_index: int = 0, history: tuple[int, ...] = (), num_prompt: int = 0, **values) -> SampleSpec:
    return SampleSpec(params(**values), output_index, history, num_prompt)


def sample(logits: torch.Tensor, specs: list[SampleSpec]) -> list[Choice]:
    return read(enqueue(logits, specs))


def chi_square(counts: Counter[int], probabilities: list[float]) -> float:
    total = sum(counts.values())
    return sum((counts[i] - total * p) ** 2 / (total * p) for i, p in enumerate(probabilities) if p > 0)


def draws(logits: list[float], num_draws: int, **values) -> Counter[int]:
    """One draw for each output index, as a request would see them."""
    rows = torch.tensor([logits] * num_draws)
    return Counter(c.token_id for c in sample(rows, [make_spec(i, seed=7, **values) for i in range(num_draws)]))


# ---- random numbers ----


def test_random_numbers_are_uniform():
    counts = Counter(int(uniform(seed, index) * 100) for seed in range(100) for index in range(100))
    assert chi_square(counts, [0.01] * 100) < CHI_SQUARE_LIMIT[99]


def test_random_numbers_of_neighbours_are_unrelated():
    """Pairs (number, next number) fill the square evenly, for the next index and for the next seed."""
    for step in ((0, 1), (1, 0)):
        cells = Counter(
            int(uniform(s, i) * 10) * 10 + int(uniform(s + step[0], i + step[1]) * 10)
            for s in range(0, 200, 2)
            for i in range(0, 200, 2)
        )
        assert chi_square(cells, [0.01] * 100) < CHI_SQUARE_LIMIT[99]


@given(st.integers(-(2**70), 2**70), st.integers(0, 2**20))
def test_random_numbers_lie_below_one(seed, index):
    number = uniform(seed, index)
    assert 0.0 <= number < 1.0
    assert uniform(seed, index) == number


def test_random_numbers_stay_what_they_are():
    """A recording holds seeds, not tokens: a change here changes what replayed requests say."""
    expected = [0.6524484863740321, 0.1663964394676607, 0.36818951565166946]
    assert [uniform(0, 0), uniform(0, 1), uniform(1, 0)] == expected


# ---- greedy ----


def test_greedy_takes_the_largest():
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, -1.0, 4.0]])
    assert [c.token_id for c in sample(logits, [make_spec(temperature=0.0)] * 2)] == [1, 0]


def test_greedy_respects_bias_and_penalties():
    logits = [[2.0, 1.9, 0.0]]
    assert sample(torch.tensor(logits), [make_spec(temperature=0.0, logit_bias=((2, 5.0),))])[0].token_id == 2
    assert sample(torch.tensor(logits), [make_spec(0, (0,), 0, temperature=0.0, presence_penalty=0.2)])[0].token_id == 1


def test_a_greedy_row_beside_others_is_greedy():
    logits = torch.tensor([[0.0, 0.1, 0.0]] * 50)
    specs = [make_spec(i, temperature=0.0 if i % 2 else 1.0) for i in range(50)]
    assert {c.token_id for c in sample(logits, specs)[1::2]} == {1}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(bad, temperature):
    with pytest.raises(EngineError, match="not finite"):
        sample(torch.tensor([[0.0, 1.0], [0.0, bad]]), [make_spec(temperature=temperature)] * 2)


# ---- logits ----


def test_bias_is_added_and_adds_up():
    row = torch.zeros(4)
    process_logits(row, make_spec(logit_bias=((1, 2.5), (3, -1.0), (1, 0.5))))
    assert row.tolist() == [0.0, 3.0, 0.0, -1.0]


@pytest.mark.parametrize(("output_index", "masked"), [(0, True), (2, True), (3, False)])
def test_stop_tokens_wait_for_min_tokens(output_index, masked):
    row = torch.zeros(4)
    # 99 is no token of this vocabulary: nothing to mask.
    process_logits(row, make_spec(output_index, min_tokens=3, stop_token_ids=(1, 2, 99)))
    assert (row == -math.inf).tolist() == [False, masked, masked, False]


def test_repetition_penalty_counts_prompt_and_output_once():
    row = torch.tensor([4.0, -4.0, 4.0, -4.0])
    process_logits(row, make_spec(1, (0, 0, 1), 2, repetition_penalty=2.0))
    assert row.tolist() == [2.0, -8.0, 4.0, -4.0]


def test_presence_and_frequency_penalties_count_output_only():
    row = torch.zeros(4)
    # Prompt 0 0 1, output 1 2 2 2.
    process_logits(row, make_spec(4, (0, 0, 1, 1, 2, 2, 2), 3, presence_penalty=0.5, frequency_penalty=0.25))
    assert row.tolist() == [0.0, -0.75, -1.25, 0.0]


def test_penalties_come_after_the_bias():
    row = torch.tensor([-1.0, 0.0])
    # (-1 + 5) / 2 - 1 = 1; the other way round it would be -1 * 2 - 1 + 5 = 2.
    process_logits(row, make_spec(1, (0,), 0, logit_bias=((0, 5.0),), repetition_penalty=2.0, presence_penalty=1.0))
    assert row.tolist() == [1.0, 0.0]


# ---- log-probabilities ----


def test_logprobs_are_those_of_the_model_not_of_the_sampler():
    logits = torch.tensor([[1.0, 2.0, 0.5, -1.0]])
    expected = logits[0].log_softmax(-1).tolist()
    spec = make_spec(1, (1,), 0, logprobs=2, temperature=0.0, logit_bias=((3, 50.0),), repetition_penalty=3.0)
    (choice,) = sample(logits, [spec])
    assert choice.token_id == 3
    assert choice.logprob == pytest.approx(expected[3])
    assert [token_id for token_id, _ in choice.top_logprobs] == [1, 0]
    assert [value for _, value in choice.top_logprobs] == pytest.approx([expected[1], expected[0]])


def test_more_logprobs_than_tokens_are_all_tokens():
    (choice,) = sample(torch.tensor([[1.0, 2.0]]), [make_spec(logprobs=20, temperature=0.0)])
    assert [token_id for token_id, _ in choice.top_logprobs] == [1, 0]


# ---- filters and draws ----


def kept_by(logits: list[float], **values) -> set[int]:
    """Tokens that can be drawn at all, probed at many numbers and at both ends."""
    row = torch.tensor(logits)
    numbers = [i / 2000 for i in range(2000)] + [1.0 - 2.0**-52]
    return {draw(row, params(**values), number) for number in numbers}


def naive_probabilities(logits: list[float], **values) -> dict[int, float]:
    """The distribution by the definition: temperature, top-k, top-p, min-p, each on what the one before left over."""
    p = params(**values)
    weights = {i: math.exp((x - max(logits)) / p.temperature) for i, x in enumerate(logits)}
    ranked = sorted(weights, key=lambda i: -weights[i])
    if p.top_k:
        ranked = ranked[: p.top_k]
    total = math.fsum(weights[i] for i in ranked)
    if p.top_p < 1.0:
        running, kept = 0.0, []
        for i in ranked:
            kept.append(i)
            running += weights[i] / total
            if running >= p.top_p:
                break
        ranked = kept
    ranked = [i for i in ranked if weights[i] >= p.min_p * weights[ranked[0]]]
    total = math.fsum(weights[i] for i in ranked)
    return {i: weights[i] / total for i in ranked}


# Powers of two: probabilities 1/2, 1/4, 1/8, 1/16, 1/16, whose sums are exact.
HALVES = [math.log(x) for x in (0.25, 0.5, 0.0625, 0.125, 0.0625)]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, {0, 1, 2, 3, 4}),
        ({"top_k": 2}, {1, 0}),
        ({"top_k": 1}, {1}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.01}, {1}),
        ({"top_p": 0.6}, {1, 0}),
        ({"top_p": 0.8}, {1, 0, 3}),
        ({"min_p": 0.2}, {1, 0, 3}),
        ({"min_p": 0.3}, {1, 0}),
        ({"min_p": 1.0}, {1}),
        # Of the first two, the likelier one has 2/3.
        ({"top_k": 2, "top_p": 0.6}, {1}),
        ({"top_k": 3, "min_p": 0.4}, {1, 0}),
        # Squared: 1/4, 1/16, 1/64, ...: the third has 1/16 of the first.
        ({"temperature": 0.5, "min_p": 0.1}, {1, 0}),
    ],
)
def test_filters(values, expected):
    assert kept_by(HALVES, **values) == expected


@settings(max_examples=60)
@given(
    # Steps of 1/64: logits that differ by less than a float64 resolves tie, and either order of a tie is right.
    logits=st.lists(st.integers(-384, 384).map(lambda n: n / 64), min_size=2, max_size=40, unique=True),
    values=st.fixed_dictionaries(
        {
            "temperature": st.floats(0.2, 3.0),
            "top_k": st.integers(0, 45),
            "top_p": st.floats(0.05, 1.0),
            "min_p": st.floats(0.0, 0.9),
        }
    ),
    number=st.floats(0.0, 1.0, exclude_max=True),
)
def test_draws_equal_the_definition(logits, values, number):
    probabilities = naive_probabilities(logits, **values)
    top_p = values["top_p"]
    filtered = 0 < values["top_k"] < len(logits) or top_p < 1.0 or values["min_p"] > 0.0
    order = sorted(probabilities, key=lambda i: -probabilities[i]) if filtered else sorted(probabilities)
    chosen = draw(torch.tensor(logits), params(**values), number)
    # Rounding may move a border by the last digits: accept either side of it.
    accepted, running = set(), 0.0
    for token_id in order:
        if running - 1e-6 <= number <= running + probabilities[token_id] + 1e-6:
            accepted.add(token_id)
        running += probabilities[token_id]
    near_border = any(
        abs(total - top_p) < 1e-6 for total in _running_sums(naive_probabilities(logits, **{**values, "top_p": 1.0}))
    )
    assert chosen in accepted or near_border


def _running_sums(probabilities: dict[int, float]) -> list[float]:
    sums, running = [], 0.0
    for value in sorted(probabilities.values(), reverse=True):
        running += value
        sums.append(running)
    return sums


@pytest.mark.parametrize("values", [{"top_p": 0.9}, {"min_p": 0.999}])
def test_a_flat_distribution_needs_more_than_the_usual_candidates(values):
    """4096 equal tokens and one that hardly differs: top-p 0.9 keeps about 3687 of them, min-p all."""
    row = torch.zeros(4096)
    row[17] = 1e-4
    last = draw(row, params(**values), 1.0 - 2.0**-52)
    distinct = {draw(row, params(**values), i / 500) for i in range(500)}
    assert 17 in {draw(row, params(**values), 0.0)}
    assert len(distinct) > 490
    assert last not in distinct


@pytest.mark.parametrize("temperature", [1e-300, 1e-9, 100.0])
def test_extreme_temperatures(temperature):
    row = torch.tensor([1.0, 1.5, -3.0])
    chosen = {draw(row, params(temperature=temperature), i / 100) for i in range(100)}
    assert chosen == ({0, 1, 2} if temperature == 100.0 else {1})


def test_tokens_without_probability_are_never_drawn():
    row = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, -math.inf])
    for values in ({}, {"top_p": 0.99}, {"top_k": 4}):
        assert kept_by(row.tolist(), **values) == {1, 3}


@pytest.mark.parametrize("values", [{}, {"top_k": 3}, {"top_p": 0.95}, {"min_p": 0.2}, {"temperature": 2.0}])
def test_the_distribution_is_right(values):
    expected = naive_probabilities(HALVES, **values)
    counts = draws(HALVES, 4000, **values)
    assert set(counts) == set(expected)
    statistic = chi_square(counts, [expected.get(i, 0.0) for i in range(len(HALVES))])
    assert statistic < CHI_SQUARE_LIMIT[len(expected) - 1]


FILTERS = [{}, {"top_k": 3}, {"top_k": 9, "top_p": 0.7}, {"top_p": 0.95}, {"min_p": 0.2}, {"top_k": 500, "min_p": 0.1}]


@pytest.mark.parametrize("num_rows", [1, 8, 19])
def test_draws_that_ask_nothing_equal_those_that_look(num_rows):
    """`draw_rows`, which runs on devices, against `draw`: any filters side by side, in groups of up to eight rows."""
    generator = torch.Generator().manual_seed(num_rows)
    for turn in range(20):
        logits = torch.randn(num_rows, 400, generator=generator) * 3
        logits[:, ::7] = -math.inf
        specs = [
            make_spec(turn, seed=row, temperature=0.6 + 0.1 * turn, **FILTERS[(turn + row * row) % len(FILTERS)])
            for row in range(num_rows)
        ]
        expected = [
            draw(row, spec.params, uniform(spec.params.seed, turn)) for row, spec in zip(logits, specs, strict=True)
        ]
        assert draw_rows(logits, specs, torch.full((num_rows,), -1)).tolist() == expected


def test_greedy_rows_among_drawn_ones_keep_their_token():
    specs = [make_spec(temperature=0.0), make_spec(temperature=1.0, top_k=1), make_spec(temperature=0.0, top_k=5)]
    logits = torch.tensor([[3.0, 1.0, 0.0]] * 3)
    assert draw_rows(logits, specs, torch.tensor([2, 2, 2])).tolist() == [2, 0, 2]


def test_rows_that_are_not_numbers_give_a_token_that_exists():
    """It is never used, but the next step may have been launched with it."""
    logits = torch.tensor([[math.nan, 1.0, 2.0], [-math.inf] * 3])
    specs = [make_spec(top_p=0.5), make_spec()]
    assert all(0 <= token_id < 3 for token_id in draw_rows(logits, specs, torch.tensor([0, 0])).tolist())


def test_other_rows_do_not_matter():
    """Bit by bit: with any neighbours, in any place."""
    torch.manual_seed(0)
    logits = torch.randn(6, 5000) * 3
    specs = [
        make_spec(3, seed=1),
        make_spec(3, seed=1, top_k=50),
        make_spec(3, seed=1, top_p=0.9, logprobs=3),
        make_spec(3, tuple(range(40)), 10, seed=1, repetition_penalty=1.3, frequency_penalty=0.5),
        make_spec(3, temperature=0.0, logprobs=1),
        make_spec(3, seed=1, min_p=0.01, temperature=0.7),
    ]
    alone = [sample(logits[i : i + 1].clone(), [spec])[0] for i, spec in enumerate(specs)]
    assert sample(logits.clone(), specs) == alone
    order = [4, 2, 5, 0, 3, 1]
    assert sample(logits[order], [specs[i] for i in order]) == [alone[i] for i in order]
