"""Chooses tokens from logits.

The order of the steps is vLLM's: logit bias, `min_tokens`, repetition penalty, presence and frequency penalties,
grammar, temperature, top-k, top-p, min-p, draw. Log-probabilities are those of the model: before any of these steps.

A draw is a function of the logits of one row, its parameters, and `(seed, output_index)`. Every step works row by row,
so that it does not matter what else is in the batch.

Sampling comes in two parts. `enqueue` only puts work on the device and asks it nothing; `read` looks at the results,
behind a fence. So the next step can be launched before the tokens of this one are known to the host.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from agentserve.core.batch import SampleSpec
from agentserve.core.request import SamplingParams
from agentserve.core.splitmix import mix64
from agentserve.errors import EngineError
from agentserve.executors.pytorch.transfer import to_device, to_host, upload

_NUM_CANDIDATES = 1024
"""How many of the most likely tokens top-p and min-p look at before they sort the whole vocabulary."""
_ROWS_AT_ONCE = 8
"""Rows whose probabilities are worked on together on a device: this bounds the memory for temporaries."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A token and, if they were asked for, log-probabilities: see `core.batch.TokenSample`."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class _Logprobs:
    """Log-probabilities of the rows that asked for them, on their way to the host."""

    rows: tuple[int, ...]
    num_top: tuple[int, ...]
    chosen: Tensor
    """`[len(rows)]`"""
    top_values: Tensor
    """`[len(rows), max(num_top)]`, falling."""
    top_ids: Tensor


@dataclass(slots=True)
class Sampled:
    """Chosen tokens. Only `token_ids` may be used before a fence, and only by work in the same stream."""

    token_ids: Tensor
    """`[n]` int64 on the device."""
    host_token_ids: Tensor
    maxima: Tensor
    """`[n]` in host memory: the largest logit of each row. A NaN wins every maximum."""
    logprobs: _Logprobs | None


class RowSampler(Protocol):
    """Draws for all rows at once by kernels of a device: `device_sampler.DeviceSampler`."""

    def __call__(self, logits: Tensor, specs: Sequence[SampleSpec], numbers: Sequence[float]) -> Tensor:
        """Tokens `[n]` int64 on the device for processed `logits`; `numbers` are what `uniform` gives for the rows."""
        ...


def enqueue(
    logits: Tensor,
    specs: Sequence[SampleSpec],
    row_sampler: RowSampler | None = None,
    masks: Mapping[int, bytes] = MappingProxyType({}),
) -> Sampled:
    """Chooses a token for each row of `logits` `[n, vocab_size]` float32, which are overwritten.

    On a device nothing waits for the host, nor the host for the device. `row_sampler` draws, where there is one.
    `masks` has what `core.masks.TokenMasks` says for the rows that are constrained.
    """
    maxima, token_ids = logits.max(dim=-1)
    logprobs = None
    if not all(_is_plain_greedy(spec.params) for spec in specs):
        asked = [row for row, spec in enumerate(specs) if spec.params.logprobs is not None]
        # Before the logits are overwritten; a copy of the rows, taken by the index.
        raw = torch.log_softmax(logits[_ids(asked, logits)], dim=-1) if asked else None
        for row, spec in enumerate(specs):
            process_logits(logits[row], spec)
        for row, mask in masks.items():
            apply_mask(logits[row], mask)
        token_ids = _choose(logits, specs, row_sampler)
        if raw is not None:
            logprobs = _gather_logprobs(raw, token_ids, asked, specs)
    return Sampled(token_ids, to_host(token_ids), to_host(maxima), logprobs)


