"""Named workloads: programs drawn from published distributions, the same for the same seed.

Lengths that a source gives by range and mean only are drawn from the distribution of the largest entropy with that
range and mean: the truncated exponential. Nothing else is assumed about their form.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from types import MappingProxyType

from agentserve.errors import WorkloadError
from agentserve.sim.multi_agent import ROUTINGS, make_tasks
from agentserve.sim.programs import Program, Turn, Workload
from agentserve.sim.worlds import NUM_STEPS, WORLDS, make_world

DEFAULT_NUM_PROGRAMS = 12
TOOL_GAP_MS = 200.0


@dataclass(frozen=True, slots=True)
class Range:
    """Whole numbers from `low` to `high` with a given mean."""

    low: int
    high: int
    mean: float

    def draw(self, random: Random) -> int:
        """One number."""
        width = self.high - self.low + 1.0
        # The continuous distribution covers half a step more on both sides, so that rounding is fair to the ends.
        decay = _decay((self.mean - self.low + 0.5) / width)
        u = random.random()
        x = u if decay == 0.0 else -math.log1p(u * math.expm1(-decay)) / decay
        return min(self.high, self.low + int(x * width))


def _decay(mean: float) -> float:
    """The rate of an exponential that is cut off at 1 and has this mean, by bisection; 0 is uniform."""
    if abs(mean - 0.5) < 1e-9:
        return 0.0
    low, high = -500.0, 500.0
    for _ in range(80):
        middle = (low + high) / 2.0
        # Mean of the truncated exponential: 1 / rate - 1 / (exp(rate) - 1).
        value = 0.5 if middle == 0.0 else 1.0 / middle - 1.0 / math.expm1(middle)
        low, high = (middle, high) if value > mean else (low, middle)
    return (low + high) / 2.0


# AgentServe, Table I, as its reproduction read it; the first turn is the same for both.
_COLD = Range(2500, 3500, 3000.0)
_REACT_RESUME, _REACT_OUTPUT = Range(30, 127, 56.0), Range(27, 99, 38.0)
_PLAN_RESUME, _PLAN_OUTPUT = Range(125, 421, 251.0), Range(41, 125, 58.0)
_MIN_ROUNDS, _MAX_ROUNDS = 2, 4

_CODING_PREFIX_TOKENS = 8192
_CODING_TASK, _CODING_TURNS = Range(200, 1200, 500.0), Range(30, 46, 38.0)
_CODING_RESUME, _CODING_OUTPUT = Range(10, 1200, 150.0), Range(15, 200, 50.0)
_CODING_TOOL_MEAN_MS, _CODING_TOOL_DEVIATION_MS = 1161.0, 4125.0
"""mini-swe-agent on SWE-bench Verified (AgentServeSim, workload table)."""
_CODING_TOOL_LIMIT_MS = 30_000.0

_VICTIM_PROMPT_TOKENS, _VICTIM_OUTPUT_TOKENS = 64, 1900
_ATTACK_PROMPT, _ATTACK_OUTPUT_TOKENS, _ATTACKS_PER_CLIENT = Range(950, 1050, 1000.0), 8, 3
_ATTACK_START_MS = 2000.0
"""By then the victim's stream has begun, on a slow CPU as well."""

_FANOUT_PREFIX_TOKENS, _FANOUT_PLAN_TOKENS = 3000, 120
_FANOUT_TASK, _FANOUT_OUTPUT, _FANOUT_ROUNDS = Range(40, 200, 100.0), Range(30, 120, 60.0), 2


@dataclass(frozen=True, slots=True)
class _Request:
    """What `make_workload` was asked for."""

    num_agents: int
    num_programs: int
    scale: float
    seed: int

    def scaled(self, num_tokens: int) -> int:
        return max(1, round(num_tokens * self.scale))

    def random(self, program_id: str) -> Random:
        """Each program has its own numbers: another count of programs does not change the first ones."""
        return Random(f"{self.seed}/{program_id}")


def _table_one(resume: Range, output: Range) -> Callable[[_Request], tuple[Program, ...]]:
    """A cold prompt, then 2 to 4 rounds of a tool's result and a short answer."""

    def program(request: _Request, index: int) -> Program:
        program_id = f"agent-{index:03d}"
        random = request.random(program_id)
        appends = [_COLD] + [resume] * random.randint(_MIN_ROUNDS, _MAX_ROUNDS)
        drawn = [(request.scaled(append.draw(random)), output.draw(random)) for append in appends]
        return Program(program_id, _with_gaps(drawn, lambda: TOOL_GAP_MS))

    return lambda request: tuple(program(request, index) for index in range(request.num_programs))


