"""Multi-agent applications: tasks that several agents work on, each with a system prompt and tools of its own.

The five patterns of CacheScout's evaluation: a supervisor with workers, a pipeline, a debate, a selector that gives the
floor, and random routing. Only who comes next differs. Each call's prompt is the anchor of its agent, the same in all
tasks, and behind it the transcript of the task so far; so an agent that was heard before finds its anchor and the
transcript up to its last call in a cache that has kept them.

The transcripts are given as blocks, so prompts are the same whatever an engine answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from random import Random
from types import MappingProxyType

from agentserve.sim.programs import Program, Turn

BLOCK_TOKENS = 16
NUM_AGENTS = 6
"""Of one application."""
_MIN_ANCHOR_BLOCKS, _MAX_ANCHOR_BLOCKS = 64, 128
"""System prompt and tools: 1,024 to 2,048 tokens, a little more than half of all prompt tokens."""
_MIN_MESSAGE_BLOCKS, _MAX_MESSAGE_BLOCKS = 4, 14
"""What is added to the transcript from one call to the next: the answer, and what tools or users say to it."""
_TASK_BLOCKS = 16
_MIN_OUTPUT, _MAX_OUTPUT = 30, 110
_MIN_GAP_MS, _MAX_GAP_MS = 100.0, 1500.0
_FIRST_TASK_BLOCK = 1 << 24
_BLOCKS_A_TASK = 1 << 16

Routing = Callable[[Random], list[int]]
"""Which agents make the calls of a task, in order."""


def _supervisor(random: Random) -> list[int]:
    """Agent 0 hands work to a worker, and reads what came of it; who is next depends on who was before."""
    route, worker = [0], 0
    for _ in range(random.randint(5, 8)):
        worker = _likely_next(random, worker, range(1, NUM_AGENTS), 0.75)
        route += [worker, 0]
    return route


def _pipeline(random: Random) -> list[int]:
    """One agent after the other, and again from the beginning if the work is sent back."""
    return list(range(NUM_AGENTS)) * random.randint(2, 3)


def _debate(random: Random) -> list[int]:
    """Five agents speak in turn, some rounds in another order, and a judge closes each round."""
    route = []
    for _ in range(random.randint(2, 3)):
        speakers = list(range(1, NUM_AGENTS))
        if random.random() < 0.3:
            random.shuffle(speakers)
        route += [*speakers, 0]
    return route


def _selector(random: Random) -> list[int]:
    """Whoever is chosen speaks at once: a skewed choice that depends on who spoke last."""
    route = [0]
    for _ in range(random.randint(11, 16)):
        route.append(_likely_next(random, route[-1], range(NUM_AGENTS), 0.6))
    return route


def _random_routing(random: Random) -> list[int]:
    """Anybody but who spoke last."""
    route = [random.randrange(NUM_AGENTS)]
    for _ in range(random.randint(11, 16)):
        route.append(random.choice([agent for agent in range(NUM_AGENTS) if agent != route[-1]]))
    return route


def _likely_next(random: Random, last: int, agents: range, chance: float) -> int:
    """The agent behind `last` in the circle with this chance, else any other one."""
    others = [agent for agent in agents if agent != last]
    follower = agents[(last + 1 - agents.start) % len(agents)]
    return follower if random.random() < chance else random.choice(others)


ROUTINGS: Mapping[str, Routing] = MappingProxyType(
    {
        "supervisor": _supervisor,
        "pipeline": _pipeline,
        "debate": _debate,
        "selector": _selector,
        "random_routing": _random_routing,
    }
)


def make_tasks(name: str, num_tasks: int, scale: float, seed: int) -> tuple[Program, ...]:
    """Tasks of one application, named by its routing. `scale`: factor on the prompt lengths."""
    sizes = Random(f"{seed}/{name}/anchors")
    anchors = []
    for agent in range(NUM_AGENTS):
        num_blocks = _scaled(sizes.randint(_MIN_ANCHOR_BLOCKS, _MAX_ANCHOR_BLOCKS), scale)
        anchors.append(tuple(range(agent << 16, (agent << 16) + num_blocks)))
    return tuple(_task(name, index, anchors, scale, seed) for index in range(num_tasks))


def _task(name: str, index: int, anchors: list[tuple[int, ...]], scale: float, seed: int) -> Program:
    program_id = f"{name}-{index:03d}"
    random = Random(f"{seed}/{program_id}")
    # Each agent sees the transcript behind an anchor of its own: blocks of one task are unlike those of all others.
    first = next_block = _FIRST_TASK_BLOCK + index * _BLOCKS_A_TASK
    next_block += _scaled(_TASK_BLOCKS, scale)
    turns = []
    route = ROUTINGS[name](random)
    for number, agent in enumerate(route):
        prompt = anchors[agent] + tuple(range(first, next_block))
        is_last = number + 1 == len(route)
        gap_ms = math.exp(random.uniform(math.log(_MIN_GAP_MS), math.log(_MAX_GAP_MS)))
        turns.append(
            Turn(
                len(prompt) * BLOCK_TOKENS,
                random.randint(_MIN_OUTPUT, _MAX_OUTPUT),
                0.0 if is_last else round(gap_ms, 3),
                keep_tokens=0 if number else None,
                block_ids=prompt,
                agent=f"{name}/{agent}",
            )
        )
        next_block += _scaled(random.randint(_MIN_MESSAGE_BLOCKS, _MAX_MESSAGE_BLOCKS), scale)
    return Program(program_id, tuple(turns), block_tokens=BLOCK_TOKENS, role="task")


def _scaled(num_blocks: int, scale: float) -> int:
    return max(1, round(num_blocks * scale))
