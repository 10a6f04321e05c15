"""The simulator against recordings: what is joined, what is predicted, how errors are counted."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from agentserve.errors import ConfigError
from agentserve.sim.metrics import TurnRecord
from agentserve.sim.programs import Program, Turn, Workload
from agentserve.sim.recorded import RecordedCall
from bench.fidelity.calibrated import score_both
from bench.fidelity.live import LiveCell, LiveRuns
from bench.fidelity.observed import (
    CALIBRATION,
    Observation,
    Outside,
    median_outside,
    observe,
    real_workload,
)
from bench.fidelity.predict import predict, slowed
from bench.fidelity.report import print_report
from bench.fidelity.score import score
from bench.fidelity.steps import by_kind, read_batches, speed_factor
from bench.load.cli import main
from bench.load.errors import BenchError
from bench.load.workloads import WorkloadSpec
from tests.bench.recorded_runs import record_run
from tests.core import builders

MS = 1_000_000
ENGINE: dict[str, Any] = {"num_blocks": 256, "max_model_len": 512}
OUTSIDE = Outside(send_ns=3 * MS, receive_ns=2 * MS, tail_ns=4 * MS, turnaround_ns=9 * MS)
TURNS = (Turn(40, 5, 30.0), Turn(12, 6, 1.0), Turn(7, 4))
PROGRAMS = (Program("a", TURNS), Program("b", TURNS[1:]), Program("c", TURNS[:2]))
PLANNED = Workload("w", PROGRAMS, 2, 0)


def observed(
    tmp_path: Path, *, slowdown: float = 1.0, round_index: int = 0, outside: Outside | None = None
) -> Observation:
    """A run of PLANNED whose client saw all times as `outside` says."""
    path = tmp_path / f"run-{round_index}.jsonl"
    planned = workload = PLANNED if outside is None else dataclasses.replace(PLANNED, num_agents=3)
    if outside is not None:
        assert outside.turnaround_ns is not None
        extra_ms = outside.turnaround_ns / MS
        later = [
            dataclasses.replace(
                program,
                turns=tuple(dataclasses.replace(t, tool_gap_ms=t.tool_gap_ms + extra_ms) for t in program.turns),
            )
            for program in PROGRAMS
        ]
        workload = dataclasses.replace(planned, programs=tuple(later))
    records = record_run(path, workload, slowdown=slowdown)
    if outside is not None:
        records = [
            dataclasses.replace(
                r,
                sent_ns=r.sent_ns - outside.send_ns,
                token_ns=tuple(at_ns + outside.receive_ns for at_ns in r.token_ns),
                finished_ns=r.finished_ns + outside.tail_ns,
            )
            for r in records
        ]
    return observe(
        path, cell="cell", round_index=round_index, planned=planned, prompt_seed="S", records=records, started_ns=0
    )


# ---- joining and predicting ----


def test_a_simulation_of_a_simulation_is_exact(tmp_path: Path) -> None:
    observation = observed(tmp_path)
    predicted = predict(observation, Outside())
    assert [dataclasses.replace(r, error=None) for r in predicted] == list(observation.records)
    assert len(observation.batches) > 20
    assert {batch.measured_ns - batch.predicted_ns for batch in observation.batches} == {0}
    assert observation.notes == ()


def test_the_time_outside_the_engine_is_found_and_added(tmp_path: Path) -> None:
    observation = observed(tmp_path, outside=OUTSIDE)
    assert median_outside(observation.outside) == OUTSIDE
    # 7 calls in 3 programs: the last one of each has no next turn.
    assert [call.turnaround_ns for call in observation.outside].count(None) == 3
    assert predict(observation, OUTSIDE) == observation.records
    bare = {(r.program_id, r.turn_index): r.ttft_ns for r in predict(observation, Outside())}
    first = next(r for r in observation.records if (r.program_id, r.turn_index) == ("a", 0))
    assert first.ttft_ns == (bare["a", 0] or 0) + 5 * MS  # 3 ms to the engine, 2 ms back


def test_the_programs_have_the_token_counts_of_the_run() -> None:
    def call(prompt: tuple[int, ...], output: list[int]) -> RecordedCall:
        return RecordedCall(builders.submit("r", prompt), 0, token_ids=output, token_ns=[1] * len(output))

    # The second prompt has the first answer with another token at its end; the third one continues as it was.
    first, second = tuple(range(20)), (*range(20), 50, 51, 99, 60, 61)
    third = (*second, 70, 71, 80)
    calls = {"a": [call(first, [50, 51, 52]), call(second, [70, 71]), call(third, [1, 2, 3, 4])]}
    planned = Workload("w", (Program("a", TURNS), Program("b", TURNS, depends_on=("a",))), 1)
    (program,) = real_workload(planned, calls, 0).programs
    assert program.turns == (Turn(20, 3, 30.0), Turn(3, 2, 1.0, keep_tokens=22), Turn(1, 4))
    calls["b"] = [call((*range(16), 900, 901), [5])]
    real = real_workload(planned, calls, 0)
    assert [(p.prefix_tokens, p.depends_on) for p in real.programs] == [(16, ()), (16, ("a",))]
    assert real.programs[0].prefix_id == real.programs[1].prefix_id


def test_a_call_that_the_engine_does_not_know_or_that_failed_is_said(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    records: list[TurnRecord] = list(record_run(path, PLANNED))
    given: dict[str, Any] = {"cell": "cell", "round_index": 1, "planned": PLANNED, "started_ns": 0}
    with pytest.raises(BenchError, match=r"round 1: program .*: 3 calls were made, but the engine recorded 0"):
        observe(path, prompt_seed="other", records=[r for r in records if r.program_id == "a"], **given)
    records[2] = dataclasses.replace(records[2], error="HTTP 500")
    with pytest.raises(BenchError, match=r"cell, round 1: program .*: HTTP 500"):
        observe(path, prompt_seed="S", records=records, **given)


def test_calls_start_in_the_order_in_which_the_client_could_send_them() -> None:
    def started(at_ms: int) -> list[RecordedCall]:
        return [RecordedCall(builders.submit("r", 9), at_ms * MS, token_ids=[1], token_ns=[at_ms * MS + 5])]

    programs = tuple(Program(name, (Turn(9, 1),)) for name in "abc")
    calls = {"a": started(7), "b": started(5), "c": started(90)}
    # Two agents: the third program starts when the one is free that took it. Tokens were there 5 ns after arrival.
    closed = real_workload(Workload("w", programs, 2), calls, 4 * MS)
    assert [(program.arrival_ms, program.depends_on) for program in closed.programs] == [
        (3.0, ()),
        (1.0, ()),
        (None, ("a",)),
    ]
    assert closed.num_agents is None
    timed = (*programs[:2], Program("c", (Turn(9, 1),), arrival_ms=50.0, depends_on=("a",)))
    opened = real_workload(Workload("w", timed, None), calls, 4 * MS)
    assert [program.arrival_ms for program in opened.programs] == [3.0, 1.0, 50.0]


# ---- batches ----


def test_a_slower_machine_is_a_factor_and_the_rest_is_model_error(tmp_path: Path) -> None:
    observation = observed(tmp_path, slowdown=1.5)
    assert speed_factor(observation.batches) == pytest.approx(1.5, abs=1e-6)
    assert all(row["error"] == pytest.approx(1 / 1.5 - 1, abs=1e-6) for row in by_kind(observation.batches))
    tpot = score([observation])["cells"][0]["metrics"]["tpot_mean_ms"]
    assert tpot["predicted"]["error"] == pytest.approx(1 / 1.5 - 1, abs=0.02)  # waiting for each other moves a little
    assert tpot["at_speed"]["error"] == pytest.approx(0.0, abs=1e-5)


def test_kinds_of_batches_are_told_apart(tmp_path: Path) -> None:
    rows = {row["kind"]: row for row in by_kind(observed(tmp_path).batches)}
    assert {"decode, alone", "decode, beside prefill", "prefill, beside decode"} <= rows.keys()
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1.0)
    # The flag is of the moment of submission: a prefill may have ended or begun meanwhile.
    assert 0.0 <= rows["decode, alone"]["beside"] < 0.5 < rows["decode, beside prefill"]["beside"] <= 1.0
    assert rows["decode, alone"]["idle_before_ms"] == 0.0


def test_no_batches_are_better_than_wrong_ones(tmp_path: Path) -> None:
    record_run(tmp_path / "run.jsonl", PLANNED)
    lines = (tmp_path / "run.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    changed = tmp_path / "changed.jsonl"
    changed.write_text("".join(lines).replace(" decode split", " prefill split").replace("cached=0", "cached=4"))
    batches, (note,) = read_batches(changed)
    assert batches == () and "the replay differs from step 0 on" in note
    record_run(tmp_path / "bare.jsonl", PLANNED, header=builders.header(**ENGINE))
    header, _, rest = (tmp_path / "bare.jsonl").read_text(encoding="utf-8").partition("\n")
    bare = json.dumps({**json.loads(header), "device": None}) + "\n" + rest
    (tmp_path / "bare.jsonl").write_text(bare, encoding="utf-8")
    assert read_batches(tmp_path / "bare.jsonl")[1] == (
        "no times by kind of batch: the recording has no profile of its device",
    )


def test_a_slowdown_must_be_one() -> None:
    device = builders.device_profile(overhead_ns=1000)
    slow = slowed(device, 2.0)
    assert (slow.overhead_ns, slow.bandwidth_bytes_per_s, slow.flops_per_s) == (2000, 0.5e9, 1e9)
    with pytest.raises(ConfigError, match="a slowdown must be a positive number, not 0"):
        slowed(device, 0.0)


# ---- numbers and reports ----


def test_errors_and_spread_are_of_the_mean_of_the_rounds(tmp_path: Path) -> None:
    even, slow = observed(tmp_path), observed(tmp_path, slowdown=2.0, round_index=1)
    result = score([even, slow])
    (cell,) = result["cells"]
    assert cell["rounds"] == [0, 1] and cell["speed_factors"] == [pytest.approx(1.0), pytest.approx(2.0)]
    numbers = cell["metrics"]["tpot_mean_ms"]
    first, second = numbers["live"]
    assert numbers["live_mean"] == pytest.approx((first + second) / 2)
    assert numbers["live_spread"] == pytest.approx((second - first) / ((first + second) / 2))
    assert numbers["predicted"]["value"] == pytest.approx(first)  # both rounds are predicted alike
    assert numbers["predicted"]["error"] == pytest.approx(first / ((first + second) / 2) - 1)
    overall = result["overall"]["predicted"]
    errors = [cell["metrics"][key]["predicted"]["error"] for key in overall["by_metric"]]
    assert overall["mean_absolute_error"] == pytest.approx(sum(map(abs, errors)) / 7)
    assert overall["num_numbers"] == 7 and overall["largest_error"] == max(map(abs, errors))
    assert result["live_spread"]["by_metric"]["tpot_mean_ms"] == numbers["live_spread"]


def text_of(result: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=200)
    shared = {"machine": "a box", "profile": "made up", "commit": "abc", "date": "2026-01-01"}
    print_report({"conditions": shared, **result}, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_report_says_what_was_added_and_whether_the_goal_is_met(tmp_path: Path) -> None:
    text = text_of(score([observed(tmp_path, outside=OUTSIDE), observed(tmp_path, round_index=1, outside=OUTSIDE)]))
    assert "3.00 ms until it takes a call up, 2.00 ms from its first token" in text.replace("\n", " ")
    assert "live-to-live spread: mean 0.0%, largest 0.0%" in text
    assert "under 3%): met" in text
    slow = text_of(score([observed(tmp_path, slowdown=1.5, round_index=7)]))
    assert "under 3%): not met" in slow and "unknown, because every cell ran once" in slow
    assert "nothing outside it is compared or added" in slow


def test_a_recording_needs_no_live_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "run.jsonl", tmp_path / "out"
    record_run(path, dataclasses.replace(PLANNED, num_agents=3))
    assert main(["fidelity", "--recording", str(path), "--out", str(out)]) == 0
    result = json.loads((out / "fidelity.json").read_text(encoding="utf-8"))
    (cell,) = result["cells"]
    assert cell["title"] == "run.jsonl" and cell["num_calls"] == [7]
    assert {n["predicted"]["error"] for n in cell["metrics"].values()} == {0.0}
    assert result["conditions"]["profile"] == "a test device, as recorded: made up"
    assert (out / "fidelity.png").stat().st_size > 10_000
    assert "under 3%): met" in (out / "fidelity.txt").read_text(encoding="utf-8")
    assert "live-to-live spread: unknown" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recording", "x", "--rounds", "2"], "--rounds is for live runs"),
        (["--recording", "x", "--kv-cache-memory", "1GiB"], "--kv-cache-memory is for live runs"),
        (["--rounds", "0"], "--rounds must be at least 1, not 0"),
        (["--workload", "react", "--workload", "react"], "the same workload with the same memory is there twice"),
        (["--workload", "reakt"], "reakt is neither a file nor a workload"),
        (["--recording", "missing.jsonl"], "cannot read missing.jsonl"),
    ],
)
def test_wrong_options_are_said_before_anything_runs(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fidelity", "--out", str(tmp_path / "out"), *options]) == 1
    assert message in capsys.readouterr().err


def live_runs(tmp_path: Path, *serve_options: str, cells: Sequence[LiveCell], rounds: int = 1) -> LiveRuns:
    profile = tmp_path / "device.json"
    return LiveRuns(
        cells, profile, serve_options, rounds, seed=0, directory=tmp_path, timeout_s=60.0,
        console=Console(file=io.StringIO()),
    )  # fmt: skip


async def test_a_daemon_that_does_not_start_is_a_failure_with_its_words(tmp_path: Path) -> None:
    cell = LiveCell(WorkloadSpec.parse("react:agents=1,programs=1,scale=0.02"), "64MiB")
    assert cell.make(0).title == "react (1 agents, 1 programs, scale 0.02), KV 64MiB"
    with pytest.raises(BenchError, match=r"(?s)no run succeeded:\nround 0, react .*ended with exit code \d"):
        await live_runs(tmp_path, cells=[cell]).run()  # there is no such profile


# ---- a calibration set ----


def test_a_profile_is_fitted_to_some_runs_and_predicts_the_others(tmp_path: Path) -> None:
    runs = [observed(tmp_path, slowdown=1.5, round_index=index) for index in range(2)]
    result = score_both([dataclasses.replace(runs[0], role=CALIBRATION), runs[1]])
    overall = result["calibration"]["overall"]
    assert list(overall) == ["calibration set", "held out", "held out, profile as given"]
    # The given profile is that of a device that is half as fast again: every time is a third short.
    assert overall["held out, profile as given"]["bias_by_metric"]["tpot_mean_ms"] == pytest.approx(-1 / 3, abs=0.01)
    assert overall["held out"]["mean_absolute_error"] < 0.02
    assert result["overall"]["predicted"] == overall["held out"]
    assert "held out, profile as given" in text_of(result)
    with pytest.raises(BenchError, match="a calibration and a held-out run must have succeeded"):
        score_both(runs)
