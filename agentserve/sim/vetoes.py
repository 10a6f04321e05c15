"""Tool calls that safety policies stop, in a workload: what `serve --tool-allow` does, in the simulator.

The daemon asks its policies when a call begins to leave it. What a simulated agent calls stands in its program, so the
same policies are asked the same question before the run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from agentserve.core.agents.policy import Policy, ToolUse
from agentserve.core.events import HUMAN
from agentserve.errors import WorkloadError
from agentserve.sim.programs import Program, Turn, Workload

SEVERAL = "+"
"""Between the names of tools that one turn calls at once."""


def agents_of(workload: Workload) -> frozenset[str]:
    """Who calls, as the engine is told: the agent that a turn names, else its program."""
    return frozenset(_agent(program, turn) for program in workload.programs for turn in program.turns)


def without_vetoed_calls(workload: Workload, policies: Sequence[Policy]) -> Workload:
    """The workload as it goes where `policies` refuse tool calls; a note says how many they stopped.

    An answer whose call is stopped ends without one. No tool runs and no result comes back, so the agent is done: its
    program ends with that answer, and what depends on it starts then. The answer keeps its length, since nobody knows
    what the model would have written instead. Turns that name no tool pass.

    Raises WorkloadError if a program would end early whose turns a framework calls step by step (`Workload.steps`).
    """
    programs = tuple(_cut(program, policies) for program in workload.programs)
    num_cut = sum(after is not before for after, before in zip(programs, workload.programs, strict=True))
    if num_cut and workload.steps:
        raise WorkloadError(f"workload {workload.name}: its steps call programs that a stopped tool call would end")
    note = f"{num_cut} of {len(programs)} programs end early, because a tool call of theirs is stopped"
    return dataclasses.replace(workload, programs=programs, notes=(*workload.notes, note))


def _cut(program: Program, policies: Sequence[Policy]) -> Program:
    for index, turn in enumerate(program.turns):
        if _is_vetoed(_agent(program, turn), turn.tool_name, policies):
            last = dataclasses.replace(turn, tool_gap_ms=0.0, tool_name=HUMAN)
            return dataclasses.replace(program, turns=(*program.turns[:index], last))
    return program


def _agent(program: Program, turn: Turn) -> str:
    return turn.agent or program.program_id


def _is_vetoed(agent: str, tool_name: str | None, policies: Sequence[Policy]) -> bool:
    if tool_name is None or tool_name == HUMAN:
        return False
    uses = [ToolUse(agent, name) for name in tool_name.split(SEVERAL)]
    return any(policy.refusal(use) is not None for use in uses for policy in policies)
