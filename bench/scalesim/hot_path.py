"""What invocation distances cost the engine's step at 1,000 agents: `python -m bench.scalesim.hot_path`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

from agentserve.build.simulation import build_instance
from agentserve.core.agents.runtime import AgentRuntime
from agentserve.runtime.virtual import VirtualDriver
from agentserve.sim.orchestrator import simulate
from bench.scalesim.runs import Setting, engine_header, world


def measure(num_agents: int) -> dict[str, Any]:
    """Microseconds that the runtime layer takes, by what it was asked. A step asks it for `act` once."""
    setting = Setting("independent", "scalesim", num_agents)
    workload = world(setting)
    driver = VirtualDriver(*build_instance(engine_header(setting, workload)))
    agents = driver.core.agents
    times: dict[str, list[float]] = {}
    for name in ("act", "submitted", "finished", "set_distances"):
        _watch(agents, name, times.setdefault(name, []))
    simulate(workload, driver, max_batches=0, fast_forward=False)
    num_told = sum(len(step.distances) for step in workload.steps)
    result: dict[str, Any] = {name: _quantiles(values) for name, values in times.items()}
    result["set_distances_per_agent_us"] = round(sum(times["set_distances"]) / num_told, 2)
    return result


def _watch(agents: AgentRuntime, name: str, times: list[float]) -> None:
    method: Callable[..., Any] = getattr(agents, name)

    def watched(*arguments: Any) -> Any:
        begin = time.perf_counter_ns()
        answer = method(*arguments)
        times.append((time.perf_counter_ns() - begin) / 1e3)
        return answer

    setattr(agents, name, watched)


def _quantiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "count": len(ordered),
        "p50_us": round(ordered[len(ordered) // 2], 2),
        "p99_us": round(ordered[int(0.99 * (len(ordered) - 1))], 2),
        "max_us": round(ordered[-1], 1),
    }


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]) if len(sys.argv) > 1 else 1000), indent=1))
