"""A torch.cuda of our own.

Its streams run nothing until somebody waits, and then in the order that is worst for whoever forgot to wait: the latest
stream first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from agentserve.executors.pytorch.devices.cuda_driver import CudaDriver, CudaUnavailableError
from agentserve.executors.pytorch.devices.green_plan import DeviceFacts
from tests.executors.fake_cuda import H200, FakeDriver, Gpu


@dataclass(eq=False)
class FakeEvent:
    runtime: FakeRuntime
    reached: bool = False
    num_sleeps: int = 0

    def query(self) -> bool:
        return self.reached

    def synchronize(self) -> None:
        self.num_sleeps += 1
        self.runtime.run_until(lambda: self.reached)


@dataclass(eq=False)
class FakeStream:
    handle: int
    urgent: bool | None = None
    operations: deque[Callable[[], bool]] = field(default_factory=deque)
    """Each returns whether it is done; one that is not holds up what is behind it."""


class FakeRuntime:
    """See the module. Without a driver there are no bindings on this machine."""

    def __init__(self, gpu: Gpu = H200, driver: FakeDriver | None = None) -> None:
        self.gpu = gpu
        self.fake_driver = driver
        self.streams: list[FakeStream] = []
        self.current: FakeStream | None = None
        self.broken: Exception | None = None
        self.log: list[str] = []

    def enqueue(self, operation: Callable[[], None]) -> None:
        """What a kernel launch does."""

        def run() -> bool:
            operation()
            return True

        assert self.current is not None, "a launch outside of any slot"
        self.current.operations.append(run)

    def run_until(self, reached: Callable[[], bool]) -> None:
        while not reached():
            if self.broken is not None:
                raise self.broken
            for stream in reversed(self.streams):
                if stream.operations and stream.operations[0]():
                    stream.operations.popleft()
                    break
            else:
                raise AssertionError("deadlock: every stream waits")

    # ---- CudaRuntime ----

    def initialize(self, index: int) -> None:
        self.log.append("initialize")

    def load_driver(self) -> CudaDriver:
        if self.fake_driver is None:
            raise CudaUnavailableError("cuda-python is not installed")
        return self.fake_driver.driver()

    def facts(self, index: int) -> DeviceFacts:
        gpu = self.gpu
        return DeviceFacts(gpu.name, gpu.compute_capability, gpu.num_sms, gpu.memory_bytes, gpu.l2_bytes)

    def stream(self, index: int, *, urgent: bool) -> FakeStream:
        self.streams.append(FakeStream(len(self.streams), urgent))
        return self.streams[-1]

    def external_stream(self, index: int, handle: int) -> FakeStream:
        self.streams.append(FakeStream(handle))
        return self.streams[-1]

    @contextmanager
    def use(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def record(self, stream: FakeStream) -> FakeEvent:
        event = FakeEvent(self)

        def reach() -> bool:
            event.reached = True
            return True

        stream.operations.append(reach)
        return event

    def wait_event(self, stream: FakeStream, event: FakeEvent) -> None:
        stream.operations.append(lambda: event.reached)

    def synchronize_stream(self, stream: FakeStream) -> None:
        self.run_until(lambda: not stream.operations)

    def synchronize(self, index: int) -> None:
        self.log.append("synchronize")
        self.run_until(lambda: not any(stream.operations for stream in self.streams))

    def memory(self, index: int) -> tuple[int, int]:
        return self.gpu.memory_bytes // 2, self.gpu.memory_bytes
