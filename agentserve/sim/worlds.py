"""Agent simulations as workloads: who calls the model in which step of a world, and what its framework knows of that.

The three classes of ScaleSim (section 4.2). In each, about a fifth of the agents call at once, and the rest play out
what they have decided:

- *independent* (AgentSociety): an action takes some steps. The framework knows how many, or guesses.
- *interaction* (Generative Agents): the same in a town. Two agents that meet talk, before their actions end. D is the
  smaller one of the steps left and of the distance to the nearest other agent over the speed of both.
- *diffusion*: news spreads over a social network, breadth first. D is the number of hops from those who have it.

Lengths are made up, about what such agents have: a persona with memories that only one agent has, an observation in
each call, a short decision. What an agent remembers is bounded, so that it stays as long as it was.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from random import Random
from types import MappingProxyType

from agentserve.errors import WorkloadError
from agentserve.sim.programs import Program, Turn, WorldStep

NUM_STEPS = 16
_PERSONA = (1400, 1800)
_OBSERVATION = (24, 72)
_DECISION = (24, 40)
GAP_MS = 100.0
"""The world moves on: positions, needs, what agents see."""
MEAN_ACTION = 4
"""Steps that an action takes, on average, besides that of its call: a fifth of the agents is active."""
_SPACING = 12.0
"""Of the agents of a town, in units of what they walk in a step."""
_SPEED = 1.0
_TALK_AT = 1.0
_NUM_HOPS = 5
"""From the source of a piece of news to those who hear it last."""


class _Plan:
    """Who calls when, as it is drawn up."""

    def __init__(self, num_agents: int, num_steps: int) -> None:
        self.names = [f"agent-{index:04d}" for index in range(num_agents)]
        self.calls: list[list[int]] = [[] for _ in range(num_steps)]
        self.distances: list[dict[int, float]] = [{} for _ in range(num_steps)]

    def steps(self) -> tuple[WorldStep, ...]:
        """Steps in which nobody calls are left out: the world only moves on, and what was said last still holds."""
        steps, said = [], dict[int, float]()
        gap_ms = 0.0
        for calls, distances in zip(self.calls, self.distances, strict=True):
            said.update(distances)
            gap_ms += GAP_MS
            if calls:
                told = tuple((self.names[agent], said[agent]) for agent in sorted(said))
                steps.append(WorldStep(tuple(self.names[agent] for agent in calls), told, gap_ms))
                said, gap_ms = {}, 0.0
        return tuple(steps)


def independent(num_agents: int, num_steps: int, random: Random, mean_action: int = MEAN_ACTION) -> _Plan:
    """Actions of 2 to `2 * mean_action` steps, so `1 / (mean_action + 1)` of the agents is active; one action in five
    takes a step more or less than the framework has said."""
    plan = _Plan(num_agents, num_steps)
    due = [agent % (mean_action + 1) for agent in range(num_agents)]
    for step in range(num_steps):
        for agent in range(num_agents):
            if due[agent] != step:
                continue
            plan.calls[step].append(agent)
            said = _action(random, mean_action)
            error = random.choice((-1, 1)) if random.random() < 0.2 else 0
            due[agent] = step + max(1, said + error)
            # Said while the call is open: it holds from its end on, in the steps after this one.
            plan.distances[step][agent] = float(said)
    return plan


def interaction(num_agents: int, num_steps: int, random: Random) -> _Plan:
    """Agents walk between places of a town; who meets somebody talks to him, and both call the model."""
    plan = _Plan(num_agents, num_steps)
    side = _SPACING * math.sqrt(num_agents)
    places = [(random.uniform(0, side), random.uniform(0, side)) for _ in range(num_agents)]
    headings = [random.uniform(0, 2 * math.pi) for _ in range(num_agents)]
    due = [agent % (MEAN_ACTION + 2) for agent in range(num_agents)]
    talked = [-MEAN_ACTION] * num_agents
    for step in range(num_steps):
        nearest = _nearest(places, side)
        for agent in range(num_agents):
            other, apart, _ = nearest[agent]
            meets = apart <= _TALK_AT and step - max(talked[agent], talked[other]) >= MEAN_ACTION
            if meets and due[agent] > step:
                talked[agent] = talked[other] = due[agent] = due[other] = step
        for agent in range(num_agents):
            if due[agent] == step:
                plan.calls[step].append(agent)
                due[agent] = step + _action(random) + 1
                headings[agent] = random.uniform(0, 2 * math.pi)
        for agent in range(num_agents):
            other, apart, (dx, dy) = nearest[agent]
            # The speed at which they come nearer: that of both along the line between them.
            closing = _SPEED * sum(
                (math.cos(headings[one]) * dx + math.sin(headings[one]) * dy) * sign / apart
                for one, sign in ((agent, 1.0), (other, -1.0))
                if apart
            )
            meeting = math.ceil((apart - _TALK_AT) / closing) if closing > 0 and other != agent else math.inf
            if step - max(talked[agent], talked[other]) < MEAN_ACTION:
                meeting = math.inf
            plan.distances[step][agent] = float(max(1.0, min(due[agent] - step, meeting)))
        for agent, (x, y) in enumerate(places):
            heading = headings[agent]
            places[agent] = ((x + _SPEED * math.cos(heading)) % side, (y + _SPEED * math.sin(heading)) % side)
    return plan


def diffusion(num_agents: int, num_steps: int, random: Random) -> _Plan:
    """News after news from a random agent; everybody who hears it tells his friends in the next step."""
    plan = _Plan(num_agents, num_steps)
    # A ring of neighbours, the lattice that small worlds start from: so about as many hear the news in each step.
    reach = -(-num_agents // (2 * _NUM_HOPS))
    friends = [{(agent + i) % num_agents for i in range(-reach, reach + 1) if i} for agent in range(num_agents)]
    step = 0
    while step < num_steps:
        hops = _hops(friends, random.randrange(num_agents))
        last = max(hops)
        for agent, hop in enumerate(hops):
            # The distance from the source is known when the news begins; those who have heard it wait for the next one.
            plan.distances[step][agent] = float(hop)
            if step + hop < num_steps:
                plan.calls[step + hop].append(agent)
        for passed in range(last + 1):
            if step + passed < num_steps:
                for agent in plan.calls[step + passed]:
                    plan.distances[step + passed][agent] = float(last + 1 - passed + _NUM_HOPS)
        step += last + 1
    return plan


WORLDS: Mapping[str, Callable[[int, int, Random], _Plan]] = MappingProxyType(
    {"independent": independent, "interaction": interaction, "diffusion": diffusion}
)


def make_world(
    name: str,
    num_agents: int,
    num_steps: int,
    scaled: Callable[[int], int],
    seed: int,
    *,
    mean_action: int | None = None,
    answer_scale: float = 1.0,
) -> tuple[tuple[Program, ...], tuple[WorldStep, ...]]:
    """The agents of a world that call at all, each with an adapter of its own, and its steps.

    Args:
        name: one of `WORLDS`.
        num_agents: who live in it.
        num_steps: of the world.
        scaled: what becomes of the length of a prompt.
        seed: of everything.
        mean_action: steps that an action takes besides that of its call; only of agents that are independent.
        answer_scale: factor on the length of what is decided.

    Raises WorkloadError for `mean_action` in another world, or if it is not positive.
    """
    random = Random(f"{seed}/{name}")
    if mean_action is None:
        steps = WORLDS[name](num_agents, num_steps, random).steps()
    elif name != "independent" or mean_action < 1:
        raise WorkloadError(f"mean_action: a positive number, for independent agents; not {mean_action} for {name}")
    else:
        steps = independent(num_agents, num_steps, random, mean_action).steps()
    num_turns: dict[str, int] = {}
    for step in steps:
        for program_id in step.calls:
            num_turns[program_id] = num_turns.get(program_id, 0) + 1
    programs = tuple(
        Program(
            program_id,
            _turns(num_turns[program_id], scaled, answer_scale, Random(f"{seed}/{program_id}")),
            adapter=program_id,
        )
        for program_id in sorted(num_turns)
    )
    return programs, steps


def _turns(count: int, scaled: Callable[[int], int], answer_scale: float, random: Random) -> tuple[Turn, ...]:
    """A persona, then observations; each replaces the one before it, so the persona and its memory stay."""
    persona = scaled(random.randint(*_PERSONA))
    turns: list[Turn] = []
    for _ in range(count):
        observation = scaled(random.randint(*_OBSERVATION))
        decision = max(1, round(answer_scale * random.randint(*_DECISION)))
        if turns:
            turns.append(Turn(observation, decision, keep_tokens=persona))
        else:
            turns.append(Turn(persona + observation, decision))
    return tuple(turns)


def _action(random: Random, mean_action: int = MEAN_ACTION) -> int:
    """Steps that an action takes, with that of its call: 2 to 8, on average 5."""
    return random.randint(2, 2 * mean_action)


def _nearest(places: Sequence[tuple[float, float]], side: float) -> list[tuple[int, float, tuple[float, float]]]:
    """For each agent the nearest other one, how far away it is, and the way there; in a town without edges. O(n)."""
    size = _SPACING
    width = max(1, int(side / size))
    cells: dict[tuple[int, int], list[int]] = {}
    for agent, (x, y) in enumerate(places):
        cells.setdefault((int(x / size) % width, int(y / size) % width), []).append(agent)
    found = []
    for agent, (x, y) in enumerate(places):
        column, row = int(x / size), int(y / size)
        around = {((column + i) % width, (row + j) % width) for i in (-1, 0, 1) for j in (-1, 0, 1)}
        others = [other for cell in sorted(around) for other in cells.get(cell, ()) if other != agent]
        best = (agent, 2 * size, (0.0, 0.0))
        for other in others:
            dx, dy = (_around(places[other][0] - x, side), _around(places[other][1] - y, side))
            apart = math.hypot(dx, dy)
            if apart < best[1]:
                best = (other, apart, (dx, dy))
        found.append(best)
    return found


def _around(way: float, side: float) -> float:
    """The shorter way on a ring."""
    return (way + side / 2) % side - side / 2


def _hops(friends: Sequence[set[int]], source: int) -> list[int]:
    """Hops from the source to each agent, breadth first. Everybody can be reached."""
    hops = [-1] * len(friends)
    hops[source] = 0
    queue = deque([source])
    while queue:
        agent = queue.popleft()
        for other in sorted(friends[agent]):
            if hops[other] < 0:
                hops[other] = hops[agent] + 1
                queue.append(other)
    return hops
