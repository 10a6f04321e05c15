"""The simulated executor with answers that somebody has written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from agentserve.core.batch import SampleSpec, TokenSample
from agentserve.core.costmodel import CostModel
from agentserve.core.decode_run import DecodePlan
from agentserve.executors.simulated.executor import SimulatedExecutor

NextToken = Callable[[str, int], int | None]
"""The token of a request at an index of its output; None when its answer has ended."""


class ScriptedExecutor(SimulatedExecutor):
    """Times as in `SimulatedExecutor`, tokens from a script."""

    def __init__(self, cost_model: CostModel, *, next_token: NextToken, **options: Any) -> None:
        """`options` are those of `SimulatedExecutor`."""
        super().__init__(cost_model, **options)
        self._next_token = next_token

    def decode_ends(self, plan: DecodePlan, before_ns: int | None) -> tuple[int, list[int]]:
        """Nothing is foreseen: where an answer ends is up to the script."""
        del plan, before_ns
        return 0, []

    def _sample(self, request_id: str, spec: SampleSpec) -> TokenSample:
        params = spec.params
        if params.constrained:
            # The script says what comes, also where a grammar would not allow it.
            params = replace(params, constrained=False)
            spec = SampleSpec(params, spec.output_index, spec.history, spec.num_prompt_tokens)
        made_up = super()._sample(request_id, spec)
        token_id = self._next_token(request_id, spec.output_index)
        if token_id is None:
            if not params.stop_token_ids:
                return made_up  # the client wants no end before `max_tokens`
            token_id = params.stop_token_ids[0]
        top = tuple(
            (token_id if rank == 0 else other, value) for rank, (other, value) in enumerate(made_up.top_logprobs)
        )
        return TokenSample(request_id, token_id, made_up.logprob, top)
