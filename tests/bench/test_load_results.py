"""Results on disk, tables, figures, and the verbs of the command line."""

from __future__ import annotations

import asyncio
import io
import json
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from agentserve.sim.metrics import Slo, TurnRecord
from bench.load.checks import StolenTime, find_theft
from bench.load.cli import main
from bench.load.errors import BenchError
from bench.load.headline import Headline, frontier_points
from bench.load.plots import best_of, draw_all
from bench.load.results import Results, RunResult, ServerInfo, load, save
from bench.load.tables import print_dominance, print_tables
from bench.load.workloads import WorkloadSpec
from tests.bench.fake_endpoint import FakeServer, serving

MS = 1_000_000
OURS = ServerInfo("ours", "agentserve", "agentserve")
OURS_SLOW = ServerInfo("ours-2", "agentserve", "agentserve", "TPOT 9 ms")
PEER = ServerInfo("peer", "peer", "peer")
CONDITIONS = {"machine": "a box", "commit": "abc", "date": "2026-01-01"}


def record(program_id: str, role: str, sent_ms: int, token_ms: tuple[int, ...], **changes: Any) -> TurnRecord:
    values: dict[str, Any] = {
        "program_id": program_id, "turn_index": 0, "role": role, "num_turns": 1, "num_prompt_tokens": 10,
        "num_cached_tokens": 5, "num_output_tokens": len(token_ms), "sent_ns": sent_ms * MS,
        "token_ns": tuple(t * MS for t in token_ms), "finished_ns": token_ms[-1] * MS,
    }  # fmt: skip
    return TurnRecord(**(values | changes))


def result(server: ServerInfo, gap_ms: int, ttft_ms: int, *, round_index: int = 0, **changes: Any) -> RunResult:
    """A victim with tokens at 0, 10 and 20 ms and then every `gap_ms`; an attack from 20 ms on."""
    stream = (0, 10, 20, *(20 + gap_ms * i for i in range(1, 5)))
    values: dict[str, Any] = {
        "server": server, "workload": "victim_attacker (2 agents)", "description": "d", "round": round_index,
        "seed": round_index, "num_agents": None, "slo": Slo(100.0 * MS, 15.0 * MS), "calibration": {},
        "started_at": "now", "load_average": 0.0, "duration_s": 1.0, "client_lag_p99_ms": 0.1, "work_classes": {},
        "doubts": (),
        "records": (record("v", "victim", 0, stream), record("a", "attacker", 20, (20 + ttft_ms, 20 + ttft_ms + 1))),
    }  # fmt: skip
    return RunResult(**(values | changes))


def results(*runs: RunResult) -> Results:
    return Results(CONDITIONS, runs)


def test_results_come_back_from_disk_as_they_were(tmp_path: Path) -> None:
    whole = results(result(OURS, 12, 40), result(PEER, 90, 50, doubts=("a doubt",), slo=None))
    path = save(whole, tmp_path)
    assert load([tmp_path]) == load([path]) == whole
    stored = json.loads(path.read_text(encoding="utf-8"))["runs"][0]
    assert stored["records"][1]["token_ns"] == [60 * MS, 61 * MS]
    assert stored["summary"]["num_output_tokens"] == 9
    assert not path.with_suffix(".tmp").exists()


def test_results_of_several_runs_are_one_comparison(tmp_path: Path) -> None:
    save(results(result(OURS, 12, 40)), tmp_path / "a")
    save(results(result(PEER, 90, 50)), tmp_path / "b")
    assert [server.name for server in load([tmp_path / "a", tmp_path / "b"]).servers] == ["ours", "peer"]
    with pytest.raises(BenchError, match="repeats round 0 of ours"):
        load([tmp_path / "a", tmp_path / "a"])
    with pytest.raises(BenchError, match="cannot read"):
        load([tmp_path])
    (tmp_path / "results.json").write_text('{"format": 9}', encoding="utf-8")
    with pytest.raises(BenchError, match="has format 9, not 1"):
        load([tmp_path])


