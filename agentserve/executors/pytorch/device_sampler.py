"""Draws tokens on a GPU by the kernels of `agentserve_kernels.sampling`, without a look at any result."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from agentserve.core.batch import SampleSpec
from agentserve.executors.pytorch.transfer import upload
from agentserve_kernels import sampling

_ROWS_AT_ONCE = 8
"""Rows with a filter that are sorted together: this bounds the memory for temporaries."""


class DeviceSampler:
    """Implements `sampler.RowSampler` for one lane, whose batches follow each other on the device.

    The tokens are those of `sampler.draw_rows`: float64 throughout, by id without a filter, by rank with one.
    """

    def __init__(self, max_rows: int, vocab_size: int, torch_device: torch.device) -> None:
        """Takes the workspace for `max_rows` rows."""
        self._scratch = sampling.SampleScratch(max_rows, vocab_size, device=torch_device)
        self._non_finite = torch.empty(max_rows, dtype=torch.int32, device=torch_device)

    def __call__(self, logits: Tensor, specs: Sequence[SampleSpec], numbers: Sequence[float]) -> Tensor:
        """Tokens `[n]` int64 for processed `logits` `[n, vocab_size]`; `numbers` are uniform in [0, 1)."""
        params = [spec.params for spec in specs]
        # The kernels compare with the vocabulary in 32 bits, and beyond it there is nothing to choose from.
        top_ks = [min(max(p.top_k, 0), logits.shape[1]) for p in params]
        settings = [[p.temperature for p in params], [p.top_p for p in params], [p.min_p for p in params], [*numbers]]
        temperature, top_p, min_p, uniform = upload(settings, torch.float64, logits.device).unbind(0)
        top_k = upload(top_ks, torch.int32, logits.device)
        token_ids = torch.empty(len(specs), dtype=torch.int64, device=logits.device)
        rows_at_once = len(specs) if self._candidates(settings, top_ks, logits, slice(None)) is None else _ROWS_AT_ONCE
        for start in range(0, len(specs), rows_at_once):
            rows = slice(start, start + rows_at_once)
            sampling.sample(
                logits[rows],
                temperature[rows],
                top_k[rows],
                top_p[rows],
                min_p[rows],
                uniform[rows],
                token_ids[rows],
                self._non_finite[: len(specs)][rows],
                self._scratch,
                num_candidates=self._candidates(settings, top_ks, logits, rows),
            )
        return token_ids

    @staticmethod
    def _candidates(settings: list[list[float]], top_ks: list[int], logits: Tensor, rows: slice) -> int | None:
        temperatures, top_ps, min_ps, _ = settings
        number: int | None = sampling.num_candidates(
            temperatures[rows], top_ks[rows], top_ps[rows], min_ps[rows], logits.shape[1]
        )
        return number
