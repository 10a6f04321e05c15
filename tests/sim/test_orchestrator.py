"""Workloads on the virtual clock, through the real control plane."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from agentserve.core.batch import Lane
from agentserve.runtime.virtual import VirtualDriver
from agentserve.sim.orchestrator import SimulatedRun, simulate
from agentserve.sim.programs import Program, Turn, Workload
from tests.core import builders

MS = 1_000_000


def driver(**values: Any) -> VirtualDriver:
    return builders.virtual(**{"num_blocks": 256, "max_model_len": 512, **values})


def run(*programs: Program, num_agents: int | None = None, **values: Any) -> SimulatedRun:
    return simulate(Workload("test", programs, num_agents), driver(**values))


def program(program_id: str, *turns: tuple[int, int, float], **values: Any) -> Program:
    return Program(program_id, tuple(Turn(*turn) for turn in turns), **values)


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    num_programs = draw(st.integers(1, 5))
    num_agents = draw(st.none() | st.integers(1, 3))
    programs = []
    for index in range(num_programs):
        turns = tuple(
            Turn(draw(st.integers(1, 40)), draw(st.integers(1, 6)), draw(st.sampled_from([0, 0.5, 40, 1000])))
            for _ in range(draw(st.integers(1, 3)))
        )
        prefix_tokens = draw(st.integers(0, turns[0].append_tokens))
        others = st.lists(st.sampled_from([f"p{other}" for other in range(index)]), unique=True, max_size=2)
        programs.append(
            Program(
                f"p{index}",
                turns,
                prefix_id="shared" if prefix_tokens else None,
                prefix_tokens=prefix_tokens,
                arrival_ms=None if num_agents else draw(st.none() | st.integers(0, 500)),
                depends_on=tuple(draw(others)) if index else (),
            )
        )
    return Workload("random", tuple(programs), num_agents, seed=draw(st.integers(0, 3)))


@settings(max_examples=60)
@given(workloads())
def test_every_turn_runs_once_in_order_and_in_its_time(workload: Workload) -> None:
    result = simulate(workload, driver(max_num_seqs=3))
    records = {(r.program_id, r.turn_index): r for r in result.records}
    assert len(records) == len(result.records) == sum(len(p.turns) for p in workload.programs)
    spans = {}
    for p in workload.programs:
        history = 0
        for index, turn in enumerate(p.turns):
            one = records[p.program_id, index]
            assert one.error is None
            history += turn.append_tokens
            assert (one.num_prompt_tokens, one.num_output_tokens) == (history, turn.output_tokens)
            history += turn.output_tokens
            assert one.sent_ns <= one.token_ns[0]
            assert list(one.token_ns) == sorted(set(one.token_ns))
            assert one.token_ns[-1] == one.finished_ns
            if index:
                before = records[p.program_id, index - 1]
                assert one.sent_ns == before.finished_ns + round(p.turns[index - 1].tool_gap_ms * MS)
        spans[p.program_id] = (records[p.program_id, 0].sent_ns, records[p.program_id, len(p.turns) - 1].finished_ns)
    for p in workload.programs:
        earliest = max([round((p.arrival_ms or 0) * MS), *(spans[other][1] for other in p.depends_on)])
        started = spans[p.program_id][0]
        assert started == earliest if workload.num_agents is None else started >= earliest
    if workload.num_agents is not None:
        for started, _ in spans.values():
            assert sum(first <= started < last for first, last in spans.values()) <= workload.num_agents


@settings(max_examples=15)
@given(workloads())
def test_two_runs_are_equal(workload: Workload) -> None:
    assert simulate(workload, driver()) == simulate(workload, driver())


def test_a_free_agent_takes_the_first_program_that_may_start() -> None:
    result = run(
        program("a", (8, 8, 0)),
        program("b", (8, 1, 0), depends_on=("a",)),
        program("c", (8, 2, 0)),
        program("d", (8, 1, 0)),
        num_agents=2,
    )
    sent = {r.program_id: r.sent_ns for r in result.records}
    ended = {r.program_id: r.finished_ns for r in result.records}
    assert sent["a"] == sent["c"] == 0  # b has to wait for a, so c comes before it
    assert sent["d"] == ended["c"] < ended["a"]
    assert sent["b"] == ended["a"]


def test_the_history_of_a_program_is_cached() -> None:
    first, second = run(program("a", (30, 6, 5.0), (10, 2, 0))).records
    assert first.num_cached_tokens == 0
    # 30 + 6 tokens are known, and the KV of the last one was never computed: 35, of which 8 whole blocks of 4.
    assert second.num_cached_tokens == 32
    assert second.num_prompt_tokens == 46


def test_a_shared_prefix_is_cached_and_nothing_else() -> None:
    values: dict[str, Any] = {"prefix_id": "p", "prefix_tokens": 24}
    shared = run(program("a", (30, 1, 0), **values), program("b", (40, 1, 0), depends_on=("a",), **values))
    assert [r.num_cached_tokens for r in shared.records] == [0, 24]
    # One with less of the prefix, asked for first, and one of another prefix.
    short: dict[str, Any] = {"prefix_id": "p", "prefix_tokens": 9}
    other: dict[str, Any] = {"prefix_id": "q", "prefix_tokens": 24}
    mixed = run(
        program("a", (30, 1, 0), **short),
        program("b", (40, 1, 0), depends_on=("a",), **values),
        program("c", (40, 1, 0), depends_on=("b",), **other),
    )
    assert [r.num_cached_tokens for r in mixed.records] == [0, 8, 0]


def test_a_failed_call_ends_its_program_and_nothing_else() -> None:
    result = run(
        program("a", (30, 4, 0), (300, 4, 0), (5, 5, 0)),
        program("b", (10, 2, 0), depends_on=("a",)),
        num_agents=1,
        max_model_len=64,
    )
    assert [(r.program_id, r.turn_index) for r in result.records] == [("a", 0), ("a", 1), ("b", 0)]
    assert result.records[1].error == "the prompt has 334 tokens; it must have at least 1 and fewer than 64"
    assert result.records[2].error is None


def test_an_output_that_does_not_fit_the_window_is_an_error() -> None:
    (one,) = run(program("a", (60, 10, 0)), max_model_len=64).records
    assert one.error == "4 of 10 tokens: the window is full"
    assert one.num_output_tokens == 4


def test_batches_are_on_the_time_line() -> None:
    result = run(program("a", (40, 30, 0)), program("b", (40, 3, 0), arrival_ms=200.0))
    # The prompts, and the new tokens but each first one, which comes with the end of its prompt.
    assert sum(span.num_cold_tokens for span in result.batches) == 80
    assert sum(span.num_decodes for span in result.batches) == 29 + 2
    assert sum(span.num_resume_tokens for span in result.batches) == 0
    assert {name for span in result.batches for name in span.cold_program_ids} == {"a", "b"}
    for lane in Lane:
        of_lane = [span for span in result.batches if span.lane is lane]
        assert all(before.finished_ns <= after.started_ns for before, after in pairwise(of_lane))
    assert [span.started_ns for span in result.batches] == sorted(span.started_ns for span in result.batches)
    # Every token came at the end of a batch.
    ends = Counter(span.finished_ns for span in result.batches)
    assert all(ends[at_ns] for r in result.records for at_ns in r.token_ns)


def test_times_count_from_where_the_clock_stands() -> None:
    workload = Workload("test", (program("a", (8, 3, 1.0), (8, 2, 0)),), 1)
    late = driver()
    late.clock.advance_to(5_000 * MS)
    fresh = simulate(workload, driver())
    assert simulate(workload, late).records == fresh.records
    # The same driver again: all of the first prompt but the token that must be computed is cached now.
    again = simulate(workload, late).records
    assert again[0].num_cached_tokens == 4
    assert again[0].sent_ns == 0