def test_servers_keep_the_order_of_the_first_round() -> None:
    whole = results(
        result(OURS, 12, 40), result(PEER, 9, 9), result(PEER, 9, 9, round_index=1), result(OURS, 9, 9, round_index=1)
    )
    assert [server.name for server in whole.servers] == ["ours", "peer"]


def test_the_headline_is_what_happens_during_the_attack() -> None:
    headline = Headline.of(result(OURS, 12, 40))
    # The attack lasts from 20 to 61 ms. Gaps in it: 20-32, 32-44, 44-56 and 56-68, 12 ms each; the gap 10-20 ends when
    # it begins. All output tokens: 7 + 2, in the 68 ms until the victim's last one.
    assert (headline.gap_p50_ms, headline.gap_p95_ms, headline.worst_stall_ms) == (12.0, 12.0, 12.0)
    assert (headline.cold_ttft_ms, headline.resumed_ttft_ms) == (40.0, None)
    assert headline.output_tokens_per_s == pytest.approx(9 / 0.068)


def test_points_are_medians_of_rounds_and_the_frontier_has_no_beaten_point() -> None:
    whole = results(
        *(result(OURS, gap, ttft, round_index=i) for i, (gap, ttft) in enumerate([(12, 40), (14, 48), (30, 41)])),
        result(OURS_SLOW, 20, 30),
        result(PEER, 25, 35),
    )
    ours, slow, peer = frontier_points(whole, "victim_attacker (2 agents)")
    assert (ours.gap_p95_ms, ours.cold_ttft_ms, ours.worst_stall_ms) == (14.0, 41.0, 30.0)
    assert slow.beats(peer) and not ours.beats(peer) and not peer.beats(ours)
    assert best_of([ours, slow, peer]) == [ours, slow]
    shown = io.StringIO()
    print_dominance(whole, "victim_attacker (2 agents)", Console(width=200, file=shown))
    text = shown.getvalue()
    # 25 / 20 and 35 / 30
    assert "agentserve TPOT 9 ms" in text and "1.2x, 1.2x" in text


def test_tables_and_figures(tmp_path: Path) -> None:
    failed = record("a", "attacker", 20, (40,), error="timeout", token_ns=())
    whole = results(
        result(OURS, 12, 40),
        result(PEER, 90, 50, doubts=("[doubt]",), records=(*result(PEER, 90, 50).records, failed)),
    )
    shown = io.StringIO()
    print_tables(whole, Console(width=220, file=shown))
    text = shown.getvalue()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    by_role = {(row[0], row[1]): row for row in rows}
    # calls, errors, TTFT cold p50 and p95, two of resumed turns, TPOT p50 and p95, gaps
    assert by_role["agentserve", "attacker"][2:12] == ["1", "0", "40", "40", "-", "-", "1.0", "1.0", "1.0", "1"]
    # The victim's TPOT is that of the whole stream, (20 + 4 x 90) / 6; its gaps are those of the attack.
    assert by_role["", "victim"][2:11] == ["1", "0", "0", "0", "-", "-", "63.3", "63.3", "90.0"]
    assert by_role["peer", "attacker"][2:4] == ["1", "1"]
    assert "! peer, round 0: [doubt]" in text
    assert "SLO: cold TTFT within 100 ms, gaps within 15 ms." in text
    written = draw_all(whole, tmp_path / "plots", frontier=True)
    assert [path.name for path in written] == [
        "timeline-victim-attacker-2-agents-ours.png",
        "timeline-victim-attacker-2-agents-peer.png",
        "gaps-victim-attacker-2-agents.png",
        "bars-victim-attacker-2-agents.png",
        "frontier-victim-attacker-2-agents.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_workloads_on_the_command_line(tmp_path: Path) -> None:
    named = WorkloadSpec.parse("react:agents=2,programs=3,scale=0.1").make(seed=5)
    assert named.title == "react (2 agents, 3 programs, scale 0.1)"
    assert (named.workload.num_agents, len(named.workload.programs), named.workload.seed) == (2, 3, 5)
    assert WorkloadSpec.parse("victim_attacker").make(0).title == "victim_attacker (3 agents, 7 programs)"
    path = tmp_path / "mine.jsonl"
    path.write_text('{"program_id": "a", "turns": [{"append_tokens": 40, "output_tokens": 2}]}\n', encoding="utf-8")
    assert WorkloadSpec.parse(str(path)).make(0).title == "mine.jsonl (1 agent, 1 programs)"
    for text, message in (
        ("nothing", "neither a file nor a workload"),
        ("react:agent=3", "there is no 'agent'"),
        ("react:agents=x", "agents must be a number"),
        (f"{path}:scale=2", "a file says it all"),
    ):
        with pytest.raises(BenchError, match=message):
            WorkloadSpec.parse(text).make(0)
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"timestamp": 5, "input_length": 9, "output_length": 2, "hash_ids": [4]}', encoding="utf-8")
    with pytest.raises(BenchError, match=r"program 'request-00000' has block_ids, .*only the simulator can run those"):
        WorkloadSpec.parse(str(trace)).make(0)
    trace.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0.5,40,2\n", encoding="utf-8")
    assert WorkloadSpec.parse(str(trace)).make(0).title == "trace.jsonl (open loop, 1 programs)"


