"""What the policies cost: microseconds of Python a step of the engine, with 1,000 live agents.

`python -m bench.policy_cost --out DIR`. Each agent calls, waits for its tool, and calls again with a longer history; a
system prompt is shared by the agents of a role, and eight agents work on one task. A quarter of the agents find room in
the memory, so every seat has to decide. What counts is the time in the policy runtime (`submitted`,
`scheduled`, `finished`, `act`, `settle` and `next_deadline_ns` together) in one step.

The traffic's time is virtual, so every round repeats the same steps, and of each step the fastest round counts:
whatever else the machine does can only make it longer. A round goes over all policies before the next one begins, so
that a slow minute of the machine meets one round only. The clock is the one that is read without a system call. The
time that the thread runs, which was taken before, added 1 us more to each of the four to ten calls in a step, as the
kernel drives the caches out: a third of the time without any policy. What is left of the clock is in every number.

All else counts, too: the runtime's own books, which are there without any policy (`none`), and the steps of their own
in which a policy goes on with what it did not finish. As there are more steps with those, the quantiles of the *busy*
steps, in which a call came, was admitted or ended, and the time for each call are there as well.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import json
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from agentserve.build.simulation import build_driver
from agentserve.config import (
    ADMISSION_POLICIES,
    ORDER_POLICIES,
    RETENTION_POLICIES,
    SPECULATION_POLICIES,
    ControlConfig,
    EngineConfig,
)
from agentserve.core.agents.runtime import AgentRuntime
from agentserve.core.events import Foresight, RequestAdmitted, RequestFinished, SubmitRequest, TokenGenerated
from agentserve.core.request import SamplingParams
from bench.figures.simulated import Device
from bench.load.results import conditions

GOAL_US = 50.0
"""p99 of a step, with 1,000 agents."""
WAYS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "none": {},
        "lru, protected anchors": {"protect_anchors": True},
        **{name: {"policy": name} for name in RETENTION_POLICIES if name != "lru"},
        "transition, no prediction": {"policy": "transition", "prediction": False},
        **{f"order {name}": {"order": name} for name in ORDER_POLICIES if name != "default"},
        "ttl, order plas": {"policy": "ttl", "order": "plas"},
        **{f"admission {name}": {"admission": name} for name in ADMISSION_POLICIES if name != "none"},
        **{f"speculate {name}": {"speculate": name} for name in SPECULATION_POLICIES if name != "none"},
    }
)
"""Fields of EngineConfig."""
_METHODS = ("submitted", "scheduled", "finished", "act", "settle", "next_deadline_ns", "set_distances")
_AGENTS_A_TASK = 8
_NUM_ROLES = 8
_BLOCK_SIZE = 16
_ROLE_TOKENS, _FIRST_TOKENS, _TURN_TOKENS = 512, 256, 96
_MAX_TURNS = 12
"""Then an agent's task begins anew."""
_MIN_OUTPUT, _MAX_OUTPUT = 30, 110
_MEAN_GAP_S = 20.0


@dataclass(frozen=True, slots=True)
class PolicyCost:
    """Time in the policy runtime by step."""

    policy: str
    roles: bool
    """Whether agents are told apart by their role only, so that each name stands for many sessions."""
    num_agents: int
    num_steps: int
    num_busy_steps: int
    """Steps in which a call came, was admitted or ended."""
    num_calls: int
    p50_us: float
    p99_us: float
    max_us: float
    busy_p50_us: float
    busy_p99_us: float
    """Of the busy steps alone."""
    us_per_call: float
    """All of the time, divided by the calls that ended."""


class _Step(NamedTuple):
    """What one step was. The fastest round of it is the smallest one."""

    spent_ns: int
    """In the policy runtime."""
    num_ended: int
    is_busy: bool
    """Whether a call came, was admitted or ended."""


