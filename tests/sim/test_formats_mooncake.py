"""The Mooncake trace through the engine: its cache finds what the trace says."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentserve.errors import WorkloadError
from agentserve.sim.blocks import MAX_BLOCK_ID, tokens_of_blocks
from agentserve.sim.cache_bound import infinite_cache_bound, infinite_cache_hit_rate
from agentserve.sim.formats import load_workload
from agentserve.sim.orchestrator import simulate
from agentserve.sim.programs import Program, Turn, Workload
from tests.core import builders

EXCERPT = Path(__file__).parent / "data" / "mooncake_conversation_excerpt.jsonl"
ENGINE: dict[str, Any] = {"num_blocks": 8192, "block_size": 16, "max_model_len": 8192, "prefill_chunk": 2048}


def test_the_tokens_of_a_block_are_its_ids() -> None:
    one, other = tokens_of_blocks([3, 4], 10, 20), tokens_of_blocks([3, 5], 10, 17)
    assert (len(one), len(other)) == (20, 17)
    assert one[:10] == other[:10]
    assert one[10:14] != other[10:14]
    assert tokens_of_blocks([3], 4, 4) == [1003, 1000, 1000, 1000]


@given(st.integers(0, MAX_BLOCK_ID), st.integers(0, MAX_BLOCK_ID))
def test_different_blocks_differ_in_their_first_four_tokens(one: int, other: int) -> None:
    assert (tokens_of_blocks([one], 512, 4) == tokens_of_blocks([other], 512, 4)) == (one == other)


def test_the_engine_finds_what_the_trace_says() -> None:
    workload = load_workload(EXCERPT)
    assert workload.description == ("29 programs with 29 turns of mooncake_conversation_excerpt.jsonl, format mooncake")
    driver = builders.virtual(**ENGINE)
    run = simulate(workload, driver)
    bound = infinite_cache_bound(workload, engine_block_size=16)
    assert {(r.program_id, r.turn_index): r.num_cached_tokens for r in run.records} == bound.hit_tokens
    assert all(r.error is None for r in run.records)
    stats = driver.core.stats()
    assert (stats.num_prefix_hit_tokens, stats.num_prefix_query_tokens) == (bound.num_hit_tokens, bound.num_tokens)
    assert stats.num_evicted_blocks == 0
    assert stats.num_prefix_hit_tokens / stats.num_prefix_query_tokens == infinite_cache_hit_rate(
        workload, engine_block_size=16
    )


def test_the_bound_of_the_excerpt_is_that_of_a_plain_count() -> None:
    """As the trace's authors count: the ids of this trace stand for whole prefixes, so a set of them is enough."""
    seen: set[int] = set()
    num_hits = num_blocks = 0
    for line in EXCERPT.read_text().splitlines():
        ids = json.loads(line)["hash_ids"]
        num_hits += sum(block_id in seen for block_id in ids)
        num_blocks += len(ids)
        seen.update(ids)
    bound = infinite_cache_bound(load_workload(EXCERPT))
    assert (bound.num_hit_blocks, bound.num_blocks) == (num_hits, num_blocks)
    assert bound.block_hit_rate == num_hits / num_blocks > 0.3


def request(name: str, num_tokens: int, *block_ids: int, at_ms: float = 0.0) -> Program:
    return Program(name, (Turn(num_tokens, 2, block_ids=block_ids),), arrival_ms=at_ms, block_tokens=32)


def hits(*programs: Program, engine_block_size: int | None = None) -> list[int]:
    bound = infinite_cache_bound(Workload("w", programs, None), engine_block_size=engine_block_size)
    return [bound.hit_tokens[program.program_id, 0] for program in programs]


def test_what_counts_as_a_hit() -> None:
    trace = (
        request("a", 70, 1, 2, 3),
        request("b", 70, 1, 2, 4, at_ms=1.0),  # two whole blocks
        request("c", 70, 1, 2, 3, at_ms=2.0),  # all of it: the partial block has the same 6 tokens
        request("d", 64, 1, 2, at_ms=3.0),  # all of it, but its last token is computed
        request("e", 64, 2, 1, at_ms=4.0),  # the same blocks, elsewhere
        request("f", 96, 1, 2, 3, at_ms=5.0),  # 6 tokens of its last block were seen, and the block was not
    )
    assert hits(*trace) == [0, 64, 70, 64, 0, 70]
    # In blocks of 16: 64 of 70 for c; 48 for d, whose last block must be computed; 64 for f, the 6 fill no block.
    assert hits(*trace, engine_block_size=16) == [0, 64, 64, 48, 0, 64]
    bound = infinite_cache_bound(Workload("w", trace, None))
    assert (bound.num_blocks, bound.num_hit_blocks) == (3 + 3 + 3 + 2 + 2 + 3, 2 + 3 + 2 + 2)
    # Arrival decides, not the place in the file.
    assert hits(request("late", 64, 1, 2, at_ms=9.0), request("early", 64, 1, 2)) == [64, 0]


@st.composite
def traces(draw: st.DrawFn) -> Workload:
    """Prompts from few blocks, so that they often begin alike, far enough apart to be served one after the other."""
    programs = []
    for index in range(draw(st.integers(1, 8))):
        num_tokens = draw(st.integers(1, 120))
        num_blocks = -(-num_tokens // 32)
        block_ids = draw(st.lists(st.integers(0, 2), min_size=num_blocks, max_size=num_blocks))
        programs.append(request(f"r{index}", num_tokens, *block_ids, at_ms=index * draw(st.sampled_from([0, 1, 9000]))))
    return Workload("random", tuple(sorted(programs, key=lambda p: p.arrival_ms or 0)), None)


@settings(max_examples=60)
@given(traces(), st.sampled_from([4, 16]))
def test_the_bound_is_exact_for_any_trace(workload: Workload, block_size: int) -> None:
    driver = builders.virtual(num_blocks=1024, block_size=block_size, max_model_len=256)
    run = simulate(workload, driver)
    bound = infinite_cache_bound(workload, engine_block_size=block_size)
    found = {(r.program_id, r.turn_index): r.num_cached_tokens for r in run.records}
    # Without an order of admission only the sum is certain, and that but for prompts that fill their last block.
    num_full = sum(p.turns[0].append_tokens % block_size == 0 for p in workload.programs)
    assert abs(sum(found.values()) - bound.num_hit_tokens) <= num_full * block_size
    if len({p.arrival_ms for p in workload.programs}) == len(workload.programs):
        gaps = [p.arrival_ms or 0 for p in workload.programs]
        if all(b - a >= 5000 for a, b in pairwise(gaps)):
            assert found == bound.hit_tokens


def test_prompts_that_are_no_blocks_have_no_bound() -> None:
    with pytest.raises(WorkloadError, match=r"program 'a': turns\[0\]: expected block_ids for the whole prompt"):
        infinite_cache_bound(Workload("w", (Program("a", (Turn(3, 1),)),), 1))
    grows = Program("a", (Turn(3, 1, block_ids=(1,)), Turn(3, 1, block_ids=(2,))), block_tokens=4)
    with pytest.raises(WorkloadError, match=r"turns\[1\]: expected block_ids for the whole prompt"):
        infinite_cache_bound(Workload("w", (grows,), 1))
