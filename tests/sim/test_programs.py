"""Programs: validation and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentserve.errors import WorkloadError
from agentserve.sim.programs import Program, Turn, Workload, dump_programs, load_programs

TURN = Turn(10, 2)
NAMES = st.text(min_size=1, max_size=5)
DURATIONS = st.floats(0, 1e6) | st.integers(0, 10**6)


@st.composite
def turns(draw: st.DrawFn, index: int, num_before: int, block_tokens: int) -> Turn:
    append_tokens = draw(st.integers(1, 50))
    num_blocks = -(-append_tokens // block_tokens) if block_tokens and draw(st.booleans()) else 0
    return Turn(
        append_tokens,
        draw(st.integers(1, 50)),
        draw(DURATIONS),
        tool_name=draw(st.none() | NAMES),
        keep_tokens=draw(st.none() | st.integers(0, num_before)),
        block_ids=tuple(draw(st.lists(st.integers(0, 99), min_size=num_blocks, max_size=num_blocks))),
        arrival_ms=draw(st.none() | DURATIONS) if index else None,
    )


@st.composite
def programs(draw: st.DrawFn) -> Program:
    block_tokens = draw(st.sampled_from([0, 7, 16]))
    items: list[Turn] = []
    num_before = 0
    for index in range(draw(st.integers(1, 3))):
        items.append(draw(turns(index, num_before, block_tokens)))
        kept = num_before if items[-1].keep_tokens is None else items[-1].keep_tokens
        num_before = kept + items[-1].append_tokens + items[-1].output_tokens
    prefix_tokens = 0 if items[0].block_ids else draw(st.integers(0, items[0].append_tokens))
    program_id = draw(NAMES)
    depends_on = tuple(draw(st.lists(NAMES.filter(lambda name: name != program_id), unique=True, max_size=2)))
    return Program(
        program_id,
        tuple(items),
        prefix_id=draw(NAMES) if prefix_tokens else None,
        prefix_tokens=prefix_tokens,
        arrival_ms=draw(st.none() | DURATIONS),
        depends_on=depends_on,
        role=draw(NAMES),
        dependency_gaps_ms=draw(st.just(()) | st.tuples(*[DURATIONS for _ in depends_on])),
        block_tokens=block_tokens,
    )


@given(st.lists(programs(), min_size=1, max_size=4, unique_by=lambda program: program.program_id))
def test_a_file_gives_back_what_was_written(tmp_path_factory: pytest.TempPathFactory, items: list[Program]) -> None:
    path = tmp_path_factory.mktemp("programs") / "programs.jsonl"
    dump_programs(items, path)
    assert load_programs(path) == tuple(items)
    assert len(path.read_bytes().split(b"\n")) == len(items) + 1


def test_fields_with_their_default_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "programs.jsonl"
    dump_programs([Program("a", (Turn(9, 3),))], path)
    assert path.read_text() == '{"program_id":"a","turns":[{"append_tokens":9,"output_tokens":3}]}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "expected a JSON object: "),
        ("[]", "expected a program as a JSON object, not []"),
        ('{"program_id": "a"}', "turns: expected in every program, but it is missing"),
        ('{"program_id": "a", "turns": []}', "turns: expected a list of at least one turn, not []"),
        ('{"program_id": "a", "turns": [7]}', "turns[0].expected a turn as a JSON object, not 7"),
        ('{"program_id": "", "turns": [TURN]}', "program_id: expected a text that is not empty, not ''"),
        (
            '{"program_id": "a", "turns": [TURN, {"append_tokens": "x", "output_tokens": 1}]}',
            "turns[1].append_tokens: expected a whole number of at least 1, not 'x'",
        ),
        (
            '{"program_id": "a", "turns": [{"append_tokens": true, "output_tokens": 1}]}',
            "turns[0].append_tokens: expected a whole number of at least 1, not True",
        ),
        (
            '{"program_id": "a", "turns": [{"append_tokens": 1, "output_tokens": 1, "tool_gap_ms": NaN}]}',
            "turns[0].tool_gap_ms: expected milliseconds, 0 or more, not nan",
        ),
        ('{"program_id": "a", "turns": [TURN], "rolle": "x"}', "rolle: expected only the fields program_id, turns, "),
        (
            '{"program_id": "a", "turns": [TURN], "prefix_id": "p", "prefix_tokens": 11}',
            "prefix_tokens: expected at most the 10 tokens of the first turn, not 11",
        ),
        (
            '{"program_id": "a", "turns": [TURN], "prefix_tokens": 1}',
            "prefix_tokens: expected 0, because there is no prefix_id, not 1",
        ),
        (
            '{"program_id": "a", "turns": [TURN], "depends_on": ["a"]}',
            "depends_on: expected other programs, each once, not ['a']",
        ),
        (
            '{"program_id": "a", "turns": [TURN], "depends_on": ["b"], "dependency_gaps_ms": [1, 2]}',
            "dependency_gaps_ms: expected 1 as in depends_on, or none, not (1, 2)",
        ),
        (
            '{"program_id": "a", "turns": [TURN, {"append_tokens": 1, "output_tokens": 1, "keep_tokens": 13}]}',
            "turns[1].keep_tokens: expected at most the 12 tokens before it, not 13",
        ),
        (
            '{"program_id": "a", "turns": [{"append_tokens": 33, "output_tokens": 1, "block_ids": [4, 5]}]}',
            "block_tokens: expected at least 1, because turns[0] has block_ids, not 0",
        ),
        (
            '{"program_id": "a", "block_tokens": 16, '
            '"turns": [{"append_tokens": 33, "output_tokens": 1, "block_ids": [4, 5]}]}',
            "turns[0].block_ids: expected 3 blocks of 16 tokens for 33 tokens, not 2",
        ),
        (
            '{"program_id": "a", "turns": [{"append_tokens": 1, "output_tokens": 1, "block_ids": [-4]}]}',
            "turns[0].block_ids: expected whole numbers from 0 to 1048575999999999999, not -4",
        ),
        (
            '{"program_id": "a", "turns": [{"append_tokens": 1, "output_tokens": 1, "arrival_ms": 4}]}',
            "turns[0].arrival_ms: expected none, it is the program's arrival_ms",
        ),
        (
            '{"program_id": "a", "prefix_id": "p", "prefix_tokens": 1, "block_tokens": 4, '
            '"turns": [{"append_tokens": 1, "output_tokens": 1, "block_ids": [4]}]}',
            "prefix_id: expected none, because the first turn has block_ids",
        ),
        (
            '{"program_id": "a", "turns": "' + 200 * "x" + '"}',
            f"turns: expected a list of at least one turn, not '{76 * 'x'}...",
        ),
        (
            '{"program_id": "a", "turns": [TURN], "depends_on": "b"}',
            "depends_on: expected a list of program ids, not 'b'",
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "programs.jsonl"
    turn = '{"append_tokens": 10, "output_tokens": 2}'
    path.write_text(f'{{"program_id": "good", "turns": [{turn}]}}\n\n{line.replace("TURN", turn)}\n')
    with pytest.raises(WorkloadError) as caught:
        load_programs(path)
    assert str(caught.value).startswith(f"{path}:3: {message}")


def test_files_without_programs(tmp_path: Path) -> None:
    path = tmp_path / "programs.jsonl"
    with pytest.raises(WorkloadError, match="cannot read"):
        load_programs(path)
    path.write_text("\n")
    with pytest.raises(WorkloadError, match="expected at least one program"):
        load_programs(path)
    path.write_text('{"program_id": "a", "turns": [{"append_tokens": 1, "output_tokens": 1}]}\n' * 2)
    with pytest.raises(WorkloadError, match=r":2: program_id: 'a' occurs twice"):
        load_programs(path)


@pytest.mark.parametrize(
    ("depends_on", "values", "message"),
    [
        ({}, {"num_agents": 0}, "num_agents: expected a whole number of at least 1, not 0"),
        ({"a": ("x",)}, {}, "program 'a': depends_on: there is no program 'x'"),
        ({"a": ("b",), "b": ("c",), "c": ("a",)}, {}, "these programs wait for each other: a, b, c"),
        # d waits for the circle, so it never starts either.
        ({"a": ("b",), "b": ("a",), "d": ("a",)}, {}, "these programs wait for each other: a, b, d"),
    ],
)
def test_workloads_that_cannot_run(
    depends_on: dict[str, tuple[str, ...]], values: dict[str, Any], message: str
) -> None:
    items = tuple(Program(name, (TURN,), depends_on=depends_on.get(name, ())) for name in "abcd")
    with pytest.raises(WorkloadError, match=message):
        Workload(**{"name": "w", "programs": items, "num_agents": 1, **values})


def test_the_window_is_that_of_the_longest_turn() -> None:
    # Prompts 10, 12 + 20, 5 + 3, and 8 + 1 + 30: what was cut off does not come back.
    items = (TURN, Turn(20, 5), Turn(3, 1, keep_tokens=5), Turn(30, 4))
    program = Program("a", items)
    assert program.num_prompt_tokens == (10, 32, 8, 39)
    assert program.num_context_tokens == 43
    assert not program.is_linear
    assert Program("a", items[:2]).is_linear


def test_a_closed_loop_has_no_arrivals() -> None:
    later = Program("a", (TURN, Turn(1, 1, arrival_ms=3.0)))
    with pytest.raises(WorkloadError, match="expected none in a closed loop of 2 agents"):
        Workload("w", (later,), 2)
    program = Program("a", (TURN,), arrival_ms=5.0)
    assert Workload("w", (program,), None).num_context_tokens == 12
    with pytest.raises(WorkloadError, match="expected none in a closed loop of 2 agents"):
        Workload("w", (program,), 2)
