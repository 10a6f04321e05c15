"""What a prefix cache of unlimited size finds in a trace of hash blocks, computed from the trace alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from agentserve.errors import WorkloadError
from agentserve.sim.programs import Program, Workload


@dataclass(frozen=True, slots=True)
class CacheBound:
    """Hits of all requests together, and of each one."""

    num_blocks: int
    """Blocks of all prompts, partial ones included."""
    num_hit_blocks: int
    num_tokens: int
    num_hit_tokens: int
    hit_tokens: Mapping[tuple[str, int], int]
    """By program and turn."""

    @property
    def block_hit_rate(self) -> float:
        return self.num_hit_blocks / self.num_blocks

    @property
    def token_hit_rate(self) -> float:
        return self.num_hit_tokens / self.num_tokens


@dataclass(slots=True)
class _Node:
    """A block together with everything before it."""

    num_tokens: int
    """How much of it was seen: a last block may be partial."""
    children: dict[int, _Node]


def infinite_cache_bound(workload: Workload, *, engine_block_size: int | None = None) -> CacheBound:
    """Replays the prompts in the order of arrival and keeps every block.

    Args:
        workload: one whose prompts are all given by block ids (Mooncake, Qwen-Bailian).
        engine_block_size: None counts as the traces' authors do: leading blocks seen before, in blocks of the trace.
            Else what this engine's cache can find, in its own blocks of so many tokens: only whole ones, and never the
            last token of a prompt, which is computed anew to sample from.

    With memory for everything, the engine's own count for each request is exactly the second one, as long as requests
    are admitted in the order of arrival. Two rules of the engine make that so: a request whose prefix is being computed
    by another one waits for it, and outputs are in no later prompt. In another order of admission the sum over all
    requests differs by at most one block for each prompt that fills its last block: only there is the last token's
    block computed although it was seen.

    Raises WorkloadError for a prompt that is not given by block ids.
    """
    roots: dict[int, _Node] = {}
    num_all_blocks = num_hit_blocks = num_all_tokens = 0
    hits: dict[tuple[str, int], int] = {}
    for _, _, turn_index, program in sorted(_requests(workload), key=lambda request: request[:3]):
        turn = program.turns[turn_index]
        num_tokens = turn.append_tokens
        num_blocks, num_seen = _walk(roots, turn.block_ids, program.block_tokens, num_tokens)
        if engine_block_size is not None:
            num_seen = min(num_seen, num_tokens - 1) // engine_block_size * engine_block_size
            num_blocks = num_seen // engine_block_size
        hits[program.program_id, turn_index] = num_seen
        num_all_blocks += len(turn.block_ids) if engine_block_size is None else -(-num_tokens // engine_block_size)
        num_hit_blocks += num_blocks
        num_all_tokens += num_tokens
    return CacheBound(num_all_blocks, num_hit_blocks, num_all_tokens, sum(hits.values()), hits)


def infinite_cache_hit_rate(workload: Workload, *, engine_block_size: int | None = None) -> float:
    """The share of prompt tokens that `infinite_cache_bound` finds. Raises what that raises."""
    return infinite_cache_bound(workload, engine_block_size=engine_block_size).token_hit_rate


def _requests(workload: Workload) -> list[tuple[float, int, int, Program]]:
    """Arrival in milliseconds, index of the program, index of the turn, program."""
    requests = []
    for program_index, program in enumerate(workload.programs):
        for turn_index, turn in enumerate(program.turns):
            if not turn.block_ids or (turn_index and turn.keep_tokens != 0):
                raise WorkloadError(
                    f"program {program.program_id!r}: turns[{turn_index}]: expected block_ids for the whole prompt"
                )
            arrival_ms = turn.arrival_ms if turn_index else program.arrival_ms
            requests.append((arrival_ms or 0.0, program_index, turn_index, program))
    return requests


def _walk(roots: dict[int, _Node], block_ids: tuple[int, ...], block_tokens: int, num_tokens: int) -> tuple[int, int]:
    """Adds a prompt; returns how many leading blocks and tokens of it had been seen."""
    num_blocks = num_seen = 0
    is_known = True
    level = roots
    for index, block_id in enumerate(block_ids):
        num_here = min(block_tokens, num_tokens - index * block_tokens)
        node = level.get(block_id)
        if node is None:
            node = level[block_id] = _Node(0, {})
        if is_known:
            num_seen += min(num_here, node.num_tokens)
            is_known = node.num_tokens >= num_here
            num_blocks += is_known
        node.num_tokens = max(node.num_tokens, num_here)
        level = node.children
    return num_blocks, num_seen
