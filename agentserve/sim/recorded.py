"""A recording of a daemon as a workload: the same arrivals and numbers of tokens, on any engine or device."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

from agentserve.core.events import SubmitRequest
from agentserve.errors import WorkloadError
from agentserve.runtime.recording import Recording
from agentserve.sim.programs import Program, Turn, Workload

_NS_PER_MS = 1e6
_MIN_PREFIX_TOKENS = 16
"""Prompts that begin alike for fewer tokens share nothing that a cache of usual block size could keep."""


@dataclass(slots=True)
class _Call:
    """A recorded request and what became of it."""

    command: SubmitRequest
    arrival_ns: int
    num_output_tokens: int = 0
    end_ns: int = 0
    """When its last token was there."""

    @property
    def num_tokens(self) -> int:
        return len(self.command.prompt_token_ids) + self.num_output_tokens


def recording_workload(path: Path, *, seed: int = 0) -> Workload:
    """Reads a recording as an open-loop workload.

    A request whose prompt continues the prompt and output of an earlier request of the same agent and session is the
    next turn of its program; the time between them is the tool gap. All others start a program when they arrived.
    First prompts that begin with the same tokens (and have the same cache salt) get a common prefix. Requests that
    got no token are left out. The prompts themselves are drawn anew from `seed`.

    Raises RecordingError if the file cannot be read, WorkloadError if no request in it got a token.
    """
    chains = _chains(_calls(path))
    if not chains:
        raise WorkloadError(f"{path}: expected at least one request that got a token")
    prefixes = _prefixes([chain[0].command for chain in chains])
    start_ns = chains[0][0].arrival_ns
    programs = []
    for index, (chain, (prefix_id, prefix_tokens)) in enumerate(zip(chains, prefixes, strict=True)):
        programs.append(
            Program(
                program_id=f"recorded-{index:04d}",
                turns=_turns(chain),
                prefix_id=prefix_id,
                prefix_tokens=prefix_tokens,
                arrival_ms=(chain[0].arrival_ns - start_ns) / _NS_PER_MS,
            )
        )
    return Workload("recording", tuple(programs), None, seed, f"{len(programs)} recorded conversations")


def _calls(path: Path) -> list[_Call]:
    """The requests that got at least one token, in the order of arrival."""
    calls: dict[str, _Call] = {}
    for step in Recording(path).steps():
        for output in step.completions:
            for sample in output.samples:
                if sample.request_id in calls:
                    calls[sample.request_id].num_output_tokens += 1
                    calls[sample.request_id].end_ns = step.now_ns
        for command in step.commands:
            if isinstance(command, SubmitRequest):
                calls[command.request_id] = _Call(command, step.now_ns)
    return [call for call in calls.values() if call.num_output_tokens]


def _chains(calls: list[_Call]) -> list[list[_Call]]:
    """Calls by conversation: each continues the one before it."""
    chains: list[list[_Call]] = []
    open_chains: dict[tuple[str | None, str | None, str | None], list[list[_Call]]] = {}
    for call in calls:
        command = call.command
        candidates = open_chains.setdefault((command.agent_id, command.session_id, command.cache_salt), [])
        # The longest one: of a conversation and a branch of it, the branch.
        chain = max((c for c in candidates if _continues(call, c[-1])), key=lambda c: c[-1].num_tokens, default=None)
        if chain is None:
            chain = []
            chains.append(chain)
            candidates.append(chain)
        chain.append(call)
    return chains


def _continues(call: _Call, before: _Call) -> bool:
    prompt, earlier = call.command.prompt_token_ids, before.command.prompt_token_ids
    is_later = call.arrival_ns >= before.end_ns and len(prompt) > before.num_tokens
    return is_later and prompt[: len(earlier)] == earlier


def _turns(chain: list[_Call]) -> tuple[Turn, ...]:
    turns = []
    num_history = 0
    for call, following in itertools.zip_longest(chain, chain[1:]):
        gap_ms = (following.arrival_ns - call.end_ns) / _NS_PER_MS if following else 0.0
        turns.append(Turn(len(call.command.prompt_token_ids) - num_history, call.num_output_tokens, gap_ms))
        num_history = call.num_tokens
    return tuple(turns)


def _prefixes(commands: list[SubmitRequest]) -> list[tuple[str | None, int]]:
    """For each first prompt the group whose first prompt it begins like, and for how many tokens; (None, 0) if alone.

    Each prompt is compared with the first one of its group only: that is linear, and exact for one system prompt.
    """
    leaders: dict[tuple[str | None, tuple[int, ...]], int] = {}
    shared = [0] * len(commands)
    groups: list[int] = []
    for index, command in enumerate(commands):
        prompt = command.prompt_token_ids
        leader = leaders.setdefault((command.cache_salt, prompt[:_MIN_PREFIX_TOKENS]), index)
        groups.append(leader)
        if leader != index and len(prompt) >= _MIN_PREFIX_TOKENS:
            pairs = zip(prompt, commands[leader].prompt_token_ids, strict=False)
            shared[index] = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
            shared[leader] = max(shared[leader], shared[index])
    return [(f"prefix-{g:04d}", n) if n else (None, 0) for g, n in zip(groups, shared, strict=True)]
