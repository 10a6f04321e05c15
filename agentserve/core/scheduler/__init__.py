"""What runs next: admission, and the batches of the two lanes."""

from __future__ import annotations

from agentserve.config import EngineConfig
from agentserve.core.controllers import Controller
from agentserve.core.memory.manager import MemoryManager
from agentserve.core.scheduler.baselines import ChunkedScheduler, FcfsScheduler, PrefillFirstScheduler
from agentserve.core.scheduler.lanes import LaneScheduler
from agentserve.core.scheduler.runs import RunScheduler
from agentserve.core.slots import PartitionTable

_BASELINES: dict[str, type[ChunkedScheduler | PrefillFirstScheduler]] = {
    "chunked": ChunkedScheduler,
    "prefill-first": PrefillFirstScheduler,
    "fcfs": FcfsScheduler,
}


def build_scheduler(
    config: EngineConfig, memory: MemoryManager, table: PartitionTable, controller: Controller | None
) -> RunScheduler:
    """The scheduler that `config.scheduler` names; `controller` is for `lanes` and for no other."""
    if config.scheduler == "lanes":
        assert controller is not None, "lanes need a controller"
        return LaneScheduler(config, memory, table, controller)
    return _BASELINES[config.scheduler](config, memory, table)


__all__ = ["RunScheduler", "build_scheduler"]
