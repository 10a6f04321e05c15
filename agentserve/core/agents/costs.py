"""What it costs to compute a context again: a straight line through the cost model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from agentserve.core.batch import BatchShape, Lane
from agentserve.core.costmodel import CostModel
from agentserve.core.slots import PartitionTable


@dataclass(frozen=True, slots=True)
class ForwardCosts:
    """`T(x) = base_ns + token_ns * x`: the time of a forward pass over x tokens (InferCept, section 4)."""

    base_ns: float
    """Of any step: the weights are read."""
    token_ns: float
    """Of a further token."""
    knee_tokens: int
    """Tokens in a batch that keep the device busy: from there on a token costs what it costs, S in the paper."""
    batch_ns: Callable[[BatchShape], int] | None = field(default=None, compare=False)
    """What a batch costs on the whole device, decodes included; None: only the line is known."""

    @classmethod
    def of(cls, model: CostModel, table: PartitionTable, max_tokens: int) -> ForwardCosts:
        """From a cost model; `max_tokens`: tokens in one batch at most."""

        def batch_ns(shape: BatchShape) -> int:
            return model.duration_ns(shape, Lane.PREFILL, table.whole, False)

        def forward_ns(num_tokens: int) -> int:
            return batch_ns(BatchShape().with_prefill(num_tokens))

        base_ns, full_ns = float(forward_ns(1)), forward_ns(max_tokens)
        token_ns = max(full_ns - base_ns, 1.0) / max(1, max_tokens - 1)
        return cls(base_ns, token_ns, min(max_tokens, max(1, round(base_ns / token_ns))), batch_ns)

    def prefill_ns(self, num_tokens: int) -> float:
        """To compute a context of so many tokens, in batches that keep the device busy."""
        num_batches = max(1, -(-num_tokens // self.knee_tokens))
        return max(self.base_ns * num_batches, self.token_ns * num_tokens)
