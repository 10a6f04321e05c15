"""Who runs when, what is sent, and what is recorded of it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from aiohttp import web

from agentserve.sim.metrics import TurnRecord, summarize
from agentserve.sim.programs import Program, Turn, Workload
from bench.load.checks import find_doubts
from bench.load.client import ChatClient
from bench.load.driver import LoadRun, RunOptions, run_workload, warm_up
from bench.load.endpoint import Endpoint, NamedWorkload, isolated
from bench.load.errors import EndpointError
from bench.load.prompts import Calibration, Conversation, calibrate, planned_prompt_tokens
from bench.load.results import ServerInfo
from tests.bench.fake_endpoint import FakeServer, chunk, serving, sse
from tests.server.test_end_to_end import serve

CALIBRATION = Calibration(tokens_per_word=2.0, first_overhead=10.0, turn_overhead=6.0)
"""Of the fake server: 4 + 2 messages x 3, and 2 x 3 more for each further turn."""


def program(name: str, *turns: tuple[int, int], **options: Any) -> Program:
    return Program(name, tuple(Turn(append, output) for append, output in turns), **options)


async def run(
    server: FakeServer, programs: Sequence[Program], num_agents: int | None = None, **options: Any
) -> LoadRun:
    async with serving(server), ChatClient(server.base_url, model="m") as client:
        workload = Workload("test", tuple(programs), num_agents, seed=3)
        return await run_workload(workload, client, CALIBRATION, RunOptions("s", **options))


async def test_three_probes_find_what_tokenizer_and_template_add() -> None:
    async with serving(FakeServer()) as server, ChatClient(server.base_url, model="m") as client:
        assert await calibrate(client, seed=1) == CALIBRATION
        await warm_up(client, CALIBRATION, "1")
    # 3 probes; a prompt of 512 tokens = 256 words and a word of the user; 3 of 64 tokens.
    warm = [len(body["messages"][0]["content"].split()) for body in server.bodies[3:]]
    assert warm == [256, 32, 32, 32]


async def test_prompts_have_the_planned_tokens_and_the_history_the_answers() -> None:
    server = FakeServer()
    result = await run(server, [program("a", (100, 5), (40, 3), (7, 2))], 1)
    # 100; 100 + 2 x 5 words of answer + 40; ... The server makes 2 tokens of each word of its answer.
    assert [r.num_prompt_tokens for r in result.records] == [100, 150, 164]
    assert [r.num_output_tokens for r in result.records] == [5, 3, 2]
    first, second, third = (body["messages"] for body in server.bodies)
    assert [message["role"] for message in third] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert third[:3] == second[:3] and second[:2] == first
    assert third[2]["content"] == "w1 w2 w3 w4 w5 "
    assert set(server.sessions) == {"s/a"}


def test_programs_share_their_prefix_and_nothing_else() -> None:
    def words(name: str, seed: str = "s", **options: Any) -> list[str]:
        conversation = Conversation(program(name, (200, 1), **options), CALIBRATION, seed)
        messages = conversation.begin_turn(0)
        return f"{messages[0]['content']} {messages[1]['content']}".split()

    shared: dict[str, Any] = {"prefix_id": "p", "prefix_tokens": 80}
    a, b, alone = words("a", **shared), words("b", **shared), words("a")
    assert a[:40] == b[:40] and a[40:44] != b[40:44]
    assert len(a) == len(alone) == 95  # (200 - 10) / 2
    assert alone[:4] != a[:4]
    assert words("a", **shared) == a
    assert words("a", "other", **shared)[:4] != a[:4]


async def test_agents_take_programs_in_order_and_wait_for_what_they_depend_on() -> None:
    server = FakeServer()
    programs = [
        program("a", (50, 2)),
        program("b", (50, 2), depends_on=("d",)),
        program("c", (50, 2)),
        program("d", (50, 2)),
    ]
    result = await run(server, programs, 2)
    assert server.max_running == 2
    assert server.sessions[:2] == ["s/a", "s/c"]
    assert server.sessions[2:] == ["s/d", "s/b"]
    by_id = {record.program_id: record for record in result.records}
    assert by_id["b"].sent_ns >= by_id["d"].finished_ns


async def test_a_failed_call_ends_its_program_and_starts_what_depends_on_it() -> None:
    server = FakeServer()

    async def answer(body: dict[str, Any], response: web.StreamResponse) -> None:
        if len(server.bodies) == 1:
            await response.write(sse({"error": {"message": "no"}}))
        else:
            await server.stream(body, response)

    server.answer = answer
    programs = [program("a", (50, 2), (20, 2)), program("b", (50, 2), depends_on=("a",))]
    result = await run(server, programs, 1)
    assert [(r.program_id, r.turn_index, r.error) for r in result.records] == [("a", 0, "server: no"), ("b", 0, None)]
    summary = summarize(result.records)
    assert (summary.all.num_turns, summary.all.num_errors) == (1, 1)


async def test_an_answer_that_ends_early_is_an_error() -> None:
    server = FakeServer()

    async def stop(body: dict[str, Any], response: web.StreamResponse) -> None:
        await response.write(sse(chunk("a", 1, finish="stop")) + b"data: [DONE]\n\n")

    server.answer = stop
    result = await run(server, [program("a", (50, 9))], 1)
    assert result.records[0].error == "it stopped after 1 of 9 tokens"


async def test_arrivals_and_tool_gaps_are_waited_for() -> None:
    turns = (Turn(30, 2, tool_gap_ms=20.0), Turn(30, 2))
    result = await run(FakeServer(), [Program("a", turns, arrival_ms=15.0)])
    first, second = result.records
    assert first.sent_ns >= 15_000_000
    assert second.sent_ns - first.finished_ns >= 20_000_000


async def test_a_victim_is_cut_when_all_others_are_done() -> None:
    server, cut = FakeServer(), asyncio.Event()

    async def answer(body: dict[str, Any], response: web.StreamResponse) -> None:
        if body["max_tokens"] < 1000:
            await server.stream(body, response)
            return
        await response.write(sse(chunk("a", 1)) + sse(chunk("b", 2)))
        await cut.wait()

    server.answer = answer
    programs = [
        program("v", (20, 1000), role="victim", arrival_ms=0.0),
        program("x", (60, 2), role="attacker", arrival_ms=5.0),
    ]
    async with asyncio.timeout(20):
        result = await run(server, programs, cut_after_s=0.01)
        cut.set()
    attacker, victim = result.records
    assert (attacker.program_id, victim.program_id) == ("x", "v")
    assert victim.error is None
    assert (victim.num_output_tokens, len(victim.token_ns)) == (2, 2)
    assert victim.finished_ns >= attacker.finished_ns + 10_000_000


async def test_a_server_that_is_gone_ends_the_run() -> None:
    server = FakeServer()
    async with serving(server):
        pass  # it has listened and does no more
    async with ChatClient(server.base_url, model="m") as client:
        workload = Workload("test", tuple(program(str(i), (20, 1)) for i in range(5)), 2)
        result = await run_workload(workload, client, CALIBRATION, RunOptions("s"))
        with pytest.raises(EndpointError, match="the isolated run failed"):
            await Endpoint(client, ServerInfo("n", "l", "k"), CALIBRATION).isolated_slo(
                NamedWorkload("t", workload), 2.0
            )
    assert result.aborted is not None and "nobody listens" in result.aborted
    assert find_doubts(result, workload)[0].startswith("the run was aborted")


def test_isolated_programs_are_few_and_cold() -> None:
    shared = {"prefix_id": "p", "prefix_tokens": 10, "depends_on": ("v",), "arrival_ms": 5.0}
    victim = program("v", (20, 5), role="victim")
    programs = (victim, *(program(str(i), *[(30, 2)] * 9, **shared) for i in range(7)))
    alone = isolated(Workload("w", programs, None, seed=4))
    assert (alone.num_agents, alone.seed, [p.program_id for p in alone.programs]) == (1, 4, ["0", "1", "2"])
    for item in alone.programs:
        assert len(item.turns) == 4
        assert (item.prefix_id, item.prefix_tokens, item.depends_on, item.arrival_ms) == (None, 0, (), None)


def record(program_id: str = "a", **changes: Any) -> TurnRecord:
    values: dict[str, Any] = {
        "program_id": program_id, "turn_index": 0, "role": "agent", "num_turns": 1, "num_prompt_tokens": 100,
        "num_cached_tokens": 0, "num_output_tokens": 3, "sent_ns": 0, "token_ns": (10, 20, 30), "finished_ns": 31,
    }  # fmt: skip
    return TurnRecord(**(values | changes))


@pytest.mark.parametrize(
    ("records", "changes", "doubt"),
    [
        ([record()], {}, None),
        ([record(error="timeout")], {}, "1 of 1 calls failed; the first: timeout"),
        ([record(token_ns=(10, 10, 10))], {}, "100% of the tokens came together"),
        ([record(num_prompt_tokens=150)], {}, "prompts have 1.50 times the tokens"),
        ([record(num_cached_tokens=90)], {}, "1 first prompts were in the server's cache already"),
        ([record()], {"num_inexact": 1}, "1 calls came without token counts"),
        ([record()], {"client_lag_ns": [50_000_000]}, "the client itself woke up 50 ms late"),
        (
            [record(role="victim"), record(role="attacker", sent_ns=15, token_ns=(40, 41, 42), finished_ns=43)],
            {},
            "the victim's stream ended before the attack did",
        ),
    ],
)
def test_doubts(records: list[TurnRecord], changes: dict[str, Any], doubt: str | None) -> None:
    workload = Workload("w", (program("a", (100, 3)),), 1)
    doubts = find_doubts(LoadRun(records=records, **changes), workload)
    assert [text[: len(doubt or "")] for text in doubts] == ([doubt] if doubt else [])


async def test_planned_tokens_count_all_that_came_before() -> None:
    workload = Workload("w", (program("a", (100, 5), (40, 3), (7, 2)),), 1)
    assert planned_prompt_tokens(workload) == {("a", 0): 100, ("a", 1): 145, ("a", 2): 155}


async def test_our_daemon_says_all_that_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    # This is about the daemon: what else goes on where the tests run is not.
    monkeypatch.setattr("bench.load.endpoint.StolenTime.share", lambda _: 0.0)
    programs = tuple(program(f"p{i}", (300, 6), (100, 4)) for i in range(3))
    async with (
        serve(max_model_len=4096, num_blocks=4096, resume_min_cached_tokens=64) as daemon,
        ChatClient(f"{daemon.url}/v1") as client,
    ):
        endpoint = await Endpoint.prepare(client, ServerInfo("ours", "agentserve", "agentserve"), seed=1)
        result = await endpoint.run(NamedWorkload("test", Workload("test", programs, 2, seed=1)))
    assert result.server.model == "m" and result.server.version != "unknown"
    # Client and server share a process here, so the client may well lack processor time.
    assert [d for d in result.doubts if not d.startswith("the client itself") and "came together" not in d] == []
    assert result.work_classes == {"cold_prefill": 3, "resume_prefill": 3}
    assert [len(r.token_ns) for r in result.records] == [r.num_output_tokens for r in result.records]
    for r in result.records:
        assert r.num_cached_tokens is not None
        # The second prompt: the first one and the answer but for its last token were computed before, in blocks of 4.
        assert r.num_cached_tokens >= (0 if r.is_cold else 280)
        assert r.num_cached_tokens < (32 if r.is_cold else r.num_prompt_tokens)
