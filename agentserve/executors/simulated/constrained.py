"""Made-up tokens that follow a grammar."""

from __future__ import annotations

from collections.abc import Sequence

from agentserve.core.batch import SampleSpec
from agentserve.core.masks import TokenMasks
from agentserve.core.splitmix import mix64
from agentserve.errors import EngineError

_CLOSE_ONE_IN = 4
"""How often a token that ends something is preferred to the text that is made up anyway."""


class ConstrainedTokens:
    """Chooses among the tokens that a grammar allows, so that the output is valid and comes to an end."""

    def __init__(self, masks: TokenMasks, closing_token_ids: Sequence[int]) -> None:
        """`closing_token_ids`: tokens that end strings, objects and arrays, the best one first."""
        self._masks = masks
        self._closing = tuple(closing_token_ids)

    def choose(self, request_id: str, spec: SampleSpec, wanted: int) -> int:
        """`wanted` if it is allowed, most of the time; a function of the seed and the grammar.

        Raises EngineError for a request without a grammar.
        """
        mask = self._masks.mask(request_id, spec.output_index)
        number = mix64(mix64(spec.params.seed) + spec.output_index)
        ends = (*spec.params.stop_token_ids, *self._closing)
        wants_end = wanted in spec.params.stop_token_ids or number % _CLOSE_ONE_IN == 0
        order = (*ends, wanted) if wants_end else (wanted, *ends)
        token_id = next((token_id for token_id in order if _is_allowed(mask, token_id)), None)
        if token_id is None:
            token_id = _nth_allowed(mask, number)
        self._masks.accept(request_id, token_id)
        return token_id


def _is_allowed(mask: bytes, token_id: int) -> bool:
    return token_id // 8 < len(mask) and bool(mask[token_id // 8] >> token_id % 8 & 1)


def _nth_allowed(mask: bytes, number: int) -> int:
    """One of the allowed tokens, chosen by `number`."""
    num_allowed = int.from_bytes(mask, "little").bit_count()
    if num_allowed == 0:
        raise EngineError("a grammar allows no token at all")
    rank = number % num_allowed
    for index, byte in enumerate(mask):
        if rank < byte.bit_count():
            allowed = [bit for bit in range(8) if byte >> bit & 1]
            return index * 8 + allowed[rank]
        rank -= byte.bit_count()
    raise AssertionError("more bits were counted than there are")