def read(sampled: Sampled) -> list[Choice]:
    """What was chosen, one for each row. Call it behind a fence.

    Raises EngineError for logits that are not numbers.
    """
    if not all(map(math.isfinite, sampled.maxima.tolist())):
        raise EngineError("the model computed logits that are not finite")
    choices = [Choice(token_id) for token_id in sampled.host_token_ids.tolist()]
    if (logprobs := sampled.logprobs) is not None:
        columns = zip(
            logprobs.rows,
            logprobs.num_top,
            logprobs.chosen.tolist(),
            logprobs.top_ids.tolist(),
            logprobs.top_values.tolist(),
            strict=True,
        )
        for row, num_top, chosen, token_ids, values in columns:
            top = tuple(zip(token_ids[:num_top], values[:num_top], strict=True))
            choices[row] = Choice(choices[row].token_id, chosen, top)
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
        row.index_add_(0, _ids(token_ids, row), upload(biases, row.dtype, row.device))
    if spec.output_index < params.min_tokens:
        # A stop token that the vocabulary does not have cannot be sampled anyhow.
        stop_ids = [token_id for token_id in params.stop_token_ids if 0 <= token_id < len(row)]
        row.index_fill_(0, _ids(stop_ids, row), -math.inf)
    if not params.needs_history:
        return
    if params.repetition_penalty != 1.0:
        seen = _distinct(spec.history, row)[0]
        scores = row[seen]
        penalty = params.repetition_penalty
        # Hugging Face's rule: towards less likely on either side of zero.
        row[seen] = torch.where(scores > 0, scores / penalty, scores * penalty)
    if params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
        seen, counts = _distinct(spec.history[spec.num_prompt_tokens :], row)
        row[seen] -= params.presence_penalty + params.frequency_penalty * counts


def apply_mask(row: Tensor, mask: bytes) -> None:
    """Makes tokens impossible in the logits of one row, `[vocab_size]`, in place; `mask` as in `core.masks`."""
    bits = np.unpackbits(np.frombuffer(mask, dtype=np.uint8), bitorder="little")[: len(row)]
    forbidden = np.ones(len(row), dtype=np.bool_)
    forbidden[: len(bits)] = bits == 0
    row.masked_fill_(to_device(torch.from_numpy(forbidden), row.device), -math.inf)


# ---- the draw ----


def _choose(logits: Tensor, specs: Sequence[SampleSpec], row_sampler: RowSampler | None) -> Tensor:
    """Tokens `[n]` from processed logits."""
    is_greedy = all(spec.params.temperature == 0.0 for spec in specs)
    if row_sampler is not None and not is_greedy:
        return row_sampler(logits, specs, [uniform(spec.params.seed, spec.output_index) for spec in specs])
    greedy = logits.argmax(dim=-1)
    if is_greedy:
        return greedy
    if not logits.is_cpu:
        return draw_rows(logits, specs, greedy)
    token_ids = greedy.tolist()
    for row, spec in enumerate(specs):
        if spec.params.temperature > 0.0:
            token_ids[row] = draw(logits[row], spec.params, uniform(spec.params.seed, spec.output_index))
    return torch.tensor(token_ids)


def draw_rows(logits: Tensor, specs: Sequence[SampleSpec], greedy: Tensor) -> Tensor:
    """`draw` for all rows at once, without a look at any result; rows of temperature 0 take their `greedy` token.

    Where the host may look, `draw` is faster: it rarely has to sort the whole vocabulary.
    """
    groups = [
        _draw_group(logits[start : start + _ROWS_AT_ONCE], specs[start : start + _ROWS_AT_ONCE])
        for start in range(0, len(specs), _ROWS_AT_ONCE)
    ]
    is_drawn = upload([spec.params.temperature > 0.0 for spec in specs], torch.bool, logits.device)
    return torch.where(is_drawn, torch.cat(groups), greedy)