async def test_load_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "mine.jsonl", tmp_path / "out"
    turns = '[{"append_tokens": 40, "output_tokens": 3}, {"append_tokens": 20, "output_tokens": 2}]'
    path.write_text(f'{{"program_id": "a", "turns": {turns}}}\n', encoding="utf-8")
    async with serving(FakeServer(gap_s=0.003)) as server:
        arguments = [
            "load",
            "--base-url",
            server.base_url,
            "--workload",
            str(path),
            "--out",
            str(out),
            "--slo-scale",
            "2",
        ]
        assert await asyncio.to_thread(main, arguments) == 0
    whole = load([out])
    (run,) = whole.runs
    assert [r.num_prompt_tokens for r in run.records] == [40, 66]  # 40 + 3 words of the answer, 2 tokens each, + 20
    assert run.slo is not None
    assert run.server.model == "fake-model"
    assert {"command", "commit", "machine", "num_cores", "date"} <= whole.conditions.keys()
    targets = ["--slo-ttft-ms", "60000", "--slo-tpot-ms", "60000"]
    assert main(["report", str(out), *targets, "--out", str(tmp_path / "again")]) == 0
    assert {p.suffix for p in (tmp_path / "again").iterdir()} == {".png"}
    shown = capsys.readouterr().out
    assert "SLO: cold TTFT within 60000 ms" in shown


async def test_a_comparison_goes_on_without_a_server_that_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenario, programs, out = tmp_path / "s.toml", tmp_path / "p.jsonl", tmp_path / "out"
    scenario.write_text(
        "[kind.k]\nlabel = 'broken'\ncommand = ['{python}', '-c', 'raise SystemExit(7)']\nready = 'http://127.0.0.1:{port}/'\n"
        "base_url = 'http://127.0.0.1:{port}/v1'\n[[server]]\nname = 'broken'\nkind = 'k'\n",
        encoding="utf-8",
    )
    programs.write_text('{"program_id": "a", "turns": [{"append_tokens": 40, "output_tokens": 3}]}\n', encoding="utf-8")
    async with serving(FakeServer(gap_s=0.003)) as server:
        arguments = [
            "compare",
            "--scenario",
            str(scenario),
            "--server",
            f"fake={server.base_url}",
            "--server",
            "broken",
        ]
        arguments += ["--workload", str(programs), "--rounds", "2", "--out", str(out), "--frontier"]
        assert await asyncio.to_thread(main, arguments) == 1
        # Three probes, four calls of warm-up and the program in the first round; no probes in the second one.
        assert len(server.bodies) == 3 + 2 * (4 + 1)
        texts = [body["messages"][0]["content"] for body in (server.bodies[7], server.bodies[12])]
        assert texts[0].split()[:4] != texts[1].split()[:4]  # no round finds the prompts of another one in a cache
    whole = load([out])
    assert [(run.server.name, run.round, run.seed) for run in whole.runs] == [("fake", 0, 0), ("fake", 1, 1)]
    assert len(whole.conditions["failures"]) == 2
    shown = capsys.readouterr().out
    assert "broken ended with exit code 7" in shown and "Total time: 0 min" in shown


