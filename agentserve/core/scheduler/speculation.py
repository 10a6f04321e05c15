"""A piece of a prompt that nobody waits for, in the lanes: below all requests, and out of their way at once."""

from __future__ import annotations

from collections.abc import Callable

from agentserve.core.memory.manager import AllocationOutcome, MemoryManager
from agentserve.core.request import Request, RequestStatus


class SpeculationSlot:
    """Holds one piece at most. Its last token is a placeholder that is never computed, so nothing is ever sampled."""

    def __init__(self, memory: MemoryManager, give_back: Callable[[str], None]) -> None:
        """`give_back` takes the blocks of a request and tells the executor that it has ended."""
        self._memory = memory
        self._give_back = give_back
        self.request: Request | None = None

    @property
    def ready(self) -> Request | None:
        """The piece, if it has tokens to be put into a batch."""
        return None if self.request is None or self.request.in_flight else self.request

    def start(self, request: Request) -> bool:
        """Gives a piece its blocks, which are free; False, and nothing has changed, if it cannot start."""
        memory, adapters = self._memory, self._memory.adapters
        assert self.request is None, "a piece is under way"
        if adapters is not None and not adapters.admits(request, set()):
            return False
        allocation = memory.allocate(
            request.request_id,
            request.token_ids,
            salt=request.cache_salt,
            session=request.session_blocks,
            ignore_pins=True,
        )
        if allocation.outcome is not AllocationOutcome.ALLOCATED:
            return False
        assert not allocation.num_loading_tokens, "what is loaded sooner is not computed"
        if adapters is not None:
            request.adapter_slot = adapters.acquire(request)
        request.status = RequestStatus.RUNNING
        request.prefill_target = len(request.token_ids) - 1
        request.num_computed_tokens = request.num_cached_at_admission = allocation.num_cached_tokens
        self.request = request
        return True

    def advanced(self, num_computed_tokens: int) -> None:
        """A chunk of the piece was computed; the last one ends it."""
        request = self.request
        assert request is not None, "nothing is under way"
        request.num_computed_tokens = num_computed_tokens
        self._memory.commit(request.request_id, request.token_ids, num_computed_tokens)
        if not request.is_prefilling:
            self.end()

    def give_way(self) -> bool:
        """Ends the piece, because somebody needs what it has; False while it is in flight: then its batch ends it."""
        if self.ready is not None:
            self.end()
        return self.request is None

    def end(self) -> None:
        """Gives everything back. What was computed, as far as it fills blocks, stays cached."""
        request = self.request
        assert request is not None and not request.in_flight, "blocks are still written to"
        self.request = None
        request.status = RequestStatus.FINISHED
        blocks = request.session_blocks
        before = () if blocks is None else tuple(blocks.path)
        self._give_back(request.request_id)
        if blocks is None:
            return
        path = blocks.path
        if all(old is new or old.key == new.key for old, new in zip(before, path, strict=False)):
            blocks.path = [*path, *before[len(path) :]]  # what was not computed still belongs to its history

    def check_invariants(self, flying: set[str]) -> None:
        """Raises AssertionError if the piece is not as it must be; `flying`: the requests of the batches in flight."""
        request = self.request
        if request is not None:
            assert request.status is RequestStatus.RUNNING and request.is_prefilling, request.request_id
            assert self._memory.holds(request.request_id), "a piece runs without blocks"
            assert request.in_flight == (request.request_id in flying), "a piece is lost"
