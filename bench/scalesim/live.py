"""`python -m bench.scalesim.live`: the order of the policies with the real daemon, on a CPU and in small.

Agents of the *independent* workload, each with an adapter of its own and a prompt that grows from call to call; about a
fifth of them is active in a step. The device has memory for a few of them only. The daemon is started anew for each
system and round; the systems of a round follow each other, so that what else the machine does meets all of them.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from agentserve.cli.machine import commit, describe_machine
from agentserve.models.registry import resolve_model
from agentserve.sim.programs import Program, Turn, WorldStep
from agentserve.sim.worlds import GAP_MS, independent
from bench.load.client import Call, ChatClient
from bench.load.driver import warm_up
from bench.load.errors import EndpointError
from bench.load.prompts import Calibration, Conversation, calibrate
from bench.load.servers import ServerSpec, running
from bench.scalesim.adapters import write_adapters
from bench.scalesim.runs import SYSTEMS

MODEL = "smollm2-135m"
BLOCK_SIZE = 16
_ELEMENT_SIZES = {"float32": 4, "bfloat16": 2}
_HOST_GIB = 1.0
_COUNTED = tuple(f"agentserve:{name}_" for name in ("lora", "kv_tier", "policy"))
"""Metrics that are kept with the results."""
_PROBE_TOKENS = 640
"""The longest prompt of calibration and warm-up."""


@dataclass(frozen=True, slots=True)
class World:
    """What is run: sizes in tokens, times in milliseconds."""

    num_agents: int = 15
    num_residents: int = 4
    """Agents whose memory fits the device: KV blocks for so many of the longest prompts, and as many adapters."""
    num_in_host: int = 0
    """Agents whose KV fits the host tier, in the same sense; 0: all of them do."""
    num_steps: int = 20
    num_warm_steps: int = 6
    """Steps that are not measured: everybody has his first call in one of them."""
    gap_ms: float = 100.0
    rank: int = 4
    min_persona: int = 150
    max_persona: int = 300
    min_observation: int = 24
    max_observation: int = 40
    num_output_tokens: int = 8
    dtype: str = "float32"
    seed: int = 0

    def steps(self) -> tuple[WorldStep, ...]:
        """Who calls when, and what is said of it: that of the evaluation in the simulator."""
        return independent(self.num_agents, self.num_steps, Random(f"{self.seed}/independent")).steps()

    def programs(self) -> dict[str, Program]:
        """The agents by name."""
        calls = [name for step in self.steps() for name in step.calls]
        return {name: Program(name, self._turns(name, calls.count(name)), adapter=name) for name in sorted(set(calls))}

    def _turns(self, name: str, count: int) -> tuple[Turn, ...]:
        random = Random(f"{self.seed}/{name}")
        lengths = [random.randint(self.min_persona, self.max_persona)]
        lengths += [random.randint(self.min_observation, self.max_observation) for _ in range(count - 1)]
        return tuple(Turn(length, self.num_output_tokens) for length in lengths)


def make_server(system: str, world: World, adapters: Path) -> ServerSpec:
    """The daemon of a system: one of `SYSTEMS`."""
    model = resolve_model(MODEL).config
    assert model is not None
    # The template adds a few tokens to each turn, and no prompt comes out exactly as long as planned.
    longest = round(1.2 * max(program.num_context_tokens for program in world.programs().values()))
    blocks_each = -(-longest // BLOCK_SIZE) + 1
    block_bytes = model.kv_bytes_per_token(_ELEMENT_SIZES[world.dtype]) * BLOCK_SIZE
    host_gib = world.num_in_host * blocks_each * block_bytes / 2**30 if world.num_in_host else _HOST_GIB
    options = {
        "model": MODEL,
        "executor": "cpu",
        "dtype": world.dtype,
        "lora-dir": str(adapters),
        "max-loras": world.num_residents,
        "max-lora-rank": world.rank,
        "max-model-len": max(longest, _PROBE_TOKENS),
        "kv-cache-memory": world.num_residents * blocks_each * block_bytes,
        "policy": "invocation_distance" if system == "scalesim" else "lru",
        "kv-offloading-size": 0.0 if system == "lru" else host_gib,
    }
    command = ["{python}", "-m", "agentserve", "serve", "--port", "{port}"]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    url = "http://127.0.0.1:{port}"
    return ServerSpec(system, "agentserve", SYSTEMS[system], "default", f"{url}/v1", tuple(command), f"{url}/ready")


@dataclass(slots=True)
class _Agent:
    client: ChatClient
    conversation: Conversation
    turn_index: int = 0


class Play:
    """One run of a world against a daemon."""

    def __init__(self, world: World, base_url: str, calibration: Calibration, *, says_distances: bool) -> None:
        self._world = world
        self._base_url = base_url
        self._calibration = calibration
        self._says_distances = says_distances
        self._programs = world.programs()
        self._agents: dict[str, _Agent] = {}
        self.calls: list[list[Call]] = []
        """Those of each step."""
        self.step_ms: list[float] = []
        """From the first call of a step to the end of its last one."""

    async def run(self, http: aiohttp.ClientSession, stack: AsyncExitStack) -> None:
        """All steps. Raises EndpointError if a call fails."""
        for name, program in self._programs.items():
            client = await stack.enter_async_context(ChatClient(self._base_url, model=name))
            self._agents[name] = _Agent(client, Conversation(program, self._calibration, str(self._world.seed)))
        for step in self._world.steps():
            started_s = time.monotonic()
            self.calls.append(list(await asyncio.gather(*(self._agent_step(http, name, step) for name in step.calls))))
            self.step_ms.append((time.monotonic() - started_s) * 1e3)
            # Longer where the world has taken several steps before somebody calls again.
            await asyncio.sleep(step.gap_ms / GAP_MS * self._world.gap_ms / 1e3)

    async def _agent_step(self, http: aiohttp.ClientSession, name: str, step: WorldStep) -> Call:
        """A call, and how far the next one is: with the answer it is known what the agent does until then.

        Not said before: it might reach the engine before the call itself, which would use it up.
        """
        call = await self._call(name)
        if self._says_distances:
            await self._say(http, {other: distance for other, distance in step.distances if other == name})
        return call

    async def _call(self, name: str) -> Call:
        agent = self._agents[name]
        turn = self._programs[name].turns[agent.turn_index]
        call = Call(name)
        await agent.client.chat(call, agent.conversation.begin_turn(agent.turn_index), max_tokens=turn.output_tokens)
        if call.error is not None:
            raise EndpointError(f"{name}, call {agent.turn_index}: {call.error}")
        agent.conversation.end_turn(call.text)
        agent.turn_index += 1
        return call

    async def _say(self, http: aiohttp.ClientSession, distances: Mapping[str, float]) -> None:
        url = self._base_url.removesuffix("/v1") + "/agentserve/distances"
        async with http.post(url, json={"agents": distances}) as answer:
            if answer.status != 200:
                raise EndpointError(f"POST {url} was answered with {answer.status}: {await answer.text()}")


async def measure(system: str, world: World, adapters: Path, logs: Path) -> dict[str, Any]:
    """Starts the daemon, plays the world, stops the daemon. Raises BenchError if something fails."""
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(running(make_server(system, world, adapters), {}, logs))
        probe = await stack.enter_async_context(ChatClient(server.base_url))
        await probe.find_model()
        calibration = await calibrate(probe, world.seed)
        await warm_up(probe, calibration, str(world.seed))
        http = await stack.enter_async_context(aiohttp.ClientSession())
        play = Play(world, server.base_url, calibration, says_distances=system == "scalesim")
        await play.run(http, stack)
        root = server.base_url.removesuffix("/v1")
        health = await probe.get_json(f"{root}/health")
        async with http.get(f"{root}/metrics") as answer:
            counters = _counters(await answer.text())
        return {**summary(play, world), "health": health, "counters": counters}


def _counters(metrics: str) -> dict[str, float]:
    """What was loaded and stored in the whole run, from the daemon's metrics."""
    families = [f for f in text_string_to_metric_families(metrics) if f.name.startswith(_COUNTED)]
    return {
        f"{sample.name.partition(':')[2]} {sample.labels.get('tier') or sample.labels.get('action', '')}".strip(): (
            sample.value
        )
        for family in families
        for sample in family.samples
        if not sample.name.endswith("requests_info")
    }


