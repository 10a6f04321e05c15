"""Chooses tokens from logits.

The order of the steps is vLLM's: logit bias, `min_tokens`, repetition penalty, presence and frequency penalties,
temperature, top-k, top-p, min-p, draw. Log-probabilities are those of the model: before any of these steps.

A draw is a function of the logits of one row, its parameters, and `(seed, output_index)`. Every step works row by row,
so that it does not matter what else is in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agentserve.core.batch import SampleSpec
from agentserve.core.request import SamplingParams
from agentserve.core.splitmix import mix64
from agentserve.errors import EngineError

_NUM_CANDIDATES = 1024
"""How many of the most likely tokens top-p and min-p look at before they sort the whole vocabulary."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A token and, if they were asked for, log-probabilities: see `core.batch.TokenSample`."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


def sample(logits: Tensor, specs: Sequence[SampleSpec]) -> list[Choice]:
    """Chooses a token for each row of `logits` `[n, vocab_size]` float32, which are overwritten.

    Raises EngineError for logits that are not numbers.
    """
    # A NaN wins every maximum: one look at the maxima finds it, and greedy decoding needs them anyway.
    maxima, greedy = logits.max(dim=-1)
    if not torch.isfinite(maxima).all():
        raise EngineError("the model computed logits that are not finite")
    if all(_is_plain_greedy(spec.params) for spec in specs):
        return [Choice(token_id) for token_id in greedy.tolist()]
    asked = [row for row, spec in enumerate(specs) if spec.params.logprobs is not None]
    # Before the logits are overwritten; a copy of the rows, taken by the index.
    raw = torch.log_softmax(logits[asked], dim=-1) if asked else None
    for row, spec in enumerate(specs):
        process_logits(logits[row], spec)
    token_ids = logits.argmax(dim=-1).tolist()
    for row, spec in enumerate(specs):
        if spec.params.temperature > 0.0:
            token_ids[row] = draw(logits[row], spec.params, uniform(spec.params.seed, spec.output_index))
    choices = [Choice(token_id) for token_id in token_ids]
    if raw is not None:
        for row, logprobs in zip(asked, raw, strict=True):
            choices[row] = _with_logprobs(token_ids[row], logprobs, specs[row].params.logprobs or 0)
    return choices


def uniform(seed: int, output_index: int) -> float:
    """The random number in [0, 1) for output token `output_index`: 52 bits of SplitMix64 (Steele et al., 2014).

    With 52 bits, one less than a float64 resolves, the product with a sum stays below the sum.
    """
    return (mix64(mix64(seed) + output_index) >> 12) / 2.0**52


def process_logits(row: Tensor, spec: SampleSpec) -> None:
    """Applies bias, `min_tokens` and penalties to the logits of one row, `[vocab_size]`, in place."""
    params = spec.params
    if params.logit_bias:
        token_ids, biases = zip(*params.logit_bias, strict=True)
        row.index_add_(0, _ids(token_ids, row), torch.tensor(biases, dtype=row.dtype, device=row.device))
    if spec.output_index < params.min_tokens:
        # A stop token that the vocabulary does not have cannot be sampled anyhow.
        row[_ids([token_id for token_id in params.stop_token_ids if 0 <= token_id < len(row)], row)] = -math.inf
    if not params.needs_history:
        return
    history = _ids(spec.history, row)
    if params.repetition_penalty != 1.0:
        seen = _distinct(history)[0]
        scores = row[seen]
        penalty = params.repetition_penalty
        # Hugging Face's rule: towards less likely on either side of zero.
        row[seen] = torch.where(scores > 0, scores / penalty, scores * penalty)
    if params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
        seen, counts = _distinct(history[spec.num_prompt_tokens :])
        row[seen] -= params.presence_penalty + params.frequency_penalty * counts


def draw(row: Tensor, params: SamplingParams, number: float) -> int:
    """Draws a token from processed logits `[vocab_size]` by inverting the cumulative distribution at `number`.

    With a filter the tokens are laid out by falling probability, without one by their ids.
    """
    # The maximum first: the largest exponent is then 0, however small the temperature.
    weights = ((row.double() - row.max()) / params.temperature).exp_()
    top_k = params.top_k if 0 < params.top_k < len(row) else 0
    if not top_k and params.top_p == 1.0 and params.min_p == 0.0:
        return _invert(weights, number)
    num_candidates = top_k or min(_NUM_CANDIDATES, len(row))
    largest, token_ids = weights.topk(num_candidates)
    total = largest.sum() if top_k else weights.sum()
    kept = _kept(largest, total, params)
    if kept == num_candidates and not top_k:
        # The border may lie beyond the candidates.
        largest, token_ids = weights.sort(descending=True, stable=True)
        kept = _kept(largest, total, params)
    return int(token_ids[_invert(largest[:kept], number)])


def _kept(weights: Tensor, total: Tensor, params: SamplingParams) -> int:
    """How many of the falling `weights` pass top-p and min-p; at least one."""
    kept = len(weights)
    if params.top_p < 1.0:
        # The smallest number of tokens whose probabilities sum to top_p.
        sums = weights.cumsum(0)
        kept = min(kept, int((sums < params.top_p * total).sum()) + 1)
    if params.min_p > 0.0:
        kept = min(kept, int((weights >= params.min_p * weights[0]).sum()))
    return max(kept, 1)


def _invert(weights: Tensor, number: float) -> int:
    """The first index at which the running sum of `weights` exceeds `number` times their sum."""
    sums = weights.cumsum(0)
    return int(torch.searchsorted(sums, sums[-1] * number, right=True))


def _with_logprobs(token_id: int, logprobs: Tensor, num_top: int) -> Choice:
    values, token_ids = logprobs.topk(min(num_top, len(logprobs)))
    top = tuple(zip(token_ids.tolist(), values.tolist(), strict=True))
    return Choice(token_id, float(logprobs[token_id]), top)


def _is_plain_greedy(params: SamplingParams) -> bool:
    return (
        params.temperature == 0.0
        and params.logprobs is None
        and not params.logit_bias
        and not params.min_tokens
        and not params.needs_history
    )


def _ids(token_ids: Sequence[int], row: Tensor) -> Tensor:
    return torch.tensor(token_ids, dtype=torch.int64, device=row.device)


def _distinct(token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The different values and how often each occurs."""
    values, counts = torch.unique_consecutive(token_ids.sort().values, return_counts=True)
    return values, counts
