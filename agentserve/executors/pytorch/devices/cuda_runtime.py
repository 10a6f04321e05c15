"""The few things of torch.cuda that a device needs, in one place, so that a test can stand in for them."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from agentserve.errors import ConfigError
from agentserve.executors.pytorch.devices.cuda_driver import CudaDriver, load_driver
from agentserve.executors.pytorch.devices.green_plan import DeviceFacts

_cuda: Any = torch.cuda  # most of it has no types
_MOST_HARDWARE_QUEUES = "32"
"""Programming guide, environment variables: 1 to 32, of which 8 are made unless more are asked for."""


class CudaRuntime(Protocol):
    """Streams and events are torch's own objects, or what a test takes for them."""

    def initialize(self, index: int) -> None:
        """Brings up the primary context. Raises ConfigError if there is no such GPU."""
        ...

    def load_driver(self) -> CudaDriver:
        """Raises CudaUnavailableError."""
        ...

    def facts(self, index: int) -> DeviceFacts:
        """What is known without the bindings of the driver."""
        ...

    def stream(self, index: int, *, urgent: bool) -> Any:
        """A stream of the primary context, of the highest or the lowest priority."""
        ...

    def external_stream(self, index: int, handle: int) -> Any:
        """A stream that was made elsewhere and is destroyed there."""
        ...

    def use(self, stream: Any) -> AbstractContextManager[Any]:
        """Makes a stream current in this thread, and its device."""
        ...

    def record(self, stream: Any) -> Any:
        """A new event behind what is in the stream; waiting for it sleeps."""
        ...

    def wait_event(self, stream: Any, event: Any) -> None:
        """What comes in the stream from now on waits for the event."""
        ...

    def synchronize_stream(self, stream: Any) -> None: ...

    def synchronize(self, index: int) -> None: ...

    def memory(self, index: int) -> tuple[int, int]:
        """Free and total bytes, as the driver reports them."""
        ...


def ask_for_hardware_queues() -> None:
    """Asks the driver for as many hardware queues as there can be, unless somebody has chosen a number.

    Streams share queues where there are fewer of them, and then wait for each other without need. Read by the driver
    when a device is first used, so this comes before anything else.
    """
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", _MOST_HARDWARE_QUEUES)


def cuda_obstacle(index: int = 0) -> str | None:
    """Why torch has no such GPU here, as half a sentence; None if it has one. May be the first to touch the GPU."""
    ask_for_hardware_queues()
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    if not torch.cuda.is_available():
        return "torch sees no GPU (is the NVIDIA driver installed, and new enough for this torch?)"
    if not 0 <= index < torch.cuda.device_count():
        return f"there is no GPU number {index}, torch sees {torch.cuda.device_count()}"
    return None


class TorchRuntime:
    """Implements `CudaRuntime` with torch.cuda."""

    def initialize(self, index: int) -> None:
        obstacle = cuda_obstacle(index)
        if obstacle is not None:
            raise ConfigError(f"there is no GPU to compute on: {obstacle}")
        _cuda.init()
        torch.empty(1, device=torch.device("cuda", index))  # the primary context comes up with the first allocation

    def load_driver(self) -> CudaDriver:
        return load_driver()

    def facts(self, index: int) -> DeviceFacts:
        properties = torch.cuda.get_device_properties(index)
        return DeviceFacts(
            name=properties.name,
            compute_capability=(properties.major, properties.minor),
            num_sms=properties.multi_processor_count,
            memory_bytes=properties.total_memory,
            l2_bytes=properties.L2_cache_size,
        )

    def stream(self, index: int, *, urgent: bool) -> Any:
        lowest, highest = _cuda.default_stream(index).priority_range()
        return _cuda.Stream(torch.device("cuda", index), priority=highest if urgent else lowest)

    def external_stream(self, index: int, handle: int) -> Any:
        return _cuda.ExternalStream(handle, device=torch.device("cuda", index))

    def use(self, stream: torch.cuda.Stream) -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream)

    def record(self, stream: torch.cuda.Stream) -> Any:
        event = _cuda.Event(blocking=True)
        event.record(stream)
        return event

    def wait_event(self, stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        stream.wait_event(event)

    def synchronize_stream(self, stream: torch.cuda.Stream) -> None:
        stream.synchronize()

    def synchronize(self, index: int) -> None:
        torch.cuda.synchronize(index)

    def memory(self, index: int) -> tuple[int, int]:
        free_bytes, total_bytes = torch.cuda.mem_get_info(index)
        return int(free_bytes), int(total_bytes)
