"""Where each constrained request is in its grammar."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from llguidance import LLMatcher

from agentserve.errors import EngineError
from agentserve.text.grammar.compiler import CompiledGrammar

_NUM_WORKERS = 2


class GrammarMasks:
    """Implements `core.masks.TokenMasks`. Masks are computed in threads, while the model runs.

    Whoever submits a request calls `open` before and `close` after it.
    """

    def __init__(self) -> None:
        self._sessions: dict[str, _Session] = {}
        self._workers = ThreadPoolExecutor(_NUM_WORKERS, thread_name_prefix="agentserve-mask")

    @property
    def num_open(self) -> int:
        """Requests that are held to a grammar now."""
        return len(self._sessions)

    def shutdown(self) -> None:
        """Ends the threads; no request may be running."""
        self._workers.shutdown(wait=True, cancel_futures=True)

    def open(self, request_id: str, grammar: CompiledGrammar) -> None:
        """A request is held to a grammar from now on; its first mask is computed while its prompt is read."""
        self._sessions[request_id] = _Session(grammar, self._workers)

    def close(self, request_id: str) -> str | None:
        """The request has ended. Returns what went wrong in its grammar, if anything did."""
        session = self._sessions.pop(request_id, None)
        return None if session is None else session.error

    def mask(self, request_id: str, output_index: int) -> bytes:
        session = self._sessions.get(request_id)
        if session is None:
            raise EngineError(f"request {request_id} is constrained, but it has no grammar")
        return session.mask(output_index)

    def accept(self, request_id: str, token_id: int) -> None:
        session = self._sessions.get(request_id)
        if session is not None:
            session.accept(token_id)


class _Session:
    """One request. A grammar that gives up while it is used (its limits are exceeded) allows nothing but the end."""

    def __init__(self, grammar: CompiledGrammar, workers: ThreadPoolExecutor) -> None:
        self.error: str | None = None
        self._eos_token_ids = grammar.eos_token_ids
        self._matcher: LLMatcher = grammar.prototype.deep_copy()
        self._workers = workers
        self._num_accepted = 0
        self._next: Future[bytes] = workers.submit(self._compute)

    def mask(self, output_index: int) -> bytes:
        if output_index != self._num_accepted:
            raise EngineError(
                f"the grammar is at token {self._num_accepted}, but token {output_index} is to be sampled"
            )
        return self._next.result()

    def accept(self, token_id: int) -> None:
        self._next.result()  # the matcher is not used by two threads
        self._num_accepted += 1
        if self.error is None and not self._matcher.consume_token(token_id) and token_id not in self._eos_token_ids:
            self._fail(f"token {token_id} was sampled, which the grammar does not allow")
        self._next = self._workers.submit(self._compute)

    def _compute(self) -> bytes:
        mask = self._matcher.compute_bitmask() if self.error is None else b""
        if self._matcher.is_error():
            self._fail(self._matcher.get_error())
        return mask if self.error is None and any(mask) else self._only_end()

    def _fail(self, reason: str) -> None:
        first = reason.split("<state>", maxsplit=1)[0]
        self.error = f"the grammar could not be followed to its end: {' '.join(first.split())}"

    def _only_end(self) -> bytes:
        mask = bytearray(max(self._eos_token_ids) // 8 + 1)
        for token_id in self._eos_token_ids:
            mask[token_id // 8] |= 1 << token_id % 8
        return bytes(mask)
