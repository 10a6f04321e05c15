"""The port behind which grammars are: which tokens a request may produce next.

The control plane knows only that a request is constrained (`SamplingParams.constrained`): nobody looks ahead of such a
request, since what it may produce depends on the token that is being sampled.
"""

from __future__ import annotations

from typing import Protocol


class TokenMasks(Protocol):
    """What an executor asks, from any thread; about one request in the order of its tokens.

    Masks are computed beside the forward pass: the next one is begun when a token is accepted.
    """

    def mask(self, request_id: str, output_index: int) -> bytes:
        """The tokens that may be output token `output_index`: bit `i % 8` of byte `i // 8` for token i.

        Tokens beyond the end are not allowed; at least one token is. Waits until the mask is computed. Raises
        EngineError for a request that has no grammar, or if another token is the next one.
        """
        ...

    def accept(self, request_id: str, token_id: int) -> None:
        """The next token was sampled. Has no effect for requests without a grammar."""
        ...