def summary(play: Play, world: World) -> dict[str, Any]:
    """Means over the calls behind the warm-up; times in milliseconds."""
    calls = [call for step in play.calls[world.num_warm_steps :] for call in step]
    ttfts_ms = sorted((call.token_ns[0] - call.sent_ns) / 1e6 for call in calls)
    busy_s = sum(play.step_ms[world.num_warm_steps :]) / 1e3
    return {
        "num_calls": len(calls),
        "active_per_step": len(calls) / (len(play.calls) - world.num_warm_steps),
        "ttft_ms": statistics.fmean(ttfts_ms),
        "ttft_p50_ms": statistics.median(ttfts_ms),
        "ttft_p90_ms": ttfts_ms[int(0.9 * (len(ttfts_ms) - 1))],
        "step_ms": 1e3 * busy_s / (len(play.calls) - world.num_warm_steps),
        "calls_per_s": len(calls) / busy_s,
        "prompt_tokens": statistics.fmean(call.num_prompt_tokens for call in calls),
        "hit_rate": sum(call.num_cached_tokens or 0 for call in calls) / sum(c.num_prompt_tokens for c in calls),
        "ttfts_ms": [round((call.token_ns[0] - call.sent_ns) / 1e6, 3) for call in calls],
    }


def table(rounds: Sequence[Mapping[str, Mapping[str, Any]]]) -> str:
    """A line for each system and round, then the means over the rounds."""
    columns = (("ttft_ms", 9, ".1f"), ("ttft_p50_ms", 12, ".1f"), ("ttft_p90_ms", 12, ".1f"), ("step_ms", 9, ".0f"))
    columns = (*columns, ("calls_per_s", 12, ".2f"), ("prompt_tokens", 14, ".0f"), ("hit_rate", 9, ".0%"))
    lines = [f"{'system':28} {'round':>5} " + " ".join(f"{name:>{width}}" for name, width, _ in columns)]
    for system, label in SYSTEMS.items():
        runs = [found[system] for found in rounds if system in found]
        means = {name: statistics.fmean(run[name] for run in runs) for name, _, _ in columns} if runs else {}
        for title, run in [*((str(i), run) for i, run in enumerate(runs)), ("mean", means)]:
            if run:
                cells = " ".join(f"{run[name]:>{width}{form}}" for name, width, form in columns)
                lines.append(f"{label:28} {title:>5} {cells}")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.scalesim.live", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory of results, table and logs")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="which of them, in this order")
    for field in dataclasses.fields(World):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    values = vars(parser.parse_args(argv))
    systems = values["systems"].split(",")
    if unknown := [name for name in systems if name not in SYSTEMS]:
        parser.error(f"--systems: there is no {unknown[0]!r}; there are {', '.join(SYSTEMS)}")
    world = World(**{field.name: values[field.name] for field in dataclasses.fields(World)})
    out: Path = values["out"]
    out.mkdir(parents=True, exist_ok=True)
    started_s, rounds = time.monotonic(), []
    with tempfile.TemporaryDirectory() as directory:
        model = resolve_model(MODEL).config
        assert model is not None
        adapters = Path(directory) / "adapters"
        write_adapters(adapters, world.programs(), model, rank=world.rank)
        for index in range(values["rounds"]):
            found = {}
            for system in systems:
                found[system] = asyncio.run(measure(system, world, adapters, Path(directory)))
                print(f"round {index}, {system}: mean TTFT {found[system]['ttft_ms']:.1f} ms", flush=True)
            rounds.append(found)
    text = table(rounds)
    conditions = {
        "command": "python -m bench.scalesim.live " + " ".join(sys.argv[1:] if argv is None else argv),
        "commit": commit(),
        "machine": describe_machine(),
        "world": dataclasses.asdict(world),
        "duration_s": round(time.monotonic() - started_s, 1),
    }
    (out / "results.json").write_text(json.dumps({"conditions": conditions, "rounds": rounds}, indent=1) + "\n")
    (out / "table.txt").write_text(text, encoding="utf-8")
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