def _with_gaps(drawn: list[tuple[int, int]], gap_ms: Callable[[], float]) -> tuple[Turn, ...]:
    """Turns with a tool gap after each but the last one."""
    last = len(drawn) - 1
    return tuple(Turn(append, output, gap_ms() if i < last else 0.0) for i, (append, output) in enumerate(drawn))


def _coding_agent(request: _Request) -> tuple[Program, ...]:
    variance = math.log1p((_CODING_TOOL_DEVIATION_MS / _CODING_TOOL_MEAN_MS) ** 2)
    mu, sigma = math.log(_CODING_TOOL_MEAN_MS) - variance / 2.0, math.sqrt(variance)
    prefix_tokens = request.scaled(_CODING_PREFIX_TOKENS)

    def program(index: int) -> Program:
        program_id = f"coder-{index:03d}"
        random = request.random(program_id)
        task = prefix_tokens + request.scaled(_CODING_TASK.draw(random))
        drawn = [(task, _CODING_OUTPUT.draw(random))]
        for _ in range(_CODING_TURNS.draw(random) - 1):
            drawn.append((request.scaled(_CODING_RESUME.draw(random)), _CODING_OUTPUT.draw(random)))
        turns = _with_gaps(drawn, lambda: round(min(random.lognormvariate(mu, sigma), _CODING_TOOL_LIMIT_MS), 3))
        return Program(program_id, turns, prefix_id="system-prompt", prefix_tokens=prefix_tokens)

    return tuple(program(index) for index in range(request.num_programs))


def _victim_attacker(request: _Request) -> tuple[Program, ...]:
    """One steady stream; the other agents send cold prompts, each its own ones one after the other."""
    num_clients = request.num_agents - 1
    if num_clients < 1:
        raise WorkloadError("num_agents: expected at least 2 for victim_attacker, the victim and an attacker")
    stream = Turn(request.scaled(_VICTIM_PROMPT_TOKENS), _VICTIM_OUTPUT_TOKENS)
    programs = [Program("victim", (stream,), arrival_ms=0.0, role="victim")]
    for index in range(request.num_programs - 1):
        client, attack = index % num_clients, index // num_clients
        program_id = f"attacker-{client}-{attack}"
        num_tokens = request.scaled(_ATTACK_PROMPT.draw(request.random(program_id)))
        depends_on = (f"attacker-{client}-{attack - 1}",) if attack else ()
        turns = (Turn(num_tokens, _ATTACK_OUTPUT_TOKENS),)
        programs.append(Program(program_id, turns, arrival_ms=_ATTACK_START_MS, depends_on=depends_on, role="attacker"))
    return tuple(programs)


def _fanout(request: _Request) -> tuple[Program, ...]:
    """Families: a parent reads a long prefix and plans; then `num_agents` sub-agents work from the same prefix."""
    prefix_tokens = request.scaled(_FANOUT_PREFIX_TOKENS)
    programs: list[Program] = []
    for index in range(request.num_programs):
        family, member = divmod(index, 1 + request.num_agents)
        parent_id = f"family-{family:03d}"
        program_id = f"{parent_id}-{member}" if member else parent_id
        random = request.random(program_id)
        task = prefix_tokens + request.scaled(_FANOUT_TASK.draw(random))
        drawn = [(task, _FANOUT_OUTPUT.draw(random) if member else _FANOUT_PLAN_TOKENS)]
        for _ in range(_FANOUT_ROUNDS if member else 0):
            drawn.append((request.scaled(_FANOUT_TASK.draw(random)), _FANOUT_OUTPUT.draw(random)))
        programs.append(
            Program(
                program_id,
                _with_gaps(drawn, lambda: TOOL_GAP_MS),
                prefix_id=parent_id,
                prefix_tokens=prefix_tokens,
                depends_on=(parent_id,) if member else (),
                role="sub-agent" if member else "parent",
            )
        )
    return tuple(programs)


def _multi_agent(name: str) -> Callable[[_Request], tuple[Program, ...]]:
    return lambda request: make_tasks(name, request.num_programs, request.scale, request.seed)


_MAKERS: Mapping[str, Callable[[_Request], tuple[Program, ...]]] = MappingProxyType(
    {
        "react": _table_one(_REACT_RESUME, _REACT_OUTPUT),
        "plan_execute": _table_one(_PLAN_RESUME, _PLAN_OUTPUT),
        "coding_agent": _coding_agent,
        "victim_attacker": _victim_attacker,
        "fanout": _fanout,
        **{name: _multi_agent(name) for name in ROUTINGS},
    }
)