class _Meter:
    """Adds up the time in the methods of a policy runtime."""

    def __init__(self, agents: AgentRuntime) -> None:
        self._spent_ns = 0
        self._num_submitted = 0
        for name in _METHODS:
            setattr(agents, name, self._timed(name, getattr(agents, name)))

    def _timed(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        is_submission = name == "submitted"

        def timed(*arguments: Any) -> Any:
            self._num_submitted += is_submission
            started = time.perf_counter_ns()
            result = method(*arguments)
            self._spent_ns += time.perf_counter_ns() - started
            return result

        return timed

    def take(self) -> tuple[int, int]:
        """Nanoseconds, and calls that came, since it was asked last."""
        taken = self._spent_ns, self._num_submitted
        self._spent_ns = self._num_submitted = 0
        return taken


class _Agent:
    """Calls with a growing history, until its task begins anew."""

    def __init__(self, number: int, num_done: Counter[str], *, roles: bool) -> None:
        """`num_done`: by task, how many of its agents have made their last call; shared by all agents."""
        self._number = number
        self._num_done = num_done
        self.random = Random(number)
        self.answer: list[int] = []
        """What its call was answered; it comes back in the next prompt."""
        self._task, self._turn = 0, 0
        self._tokens: list[int] = []
        role = number % _NUM_ROLES
        self._name = f"role-{role}" if roles else f"agent-{number}"
        self._anchor = [1_000_000 * (role + 1) + index for index in range(_ROLE_TOKENS)]
        self.gap_ns = 0
        """From the end of its call to its next one."""

    def call(self, now_ns: int) -> SubmitRequest:
        new = _TURN_TOKENS if self._turn else _FIRST_TOKENS
        if not self._turn:
            self._task += 1
            self._tokens, self.answer = list(self._anchor), []
        self._tokens += self.answer
        self.answer = []
        first = 100_000_000 * (self._number + 1) + 1_000_000 * (self._task % 90) + len(self._tokens)
        self._tokens += range(first, first + new)
        self._turn += 1
        self.gap_ns = max(1, round(self.random.expovariate(1.0 / _MEAN_GAP_S) * 1e9))
        is_last, name = self._turn == _MAX_TURNS, f"{self._number}/{self._task}"
        task = f"task-{self._number // _AGENTS_A_TASK}/{self._task}"
        self._num_done[task] += is_last
        call = SubmitRequest(
            request_id=f"{name}/{self._turn}",
            prompt_token_ids=tuple(self._tokens),
            sampling=SamplingParams(max_tokens=self.random.randint(_MIN_OUTPUT, _MAX_OUTPUT), temperature=0.0),
            agent_id=self._name,
            session_id=name,
            program_id=task,
            tool_name=f"tool-{self.random.randrange(5)}",
            is_last_turn=self._num_done[task] == _AGENTS_A_TASK,
            foresight=Foresight(None if is_last else self.gap_ns, now_ns, new, _MAX_OUTPUT),
            distance=self.gap_ns / 1e9,
        )
        self._turn %= _MAX_TURNS
        return call


class _Load:
    """An engine with agents that call for ever."""

    def __init__(self, device: Device, way: Mapping[str, Any], num_agents: int, *, roles: bool) -> None:
        num_done: Counter[str] = Counter()
        agents = [_Agent(number, num_done, roles=roles) for number in range(num_agents)]
        longest = _ROLE_TOKENS + _FIRST_TOKENS + _MAX_TURNS * (_TURN_TOKENS + _MAX_OUTPUT) + 1
        config = EngineConfig(
            # A quarter of the agents find room, as in ScaleSim's evaluation.
            num_blocks=max(2, num_agents // 4) * (longest // _BLOCK_SIZE),
            max_model_len=longest,
            block_size=_BLOCK_SIZE,
            max_num_seqs=32,
            control=ControlConfig(tpot_target_ns=device.tpot_target_ns),
            **way,
        )
        self._driver = build_driver(device.hardware.header(config))
        self._meter = _Meter(self._driver.core.agents)
        self._by_request: dict[str, _Agent] = {}
        for agent in agents:
            self._call(agent, round(1e9 * _MEAN_GAP_S * agent.random.random()))

    def _call(self, agent: _Agent, at_ns: int) -> None:
        command = agent.call(at_ns)
        self._by_request[command.request_id] = agent
        self._driver.at(at_ns, command)

    def steps(self) -> Iterator[_Step]:
        """Steps for ever."""
        while True:
            self._meter.take()
            result = self._driver.step()
            assert result is not None, "agents call for ever"
            spent_ns, num_events = self._meter.take()
            num_ended = 0
            for event in result.events:
                num_events += isinstance(event, RequestAdmitted | RequestFinished)
                if isinstance(event, TokenGenerated):
                    self._by_request[event.request_id].answer.append(event.sample.token_id)
                elif isinstance(event, RequestFinished):
                    num_ended += 1
                    agent = self._by_request.pop(event.request_id)
                    self._call(agent, event.at_ns + agent.gap_ns)
            yield _Step(spent_ns, num_ended, num_events > 0)

    def check(self) -> None:
        """Raises AssertionError if a policy has lost its seat: then nothing was measured."""
        stats = self._driver.core.stats().policies
        assert stats is None or not stats.failures, stats


def measure(
    device: Device,
    ways: Sequence[tuple[str, bool]],
    *,
    num_agents: int = 1000,
    num_steps: int = 4000,
    rounds: int = 3,
    warm_up: float = 2.0,
) -> list[PolicyCost]:
    """Times `num_steps` steps of each way, once the agents have made `warm_up` calls each in the mean.

    `ways`: policies of `WAYS`, and whether agents are told apart by their role only.
    """
    fastest: list[list[_Step]] = [[] for _ in ways]
    for _ in range(rounds):
        for index, (policy, roles) in enumerate(ways):
            gc.collect()
            load = _Load(device, WAYS[policy], num_agents, roles=roles)
            stream = load.steps()
            num_ended = 0
            while num_ended < warm_up * num_agents:
                num_ended += next(stream).num_ended
            steps = list(itertools.islice(stream, num_steps))
            load.check()
            before = fastest[index] or steps
            fastest[index] = [min(pair) for pair in zip(before, steps, strict=True)]
    return [
        _cost_of(policy, steps, num_agents, roles=roles) for (policy, roles), steps in zip(ways, fastest, strict=True)
    ]


def _cost_of(policy: str, steps: Sequence[_Step], num_agents: int, *, roles: bool) -> PolicyCost:
    spent_us = sorted(step.spent_ns / 1e3 for step in steps)
    busy_us = sorted(step.spent_ns / 1e3 for step in steps if step.is_busy)
    num_calls = sum(step.num_ended for step in steps)
    return PolicyCost(
        policy=policy,
        roles=roles,
        num_agents=num_agents,
        num_steps=len(steps),
        num_busy_steps=len(busy_us),
        num_calls=num_calls,
        p50_us=_quantile(spent_us, 0.5),
        p99_us=_quantile(spent_us, 0.99),
        max_us=_quantile(spent_us, 1.0),
        busy_p50_us=_quantile(busy_us, 0.5),
        busy_p99_us=_quantile(busy_us, 0.99),
        us_per_call=round(sum(spent_us) / max(1, num_calls), 1),
    )


def _quantile(ascending: Sequence[float], share: float) -> float:
    """0 of nothing."""
    return round(ascending[min(len(ascending) - 1, int(share * len(ascending)))], 1) if ascending else 0.0


def table_of(costs: Sequence[PolicyCost], title: str) -> Table:
    table = Table("policy", title=title)
    for name in ("p50", "p99", "max", "busy p50", "busy p99", "a call", "busy steps"):
        table.add_column(name, justify="right")
    for cost in costs:
        numbers = (cost.p50_us, cost.p99_us, cost.max_us, cost.busy_p50_us, cost.busy_p99_us, cost.us_per_call)
        name = f"{cost.policy}, 8 roles" if cost.roles else cost.policy
        table.add_row(name, *map(str, numbers), f"{cost.num_busy_steps} of {cost.num_steps}")
    return table


def main(argv: Sequence[str]) -> int:
    """Measures, prints a table, and writes `policy_cost.json` and `policy_cost.txt` if `--out` is given."""
    parser = argparse.ArgumentParser(prog="python -m bench.policy_cost", description=__doc__)
    parser.add_argument("--gpu", default="rtx-5090", help="profile whose timing is simulated")
    parser.add_argument("--model", default="qwen2.5-7b")
    parser.add_argument("--agents", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=4000, help="that are timed")
    parser.add_argument("--warm-up", type=float, default=2.0, help="calls of each agent that go before")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=list(WAYS), nargs="*", default=list(WAYS))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    device = Device.load(arguments.gpu, arguments.model)
    ways = [
        (policy, roles)
        for policy in arguments.only
        for roles in ((False, True) if policy == "transition" else (False,))
    ]
    costs = measure(
        device,
        ways,
        num_agents=arguments.agents,
        num_steps=arguments.steps,
        rounds=arguments.rounds,
        warm_up=arguments.warm_up,
    )
    title = f"policy runtime, us a step, {arguments.agents} agents; timing of {device.conditions}"
    table = table_of(costs, title)
    Console(width=120).print(table)
    over = [cost.policy for cost in costs if cost.p99_us >= GOAL_US]
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        command = "python -m bench.policy_cost " + shlex.join(
            Path(word).name if word.startswith("/") else word for word in argv
        )
        record = {
            "conditions": {**conditions(), "command": command, "what": title},
            "p99_goal_us": GOAL_US,
            "over_the_goal": over,
            "policies": [dataclasses.asdict(cost) for cost in costs],
        }
        (arguments.out / "policy_cost.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        with (arguments.out / "policy_cost.txt").open("w", encoding="utf-8") as file:
            Console(width=120, file=file).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