def _draw_group(logits: Tensor, specs: Sequence[SampleSpec]) -> Tensor:
    vocab_size = logits.shape[-1]
    settings: list[tuple[float, ...]] = []
    for spec in specs:
        params = spec.params
        top_k = _top_k(params, vocab_size) or vocab_size
        number = uniform(params.seed, spec.output_index)
        # Any temperature will do for a row whose draw is not used.
        settings.append((params.temperature or 1.0, top_k, params.top_p, params.min_p, number))
    table = upload(settings, torch.float64, logits.device)
    temperature, limit, top_p, min_p, numbers = table.unsqueeze(-1).unbind(1)  # [rows, 1] each
    weights = logits.double()
    weights = ((weights - weights.amax(-1, keepdim=True)) / temperature).exp_()
    sums = weights.cumsum(-1)
    by_id = _place(sums, sums[:, -1:], numbers)
    filtered = [_is_filtered(spec.params, vocab_size) for spec in specs]
    if not any(filtered):
        return by_id.squeeze(-1)
    largest, token_ids = weights.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(vocab_size, device=logits.device)
    largest = largest.masked_fill_(rank >= limit, 0.0)
    sums = largest.cumsum(-1)
    reached = (sums < top_p * sums[:, -1:]).sum(-1, keepdim=True) + 1
    kept = torch.where(top_p < 1.0, reached, vocab_size)
    kept = torch.minimum(kept, (largest >= min_p * largest[:, :1]).sum(-1, keepdim=True))
    kept = torch.minimum(kept, limit.long()).clamp_(1, vocab_size)
    by_rank = token_ids.gather(1, _place(sums, sums.gather(1, kept - 1), numbers))
    return torch.where(upload(filtered, torch.bool, logits.device).unsqueeze(-1), by_rank, by_id).squeeze(-1)


def _place(sums: Tensor, totals: Tensor, numbers: Tensor) -> Tensor:
    """The first place of each row at which the running `sums` exceed `numbers * totals`: `[rows, 1]`."""
    # A row that is not numbers has no such place. Its token will not be used, but the next step may look it up.
    return torch.searchsorted(sums, totals * numbers, right=True).clamp_(max=sums.shape[-1] - 1)


def draw(row: Tensor, params: SamplingParams, number: float) -> int:
    """Draws a token from processed logits `[vocab_size]` by inverting the cumulative distribution at `number`.

    With a filter the tokens are laid out by falling probability, without one by their ids.
    """
    # The maximum first: the largest exponent is then 0, however small the temperature.
    weights = ((row.double() - row.max()) / params.temperature).exp_()
    if not _is_filtered(params, len(row)):
        return _invert(weights, number)
    top_k = _top_k(params, len(row))
    num_candidates = top_k or min(_NUM_CANDIDATES, len(row))
    largest, token_ids = weights.topk(num_candidates)
    total = largest.sum() if top_k else weights.sum()
    kept = _kept(largest, total, params)
    if kept == num_candidates and not top_k:
        # The border may lie beyond the candidates.
        largest, token_ids = weights.sort(descending=True, stable=True)
        kept = _kept(largest, total, params)
    return int(token_ids[_invert(largest[:kept], number)])


def _top_k(params: SamplingParams, vocab_size: int) -> int:
    """How many tokens top-k leaves; 0: all."""
    return params.top_k if 0 < params.top_k < vocab_size else 0


def _is_filtered(params: SamplingParams, vocab_size: int) -> bool:
    return bool(_top_k(params, vocab_size)) or params.top_p < 1.0 or params.min_p > 0.0


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


def _gather_logprobs(raw: Tensor, token_ids: Tensor, asked: Sequence[int], specs: Sequence[SampleSpec]) -> _Logprobs:
    """From log-probabilities `[len(asked), vocab_size]` what the rows `asked` for."""
    num_top = tuple(min(specs[row].params.logprobs or 0, raw.shape[-1]) for row in asked)
    chosen = raw.gather(1, token_ids[_ids(asked, raw)].unsqueeze(-1)).squeeze(-1)
    top_values, top_ids = raw.topk(max(num_top), dim=-1)
    return _Logprobs(tuple(asked), num_top, to_host(chosen), to_host(top_values), to_host(top_ids))


def _is_plain_greedy(params: SamplingParams) -> bool:
    return (
        params.temperature == 0.0
        and not params.constrained
        and params.logprobs is None
        and not params.logit_bias
        and not params.min_tokens
        and not params.needs_history
    )


def _ids(token_ids: Sequence[int], like: Tensor) -> Tensor:
    return upload(token_ids, torch.int64, like.device)


def _distinct(token_ids: Sequence[int], like: Tensor) -> tuple[Tensor, Tensor]:
    """The different values and how often each occurs; counted on the host, since a device cannot say how many it found
    without being waited for."""
    values, counts = np.unique(np.asarray(token_ids, dtype=np.int64), return_counts=True)
    return to_device(torch.from_numpy(values), like.device), to_device(torch.from_numpy(counts), like.device)
