"""Programs: what an agent does, as turns of a growing conversation with tool gaps between them.

The same programs drive the live daemon through `bench/run.py` and the simulator.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Turn:
    """One model call. Its prompt is everything before it in the program, plus `append_tokens` new tokens."""

    append_tokens: int
    """New prompt tokens: system prompt and task in the first turn (its shared prefix included), a tool's output in later
    ones."""
    output_tokens: int
    """Tokens that are generated; the end-of-sequence token is ignored, so that every server does the same work."""
    tool_gap_ms: float = 0.0
    """From the end of this turn's output to the start of the next turn: the tool runs."""


@dataclass(frozen=True, slots=True)
class Program:
    """The turns of one agent session, in order."""

    program_id: str
    turns: tuple[Turn, ...]
    prefix_id: str | None = None
    """Programs of the same `prefix_id` start with the same `prefix_tokens` tokens."""
    prefix_tokens: int = 0
    arrival_ms: float | None = None
    """Open loop: when it starts, from the start of the run. None: closed loop, when an agent is free."""
    depends_on: tuple[str, ...] = ()
    """Programs that must have ended before this one starts."""
    role: str = "agent"
    """What the program is for in its workload, such as `victim` or `attacker`; results are reported by role."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Programs and how they are to be run."""

    name: str
    programs: tuple[Program, ...]
    num_agents: int | None
    """Closed loop: this many programs run at once, in their order. None: every program starts at its `arrival_ms`, or
    at once without one."""
    seed: int = 0
    """What the prompts are made from."""
    description: str = ""
