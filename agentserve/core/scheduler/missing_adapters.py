"""Which requests are passed over in an admission because their LoRA adapters are not on the device."""

from __future__ import annotations

from agentserve.core.memory.modules import AdapterModule
from agentserve.core.request import Request


class MissingAdapters:
    """One pass over the requests that wait, in the order of their ranks."""

    __slots__ = ("_adapters", "_held", "_passed")

    def __init__(self, adapters: AdapterModule | None) -> None:
        self._adapters = adapters
        self._held: set[str] = set()
        self._passed: list[Request] = []

    def pass_over(self, request: Request) -> bool:
        """Whether a request has to wait for its adapter, as others may have to for what it needs."""
        if self._adapters is None or self._adapters.admits(request, self._held):
            return False
        self._passed.append(request)
        return True

    def shut_out(self, request: Request) -> bool:
        """Whether a request may not pass those that are passed over: it has used up more time slices."""
        return bool(self._passed) and request.num_slices > self._passed[0].num_slices

    def first_without_slot(self) -> Request | None:
        """The first one for whose adapter no slot is left, when those before it have the idle ones. O(slots)."""
        if self._adapters is None or not self._passed:
            return None
        return next(iter(self._passed[self._adapters.num_idle_slots :]), None)