async def test_a_run_that_others_disturb_is_made_again_with_other_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs, out = tmp_path / "p.jsonl", tmp_path / "out"
    programs.write_text('{"program_id": "a", "turns": [{"append_tokens": 40, "output_tokens": 3}]}\n', encoding="utf-8")
    # Three tries at most: the first round finds a quiet one in the second, the other round none.
    shares = iter([0.5, 0.01, 0.2, 0.04, 0.3])
    monkeypatch.setattr("bench.load.endpoint.StolenTime.share", lambda _: next(shares))
    async with serving(FakeServer(gap_s=0.003)) as server:
        arguments = ["compare", "--server", f"fake={server.base_url}", "--workload", str(programs), "--out", str(out)]
        assert await asyncio.to_thread(main, [*arguments, "--rounds", "2", "--tries", "3"]) == 0
        # Three probes, four calls of warm-up before each round.
        runs = [body["messages"][0]["content"] for body in (*server.bodies[7:9], *server.bodies[13:])]
    assert len(set(runs)) == len(runs) == 5
    assert [(run.round, run.stolen_share) for run in load([out]).runs] == [(0, 0.01), (1, 0.04)]


async def test_servers_that_are_up_together_take_turns_with_each_workload(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["compare", "--together", "--rounds", "2", "--out", str(out)]
    for name in "ab":
        program = {"program_id": name, "turns": [{"append_tokens": 40, "output_tokens": 3}]}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(program) + "\n", encoding="utf-8")
        arguments += ["--workload", str(tmp_path / f"{name}.jsonl")]
    async with serving(FakeServer(gap_s=0.003)) as one, serving(FakeServer(gap_s=0.003)) as other:
        arguments += ["--server", f"one={one.base_url}", "--server", f"gone={other.base_url}x"]
        arguments += ["--server", f"other={other.base_url}"]
        assert await asyncio.to_thread(main, arguments) == 1
    whole = load([out])
    order = [(run.round, run.workload[:7], run.server.name) for run in whole.runs]
    both, reverse = ("one", "other"), ("other", "one")
    assert order == [(n, f"{w}.jsonl", s) for n, names in ((0, both), (1, reverse)) for w in "ab" for s in names]
    assert [failure.split(":")[0] for failure in whole.conditions["failures"]] == ["round 0, gone", "round 1, gone"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workload", "react", "--slo-ttft-ms", "5"], "belong together"),
        (["--workload", "react", "--slo-ttft-ms", "5", "--slo-tpot-ms", "5", "--slo-scale", "2"], "either --slo-scale"),
        (["--workload", "nothing"], "neither a file nor a workload"),
    ],
)
def test_wrong_arguments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["load", "--base-url", "http://127.0.0.1:1/v1", "--out", str(tmp_path), *arguments]) == 1
    assert message in capsys.readouterr().out


def test_time_that_the_hypervisor_took_is_kept_and_older_files_do_not_have_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # user, nice, system, idle, iowait, irq, softirq, steal, guest: guest is a part of user.
    fields = namedtuple("fields", "user nice system idle iowait irq softirq steal guest guest_nice")
    times = iter([fields(10, 0, 1, 5, 0, 0, 0, 1, 3, 0), fields(13, 0, 2, 9, 0, 0, 0, 3, 9, 0)])
    monkeypatch.setattr("bench.load.checks.psutil.cpu_times", lambda: next(times))
    share = StolenTime().share()
    assert share == 0.2  # 2 of 3 + 1 + 4 + 2
    assert find_theft(share) == ["the hypervisor gave 20% of the processor time to others"]
    assert find_theft(0.01) == find_theft(None) == []
    whole = results(result(OURS, 12, 40, stolen_share=share))
    path = save(whole, tmp_path)
    assert load([path]) == whole
    path.write_text(path.read_text(encoding="utf-8").replace('"stolen_share": 0.2', '"seed": 0'), encoding="utf-8")
    assert load([path]).runs[0].stolen_share is None
