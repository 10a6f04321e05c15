"""Each format, small: what becomes of it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from agentserve.errors import WorkloadError
from agentserve.sim.cache_bound import infinite_cache_bound
from agentserve.sim.formats import FORMATS, detect_format, load_workload
from agentserve.sim.orchestrator import simulate
from agentserve.sim.programs import Program, Turn, Workload
from tests.core import builders

MS = 1_000_000
MOONCAKE = {"timestamp": 27482, "input_length": 700, "output_length": 52, "hash_ids": [46, 47]}


def lines(*values: Any) -> list[str]:
    return [json.dumps(value) for value in values]


def load(*values: Any, **options: Any) -> tuple[Program, ...]:
    return load_workload(lines(*values), **options).programs


SAMPLES = {
    "programs": '{"program_id": "a", "turns": [{"append_tokens": 9, "output_tokens": 3}]}',
    "agentservesim": '{"sub_requests": [{"input_toks": 9, "output_toks": 3}]}',
    "mooncake": json.dumps(MOONCAKE),
    "bailian": '{"chat_id": 1, "timestamp": 0, "input_length": 9, "output_length": 3, "hash_ids": [5]}',
    "splitwise": "arrived_at,num_prefill_tokens,num_decode_tokens\n0.5,9,3",
    "azure": "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,9,3",
}


@pytest.mark.parametrize("name", SAMPLES)
def test_the_format_is_seen_from_the_content(tmp_path: Path, name: str) -> None:
    text = SAMPLES[name]
    assert detect_format(text.splitlines()) == name
    plain = load_workload(text.splitlines())
    assert plain.description == f"1 programs with 1 turns of lines, format {name}"
    assert load_workload(text.splitlines(), format=name) == plain
    (program,) = plain.programs
    assert program.turns[0].output_tokens == (52 if name == "mooncake" else 3)
    for path, data in (
        (tmp_path / "trace.x.gz", gzip.compress(text.encode())),
        (tmp_path / "bom", b"\xef\xbb\xbf" + text.encode()),
        (tmp_path / "empty-lines", f"\n\n{text}\n\n".replace("\n", "\r\n").encode()),
    ):
        path.write_bytes(data)
        found = load_workload(path)
        assert (found.name, found.programs) == (path.name.partition(".")[0], plain.programs)
    assert set(SAMPLES) | {"recording"} == set(FORMATS)


def test_mooncake_requests_arrive_with_their_blocks() -> None:
    (program,) = load(MOONCAKE)
    assert program == Program(
        "request-00000", (Turn(700, 52, block_ids=(46, 47)),), arrival_ms=27482.0, block_tokens=512
    )


def test_a_closed_loop_drops_the_times_and_says_so() -> None:
    workload = load_workload(lines(MOONCAKE, MOONCAKE), num_agents=2, seed=7)
    assert (workload.num_agents, workload.seed) == (2, 7)
    assert [p.arrival_ms for p in workload.programs] == [None, None]
    assert workload.notes == ("2 arrival times are not used in a closed loop",)
    assert len(load(MOONCAKE, MOONCAKE, MOONCAKE, limit=2)) == 2


def test_what_a_record_says_beyond_that_is_noted() -> None:
    odd = MOONCAKE | {"output_length": 0, "user": 3}
    workload = load_workload(lines(odd, odd, MOONCAKE))
    assert [p.turns[0].output_tokens for p in workload.programs] == [1, 1, 52]
    assert workload.notes == (
        "2 requests without an output generate 1 token, so that their prompts are computed",
        "2 values of the field 'user' are not used",
    )


# ---- Qwen-Bailian ----


def chat(chat_id: int, parent: int, at_s: float, num_tokens: int, *hash_ids: int, **values: Any) -> dict[str, Any]:
    return {
        "chat_id": chat_id,
        "parent_chat_id": parent,
        "timestamp": at_s,
        "input_length": num_tokens,
        "output_length": 2,
        "hash_ids": list(hash_ids),
        **values,
    }


def test_conversations_of_bailian_are_chained() -> None:
    workload = load_workload(
        lines(
            chat(8, -1, 0.5, 20, 1, 2, type="text", turn=1),
            chat(9, 8, 61.25, 33, 1, 3, 4),
            chat(5, -1, 2.0, 16, 7),
            chat(6, 8, 70.0, 40, 1, 3),  # a second answer to the same one; its last 8 tokens have no id
            chat(7, 99, 3.0, 10, 1),
        )
    )
    first, other, unknown, branch = workload.programs
    assert [p.program_id for p in workload.programs] == ["chat-8", "chat-5", "chat-7", "chat-6"]
    assert first.arrival_ms == 500.0
    assert first.turns == (
        Turn(20, 2, block_ids=(1, 2)),
        Turn(33, 2, keep_tokens=0, block_ids=(1, 3, 4), arrival_ms=61250.0),
    )
    assert first.num_context_tokens == 35
    assert other.turns == (Turn(16, 2, block_ids=(7,)),)
    assert (unknown.arrival_ms, branch.arrival_ms) == (3000.0, 70000.0)
    assert branch.turns == (Turn(40, 2, block_ids=(1, 3, 8)),)  # 8: an id that nobody else has
    assert workload.notes == (
        "1 values of the field 'type' are not used",
        "1 values of the field 'turn' are not used",
        "1 requests continue one that is not before them in the file; they begin programs of their own",
        "1 requests continue one that was continued already; they begin programs of their own",
        "1 prompts end in a partial block without a hash id; nobody shares it",
    )


def test_bailian_turns_start_at_their_time_or_when_the_one_before_has_ended() -> None:
    workload = load_workload(
        lines(chat(1, -1, 0.0, 40, 1, 2, 3), chat(2, 1, 0.001, 48, 1, 2, 4), chat(3, 2, 90.0, 33, 1, 2, 5))
    )
    records = simulate(workload, builders.virtual(num_blocks=256, block_size=16, max_model_len=512)).records
    assert records[1].sent_ns == records[0].finished_ns > MS
    assert records[2].sent_ns == 90_000 * MS
    bound = infinite_cache_bound(workload, engine_block_size=16)
    assert [r.num_cached_tokens for r in records] == [0, 32, 32] == list(bound.hit_tokens.values())
    assert [r.num_prompt_tokens for r in records] == [40, 48, 33]


# ---- CSV ----


def test_csv_columns_may_stand_in_any_order() -> None:
    rows = ["num_decode_tokens, arrived_at,num_prefill_tokens,extra", "3,0.5,9,x", "4,1.25,70,y"]
    workload = load_workload(rows)
    assert [(p.arrival_ms, p.turns) for p in workload.programs] == [(500.0, (Turn(9, 3),)), (1250.0, (Turn(70, 4),))]
    assert workload.notes == ("2 values of the field 'extra' are not used",)


def test_azure_times_count_from_the_first() -> None:
    header = "TIMESTAMP,ContextTokens,GeneratedTokens"
    rows = [header, "2023-11-16 18:15:46.6805900,374,44", "2023-11-16 18:15:50.9951690,396,109"]
    # 50.995169 - 46.680590 = 4.314579 s
    assert [p.arrival_ms for p in load_workload(rows).programs] == [0.0, 4314.579]
    zones = [header, "2024-05-12 00:00:01+00:00,5,1", "2024-05-12 02:00:00.5+02:00,5,1"]
    assert [p.arrival_ms for p in load_workload(zones).programs] == [500.0, 0.0]


# ---- AgentServeSim ----


def call(num_tokens: int, num_outputs: int, gap_ms: float = 0.0, **values: Any) -> dict[str, Any]:
    return {
        "input_toks": num_tokens,
        "output_toks": num_outputs,
        "tool_duration_ns": round(gap_ms * MS),
        **values,
    }


def with_ids(ids: list[int], num_outputs: int, **values: Any) -> dict[str, Any]:
    return call(len(ids), num_outputs, input_tok_ids=ids, **values)


def test_sessions_of_agentservesim_grow() -> None:
    session = {
        "session_id": "s",
        "arrival_time_ns": 4_059_740,
        "sub_requests": [call(1472, 133, 127.5, tool_name="sed"), call(1705, 125, tool="cat"), call(1700, 5)],
    }
    workload = load_workload(lines(session, {"input_toks": 7, "output_toks": 2, "arrival_time_ns": 5 * MS}))
    grown, flat = workload.programs
    assert grown.arrival_ms == 4.05974
    assert grown.turns == (
        Turn(1472, 133, 127.5, tool_name="sed"),
        Turn(100, 125, tool_name="cat"),  # 1705 - 1472 - 133
        Turn(1, 5, keep_tokens=1699),  # shorter than what was before, so that something was cut; unknown what
    )
    assert grown.num_prompt_tokens == (1472, 1705, 1700)
    assert flat == Program("program-00001", (Turn(7, 2),), arrival_ms=5.0)
    assert workload.notes == (
        "1 prompts are not longer than the conversation before; they are taken to keep the earlier prompt only",
    )


def test_token_ids_say_what_is_kept() -> None:
    start = list(range(100, 140))
    session = {
        "session_id": "s",
        "sub_requests": [
            with_ids(start, 4, output_tok_ids=[1, 2, 3, 4]),
            with_ids([*start, 1, 2, 9, 9], 4),  # half of the output is in it
            with_ids([*start, 1, 2, 9, 9, *range(10)], 4),  # longer by 10: the output, and 6 more
            with_ids([*start[:20], 7, 7], 3),  # cut after 20
            with_ids([*start[:20], 7, 7, 8], 1),  # too short for the output before
        ],
    }
    workload = load_workload(lines(session))
    assert [(t.keep_tokens, t.append_tokens) for t in workload.programs[0].turns] == [
        (None, 40),
        (42, 2),
        (None, 6),
        (20, 2),
        (22, 1),
    ]
    assert workload.programs[0].num_prompt_tokens == (40, 44, 54, 22, 23)
    assert workload.notes == ("1 prompts are too short to have the output before in them; it is taken to be left out",)


def test_what_is_kept_is_found_in_the_cache() -> None:
    program = Program("a", (Turn(30, 6), Turn(10, 2, keep_tokens=21), Turn(5, 1)))
    driver = builders.virtual(num_blocks=256, block_size=4, max_model_len=512)
    records = simulate(Workload("w", (program,), None), driver).records
    # 21 tokens are 5 whole blocks of 4. Then 31 + 2 are known, without the KV of the last one: 8 blocks.
    assert [(r.num_prompt_tokens, r.num_cached_tokens) for r in records] == [(30, 0), (31, 20), (38, 32)]


def test_first_prompts_that_begin_alike_share_a_prefix() -> None:
    start = list(range(32))
    programs = load(
        {"session_id": "a", "sub_requests": [with_ids([*start, 99], 1)]},
        {"session_id": "b", "sub_requests": [with_ids([7] * 40, 1)]},
        {"session_id": "c", "sub_requests": [with_ids([*start, 98, 97], 1)]},
    )
    assert [(p.prefix_id, p.prefix_tokens) for p in programs] == [("prefix-0000", 32), (None, 0), ("prefix-0000", 32)]


def test_streaming_sessions_hold_new_tokens_only() -> None:
    (program,) = load({"input_mode": "streaming-deltas", "sub_requests": [call(50, 5), call(20, 3)]})
    assert program.num_prompt_tokens == (50, 75)


def test_a_workflow_becomes_programs_that_wait_for_each_other() -> None:
    def edge(src: str, dst: str, delay_ms: float = 0.0) -> dict[str, Any]:
        return {"src": src, "dst": dst, "delay_ns": round(delay_ms * MS)}

    names = {"plan": 40, "left": 20, "right": 24, "left2": 30, "join": 16}
    workflow = {
        "workflow_id": "w",
        "arrival_time_ns": 7 * MS,
        "nodes": [{"node_id": name, "input_toks": n, "output_toks": 2, "model": "m"} for name, n in names.items()],
        "edges": [
            edge("plan", "left", 5.0),
            edge("plan", "right"),
            edge("left", "left2", 50.0),
            edge("left2", "join", 300.0),
            edge("right", "join"),
        ],
    }
    workload = load_workload(lines(workflow))
    programs = {p.program_id: p for p in workload.programs}
    assert list(programs) == ["w/plan", "w/left", "w/right", "w/join"]
    # left and left2 only follow each other: 30 - 20 - 2 new tokens, 50 ms later.
    assert programs["w/left"].turns == (Turn(20, 2, 50.0), Turn(8, 2))
    assert (programs["w/left"].depends_on, programs["w/left"].dependency_gaps_ms) == (("w/plan",), (5.0,))
    assert (programs["w/right"].depends_on, programs["w/right"].dependency_gaps_ms) == (("w/plan",), ())
    assert programs["w/join"].depends_on == ("w/left", "w/right")
    assert programs["w/join"].dependency_gaps_ms == (300.0, 0.0)
    assert workload.notes == ("5 values of the field 'nodes.model' are not used",)

    records = simulate(workload, builders.virtual(num_blocks=256, max_model_len=512)).records
    sent = {(r.program_id, r.turn_index): r.sent_ns for r in records}
    ended = {(r.program_id, r.turn_index): r.finished_ns for r in records}
    assert sent["w/plan", 0] == 7 * MS
    assert sent["w/left", 0] == ended["w/plan", 0] + 5 * MS  # fan-out, each after its own gap
    assert sent["w/right", 0] == ended["w/plan", 0]
    assert sent["w/left", 1] == ended["w/left", 0] + 50 * MS
    assert sent["w/join", 0] == ended["w/left", 1] + 300 * MS > ended["w/right", 0]  # fan-in, the last one counts


def test_an_unequal_end_of_a_workflow_counts_with_its_gap() -> None:
    """The program that ends first may be the one that is waited for longest."""
    fast = Program("fast", (Turn(4, 1),))
    slow = Program("slow", (Turn(40, 9),))
    join = Program("join", (Turn(4, 1),), depends_on=("fast", "slow"), dependency_gaps_ms=(60_000.0, 0.0))
    records = {
        r.program_id: r
        for r in simulate(Workload("w", (fast, slow, join), None), builders.virtual(num_blocks=256)).records
    }
    assert records["fast"].finished_ns < records["slow"].finished_ns
    assert records["join"].sent_ns == records["fast"].finished_ns + 60_000 * MS


# ---- errors ----


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (MOONCAKE | {"timestamp": "x"}, "timestamp: expected milliseconds, 0 or more, not 'x'"),
        (MOONCAKE | {"input_length": 0}, "input_length: expected a whole number of at least 1, not 0"),
        (MOONCAKE | {"hash_ids": 4}, "hash_ids: expected a list of whole numbers, not 4"),
        (MOONCAKE | {"hash_ids": [4, True]}, "hash_ids[1]: expected a whole number from 0 to 1048575999999999999, not"),
        (MOONCAKE | {"hash_ids": [4]}, "hash_ids: expected 2 ids for 700 tokens (there are 1), not [4]"),
        ({"timestamp": 1, "hash_ids": []}, "input_length: expected a whole number of at least 1, but it is missing"),
        ([], "expected a JSON object, not []"),
        (chat(1, -1, 0.0, 9, 5), "chat_id: expected each id once, not 1"),
        (chat(2, -1, 0.0, 9, 5, 6), "hash_ids: expected 0 or 1 ids for 9 tokens (there are 2), not [5, 6]"),
        (chat(2, -1, 0.0, 32, 5), "hash_ids: expected 2 ids for 32 tokens (there are 1), not [5]"),
        ({"sub_requests": []}, "sub_requests: expected a list of at least one object, not []"),
        ({"sub_requests": [call(5, 1), 4]}, "sub_requests[1]: expected a JSON object, not 4"),
        (
            {"sub_requests": [call(5, 1), call(5, -1)]},
            "sub_requests[1].output_toks: expected a whole number of at least 0, not -1",
        ),
        (
            {"sub_requests": [call(5, 1, input_tok_ids=[1, 2])]},
            "sub_requests[0].input_tok_ids: expected 5 ids as in input_toks (there are 2), not [1, 2]",
        ),
        (
            {"input_mode": "x", "input_toks": 1, "output_toks": 1},
            "input_mode: expected 'streaming-deltas' or none, not",
        ),
        (
            {"nodes": [call(1, 1)], "edges": [{"src": "0", "dst": "z"}]},
            "edges[0].dst: expected the id of a node, not 'z'",
        ),
        (
            {
                "nodes": [call(1, 1, node_id=c) for c in "abc"],
                "edges": [{"src": "b", "dst": "c"}, {"src": "c", "dst": "b"}],
            },
            "edges: expected no circle, not [{'src': 'b'",
        ),
        (
            {  # b is waited for from outside of the circle, too
                "nodes": [call(1, 1, node_id=c) for c in "abcd"],
                "edges": [{"src": x, "dst": y} for x, y in ("ab", "bc", "cb", "cd")],
            },
            "edges: expected no circle, not [{'src': 'a'",
        ),
        ({"nodes": [call(1, 1, node_id="a")] * 2}, "nodes[1].node_id: expected each id once, not 'a'"),
    ],
)
def test_a_bad_record_is_named(tmp_path: Path, value: Any, message: str) -> None:
    path = tmp_path / "trace.jsonl"
    good: Any = MOONCAKE
    if isinstance(value, dict) and "chat_id" in value:
        good = chat(1, -1, 0.0, 9, 5)
    elif isinstance(value, dict) and not {"input_toks", "sub_requests", "nodes"}.isdisjoint(value):
        good = {"input_toks": 1, "output_toks": 1}
    path.write_text("\n\n".join(lines(good, value)))
    with pytest.raises(WorkloadError) as caught:
        load_workload(path)
    assert str(caught.value).startswith(f"{path}:3: {message}")
    assert len(str(caught.value)) < len(str(path)) + 240


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["arrived_at,num_prefill_tokens", "1,2"], ":1: expected a header with the column num_decode_tokens, not arr"),
        (["TIMESTAMP,ContextTokens,GeneratedTokens", "1,2"], ":2: expected 3 values as in the header, not 2"),
        (
            ["TIMESTAMP,ContextTokens,GeneratedTokens", "x,2,3"],
            ":2: TIMESTAMP: expected a time such as 2023-11-16 18:15:46.680590, not 'x'",
        ),
        (
            ["arrived_at,num_prefill_tokens,num_decode_tokens", "0,1.5,3"],
            ":2: num_prefill_tokens: expected a whole number of at least 1, not 1.5",
        ),
        (
            ["arrived_at,num_prefill_tokens,num_decode_tokens", "nan,1,3"],
            ":2: arrived_at: expected seconds, 0 or more, not nan",
        ),
        (["arrived_at,num_prefill_tokens,num_decode_tokens"], ": expected at least one record of the format splitwise"),
        (["{}"], ":1: expected one of these formats: programs: "),
        (["{"], ":1: expected a JSON object: "),
        ([], ":1: expected one of these formats: "),
    ],
)
def test_a_bad_file_is_named(rows: list[str], message: str) -> None:
    with pytest.raises(WorkloadError) as caught:
        load_workload(rows)
    assert str(caught.value).startswith(f"lines{message}")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for name, data in (("cut.gz", gzip.compress(b"x" * 5000)[:-12]), ("binary", b"{\xff\xfe}")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(WorkloadError, match=f"cannot read .*{name}"):
            load_workload(tmp_path / name)
    with pytest.raises(WorkloadError, match=r"cannot read .*none"):
        load_workload(tmp_path / "none")
    with pytest.raises(WorkloadError, match="there is no format 'x'; there are auto, programs, "):
        load_workload(lines(MOONCAKE), format="x")
    with pytest.raises(WorkloadError, match="limit: expected at least 1, not 0"):
        load_workload(lines(MOONCAKE), limit=0)
    with pytest.raises(WorkloadError, match="a recording is read from a plain file"):
        load_workload(['{"version": 2, "config": {}}'])
