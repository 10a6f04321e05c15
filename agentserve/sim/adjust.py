"""Workloads of a large cluster made to fit a small one: longer times between arrivals, no prompts beyond the window."""

from __future__ import annotations

import dataclasses
import math

from agentserve.errors import WorkloadError
from agentserve.sim.programs import Program, Workload


def stretched(workload: Workload, factor: float) -> Workload:
    """All arrival times multiplied by `factor`: 2 is half the load. Tool gaps stay.

    Raises WorkloadError for a factor that is not positive, and for a closed loop, which has no arrivals.
    """
    if not (math.isfinite(factor) and factor > 0.0):
        raise WorkloadError(f"stretch: expected a positive number, not {factor}")
    if workload.num_agents is not None:
        raise WorkloadError(f"stretch: workload {workload.name} is a closed loop and has no arrival times")
    programs = tuple(
        dataclasses.replace(
            program,
            arrival_ms=_times(program.arrival_ms, factor),
            turns=tuple(
                turn if turn.arrival_ms is None else dataclasses.replace(turn, arrival_ms=turn.arrival_ms * factor)
                for turn in program.turns
            ),
        )
        for program in workload.programs
    )
    return dataclasses.replace(
        workload, programs=programs, description=f"{workload.description}; arrival times x {factor:g}"
    )


def without_long_programs(workload: Workload, max_model_len: int) -> Workload:
    """The workload without the programs that need a longer window; the notes count them.

    What depends on a program that is left out does not wait for it. Raises WorkloadError if nothing is left.
    """
    kept = {p.program_id: p for p in workload.programs if p.num_context_tokens <= max_model_len}
    num_left_out = len(workload.programs) - len(kept)
    if not num_left_out:
        return workload
    if not kept:
        raise WorkloadError(f"workload {workload.name}: no program fits a window of {max_model_len} tokens")
    return dataclasses.replace(
        workload,
        programs=tuple(_without_dependencies(program, kept) for program in kept.values()),
        notes=(*workload.notes, f"{num_left_out} programs need more than {max_model_len} tokens and are left out"),
    )


def _times(arrival_ms: float | None, factor: float) -> float | None:
    return None if arrival_ms is None else arrival_ms * factor


def _without_dependencies(program: Program, kept: dict[str, Program]) -> Program:
    if all(other in kept for other in program.depends_on):
        return program
    gaps_ms = program.dependency_gaps_ms or (0.0,) * len(program.depends_on)
    left = [(other, gap) for other, gap in zip(program.depends_on, gaps_ms, strict=True) if other in kept]
    return dataclasses.replace(
        program,
        depends_on=tuple(other for other, _ in left),
        dependency_gaps_ms=tuple(gap for _, gap in left) if program.dependency_gaps_ms else (),
    )