WORKLOADS: Mapping[str, str] = MappingProxyType(
    {
        "react": "cold prompt of about 3k tokens, then 2 to 4 rounds of short tool results and short answers",
        "plan_execute": "cold prompt of about 3k tokens, then 2 to 4 rounds of longer tool results and answers",
        "coding_agent": "about 38 turns on a shared system prompt of 8k tokens, tool times as on SWE-bench",
        "victim_attacker": "one steady stream, beside it clients that send cold prompts of about 1,000 tokens",
        "fanout": "a parent with a long prefix, then as many sub-agents on the same prefix as there are agents",
        "independent": "agents of a simulation, each with a LoRA adapter, that call after actions of 2 to 8 steps",
        "interaction": "the same in a town, where agents that meet talk to each other before their actions end",
        "diffusion": "the same with news that spread over a social network, hop by hop",
        "supervisor": "tasks of six agents: a supervisor hands work to workers and reads what came of it",
        "pipeline": "tasks of six agents, one after the other, two or three times",
        "debate": "tasks of six agents: five speak in turn, a judge closes each round",
        "selector": "tasks of six agents: who speaks next depends on who spoke last",
        "random_routing": "tasks of six agents in random order",
    }
)
"""Names of the workloads and a line about each."""


def make_workload(
    name: str,
    *,
    num_agents: int,
    num_programs: int | None = None,
    scale: float = 1.0,
    seed: int = 0,
    rate: float | None = None,
) -> Workload:
    """Draws a workload; the same arguments give the same one.

    Args:
        name: one of `WORKLOADS`.
        num_agents: programs that run at once. `victim_attacker`: the victim and all attackers. `fanout`: also the
            number of sub-agents of a parent.
        num_programs: how many programs; None is 12 or the number of agents if that is more, 3 a client and the victim
            in `victim_attacker`, one family in `fanout`.
        scale: factor on all prompt lengths, for small models; outputs keep their lengths.
        seed: of the lengths and of the prompts.
        rate: programs a second, arriving as a Poisson process, instead of the closed loop. Not for `victim_attacker`,
            whose times are fixed, nor for `fanout` and agent simulations, whose calls follow each other.

    Raises WorkloadError for an unknown name and for values out of range.
    """
    if name not in WORKLOADS:
        raise WorkloadError(f"there is no workload {name!r}; there are {', '.join(WORKLOADS)}")
    if num_agents < 1:
        raise WorkloadError(f"num_agents: expected at least 1, not {num_agents}")
    if num_programs is not None and num_programs < 1:
        raise WorkloadError(f"num_programs: expected at least 1, not {num_programs}")
    if not (math.isfinite(scale) and scale > 0.0):
        raise WorkloadError(f"scale: expected a positive number, not {scale}")
    if rate is not None and name in {"victim_attacker", "fanout", *WORLDS}:
        raise WorkloadError(f"rate: {name} has no arrivals of its own; leave the rate out")
    if rate is not None and not (math.isfinite(rate) and rate > 0.0):
        raise WorkloadError(f"rate: expected programs a second, more than 0, not {rate}")
    description = WORKLOADS[name] + (f"; prompt lengths times {scale:g}" if scale != 1.0 else "")
    if name in WORLDS:
        if num_programs is not None:
            raise WorkloadError(f"num_programs: {name} has one program for each agent; leave the number out")
        scaled = _Request(num_agents, num_agents, scale, seed).scaled
        programs, steps = make_world(name, num_agents, NUM_STEPS, scaled, seed)
        return Workload(name, programs, None, seed, description, steps=steps)
    if num_programs is None:
        num_programs = _default_num_programs(name, num_agents)
    programs = _MAKERS[name](_Request(num_agents, num_programs, scale, seed))
    if rate is not None:
        programs = _with_arrivals(programs, rate, seed)
    is_open = rate is not None or name == "victim_attacker"
    return Workload(name, programs, None if is_open else num_agents, seed, description)


def _default_num_programs(name: str, num_agents: int) -> int:
    if name == "victim_attacker":
        return 1 + _ATTACKS_PER_CLIENT * (num_agents - 1)
    return 1 + num_agents if name == "fanout" else max(DEFAULT_NUM_PROGRAMS, num_agents)


def _with_arrivals(programs: tuple[Program, ...], rate: float, seed: int) -> tuple[Program, ...]:
    random = Random(f"{seed}/arrivals")
    now_ms = 0.0
    result = []
    for program in programs:
        result.append(dataclasses.replace(program, arrival_ms=round(now_ms, 3)))
        now_ms += 1e3 * random.expovariate(rate)
    return tuple(result)
