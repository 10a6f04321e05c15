"""What is computed of a next prompt while a tool runs: when, how much, at whose cost, and what the next call has of it.

On the test device a pass takes 8 ms, and a token of a prompt 1 ms; a piece of 30 ms has 32 tokens, 8 blocks of 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from agentserve.core.agents import Policy
from agentserve.core.agents.factory import POLICIES
from agentserve.core.decision_log import describe
from agentserve.core.engine import StepResult
from agentserve.core.events import PolicyFailed, RequestAdmitted, RequestFinished, Speculate, TokenGenerated
from agentserve.errors import ConfigError
from agentserve.runtime.recording import Recorder
from agentserve.runtime.replay import build_core, replay
from agentserve.runtime.virtual import VirtualDriver
from agentserve.sim.orchestrator import simulate
from agentserve.sim.programs import Program, Turn, Workload
from tests.core.builders import MS, config, core, header, simulated, submit, virtual

PROMPT = tuple(range(200, 218))
REWRITTEN = (*PROMPT, *range(300, 362))
"""80 tokens, of which 16 are cached once `PROMPT` is: its last block is not full."""


def run(driver: VirtualDriver) -> Iterator[StepResult]:
    while (result := driver.step()) is not None:
        driver.core.check_invariants()
        yield result


def pieces(results: list[StepResult]) -> list[tuple[int, int]]:
    """Where each chunk began that nobody waited for, and how long it was."""
    chunks = [chunk for result in results for batch in result.batches for chunk in batch.chunks]
    return [(c.start, c.num_tokens) for c in chunks if c.request_id.startswith("\0speculation/")]


def answered(speculate: str = "next_turn", **values: Any) -> tuple[VirtualDriver, tuple[int, ...]]:
    """A session `s` whose call `a` has ended, and its conversation so far."""
    driver = virtual(speculate=speculate, **values)
    driver.at(0, submit("a", PROMPT, max_tokens=5, session_id="s"))
    tokens = [e.sample.token_id for r in run(driver) for e in r.events if isinstance(e, TokenGenerated)]
    return driver, (*PROMPT, *tokens)


def say(driver: VirtualDriver, command: object, *, after_ms: int = 0) -> None:
    driver.at(driver.clock.now_ns() + after_ms * MS, command)  # type: ignore[arg-type]


def counts(driver: VirtualDriver) -> tuple[int, int, int]:
    """Tokens that were computed beforehand, used, wasted."""
    stats = driver.core.stats().policies
    assert stats is not None
    return tuple(stats.counts[f"tokens_speculated{what}"] for what in ("", "_used", "_wasted"))  # type: ignore[return-value]


def cached(results: list[StepResult]) -> dict[str, int]:
    return {e.request_id: e.num_cached_tokens for r in results for e in r.events if isinstance(e, RequestAdmitted)}


def test_the_end_of_a_turn_is_computed_and_found() -> None:
    driver, history = answered()
    say(driver, Speculate("a", (*history, 7, 8, 9)))
    # 23 tokens were known and 22 of them computed, so 5 blocks are cached. With 26 there are 6.
    results = list(run(driver))
    assert pieces(results) == [(20, 4)]
    assert not any(isinstance(e, TokenGenerated | RequestFinished | RequestAdmitted) for r in results for e in r.events)
    say(driver, submit("b", (*history, 7, 8, 9, 10, 11, 12), session_id="s"))
    assert cached(list(run(driver))) == {"b": 24}
    assert counts(driver) == (4, 4, 0)


def test_what_is_written_anew_is_computed_in_pieces() -> None:
    driver, _ = answered("lost_context", max_num_batched_tokens=64)
    say(driver, Speculate("a", REWRITTEN))
    # 64 are missing, and what is left after the first piece is computed, too, however little it is.
    assert pieces(list(run(driver))) == [(16, 16), (32, 16), (48, 16), (64, 16)]
    say(driver, submit("b", (*REWRITTEN, 1, 2), session_id="s"))
    assert cached(list(run(driver))) == {"b": 80}
    assert counts(driver) == (64, 64, 0)


def test_what_the_next_call_does_not_feel_is_left_alone() -> None:
    driver, _ = answered("lost_context")
    say(driver, Speculate("a", REWRITTEN[:79]))  # 76 in whole blocks: 60 are missing
    assert pieces(list(run(driver))) == []


def test_a_turn_has_a_budget() -> None:
    driver, _ = answered(speculate_tokens=33)
    say(driver, Speculate("a", REWRITTEN))
    assert sum(num for _, num in pieces(list(run(driver)))) == 32  # whole blocks


def test_nothing_is_computed_for_a_session_that_went_on_or_is_unknown() -> None:
    driver, _ = answered()
    driver.at(driver.clock.now_ns(), submit("b", PROMPT, session_id="s"))
    say(driver, Speculate("a", REWRITTEN))
    say(driver, Speculate("nobody", REWRITTEN))
    assert pieces(list(run(driver))) == []


def test_it_may_be_said_before_the_call_has_ended() -> None:
    driver = virtual(speculate="next_turn")
    driver.at(0, submit("a", PROMPT, max_tokens=5, session_id="s"))
    driver.at(20 * MS, Speculate("a", REWRITTEN))
    assert sum(num for _, num in pieces(list(run(driver)))) == 64


def test_prompts_go_first_and_wait_for_one_piece_at_most() -> None:
    driver, _ = answered(prefill_chunk=64, max_num_batched_tokens=64)
    say(driver, Speculate("a", REWRITTEN))
    say(driver, submit("c", 60, max_tokens=1, session_id="other"), after_ms=10)
    start_ns = driver.clock.now_ns()
    results = list(run(driver))
    (end_ns,) = [e.at_ns for r in results for e in r.events if isinstance(e, RequestFinished)]
    first, *later = pieces(results)
    # The piece that was running when it came, its own prompt alone, and only then the rest.
    assert end_ns - start_ns < (32 + 60 + 2) * MS
    order = [c.request_id for r in results for b in r.batches for c in b.chunks]
    assert order.index("c") == 1 and first == (16, 32) and sum(num for _, num in later) == 32


def test_its_own_call_takes_what_there_is() -> None:
    driver, _ = answered(prefill_chunk=64, max_num_batched_tokens=64)
    say(driver, Speculate("a", REWRITTEN))
    say(driver, submit("b", (*REWRITTEN, 1, 2), max_tokens=1, session_id="s"), after_ms=10)
    results = list(run(driver))
    assert pieces(results) == [(16, 32)]
    assert cached(results) == {"b": 48}  # it waited for the piece that it needs, and read the rest itself
    assert counts(driver) == (32, 32, 0)


def test_nobody_is_evicted_who_was_there_later() -> None:
    # 23 blocks: 5 of the first session, and 17 + 1 of one that came after it.
    driver, _ = answered(num_blocks=23, max_model_len=92)
    driver.at(driver.clock.now_ns(), submit("c", 67, max_tokens=2, session_id="other"))
    list(run(driver))
    assert driver.core.stats().num_free_blocks == 1
    say(driver, Speculate("a", REWRITTEN))
    results = list(run(driver))
    assert pieces(results) == [] and driver.core.stats().num_evicted_blocks == 0


def test_what_is_older_makes_room() -> None:
    driver = virtual(speculate="next_turn", num_blocks=23, max_model_len=92)
    driver.at(0, submit("c", 67, max_tokens=2, session_id="other"))
    list(run(driver))
    driver.at(driver.clock.now_ns(), submit("a", PROMPT, max_tokens=5, session_id="s"))
    list(run(driver))
    say(driver, Speculate("a", REWRITTEN))
    assert sum(num for _, num in pieces(list(run(driver)))) == 64
    say(driver, submit("b", (*REWRITTEN, 1, 2), max_tokens=1, session_id="s"))
    assert cached(list(run(driver)))["b"] == 80


def test_salts_stay_apart() -> None:
    driver = virtual(speculate="next_turn")
    driver.at(0, submit("a", PROMPT, session_id="s", cache_salt="mine"))
    list(run(driver))
    say(driver, Speculate("a", REWRITTEN))
    assert pieces(list(run(driver)))
    say(driver, submit("b", (*REWRITTEN, 1, 2), session_id="s"))
    say(driver, submit("c", (*REWRITTEN, 1, 2), session_id="t", cache_salt="mine"), after_ms=500)
    assert cached(list(run(driver))) == {"b": 0, "c": 80}
    assert counts(driver) == (64, 0, 64)


class Broken(Policy):
    name: ClassVar[str] = "broken"

    def speculates(self, session: object, start: int, num_missing: int, now_ns: int) -> int:
        raise RuntimeError("no idea")


def test_a_policy_that_raises_is_out() -> None:
    name = "tests.core.agents.test_speculation:Broken"
    engine = build_core(header(speculate=name), {**POLICIES, name: lambda _: Broken()})
    driver = VirtualDriver(engine, simulated())
    driver.at(0, submit("a", PROMPT, session_id="s"))
    driver.at(500 * MS, Speculate("a", REWRITTEN))
    driver.at(900 * MS, submit("b", REWRITTEN, session_id="s"))
    driver.at(1500 * MS, Speculate("b", (*REWRITTEN, *REWRITTEN)))
    events = [event for result in run(driver) for event in result.events]
    failed = [(event.policy, event.error) for event in events if isinstance(event, PolicyFailed)]
    assert failed == [(name, "RuntimeError: no idea")]
    assert sum(isinstance(event, RequestFinished) for event in events) == 2


@pytest.mark.parametrize("values", [{"scheduler": "chunked"}, {"enable_prefix_caching": False}])
def test_it_needs_lanes_and_a_cache(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="speculate needs"):
        config(speculate="next_turn", **values)


def test_a_budget_that_nobody_would_spend_is_refused() -> None:
    with pytest.raises(ConfigError, match="speculate_tokens needs"):
        config(speculate_tokens=33)


def test_a_recording_is_replayed(tmp_path: Path) -> None:
    head = header(speculate="next_turn")
    engine, executor = build_core(head), simulated()
    recorder = Recorder(tmp_path / "r.jsonl", head)
    now_ns, done = 0, 0
    commands: list[Any] = [submit("a", PROMPT, session_id="s")]
    while commands or executor.next_completion_ns() is not None:
        now_ns = max(now_ns, executor.next_completion_ns() or 0)
        completions = executor.poll(now_ns)
        result = engine.step(now_ns, completions, commands)
        recorder.write(now_ns, completions, commands, result)
        commands = []
        for batch in result.batches:
            executor.submit(batch, now_ns)
        if any(isinstance(event, RequestFinished) for event in result.events):
            done += 1
            commands = [Speculate("a", REWRITTEN)]
    recorder.close()
    assert done == 1 and engine.stats().policies.counts["tokens_speculated"] == 64  # type: ignore[union-attr]
    report = replay(tmp_path / "r.jsonl")
    assert report.identical, report.divergence


@pytest.mark.parametrize("values", [{}, {"policy": "ttl"}, {"decode_lookahead": 2}, {"control": None}])
def test_the_simulator_says_it_too_and_skips_steps_all_the_same(values: dict[str, Any]) -> None:
    values = {name: value for name, value in values.items() if value is not None}
    turns = tuple(Turn(40 + 3 * index, 17 + index, 60.0) for index in range(3))
    programs = tuple(
        Program(f"p{index}", (*turns[index % 2 :], *turns), prefix_id="x", prefix_tokens=20) for index in range(6)
    )
    workload = Workload("w", programs, 3)
    runs = []
    for fast_forward in (False, True):
        driver = virtual(speculate="next_turn", num_blocks=180, max_model_len=640, **values)
        found = simulate(workload, driver, fast_forward=fast_forward)
        assert all(record.error is None for record in found.records)
        runs.append((found.records, found.batches, counts(driver)))
    assert runs[0] == runs[1]
    assert runs[0][2][1] > 0, "nothing was used"


def test_nothing_is_decided_differently_while_nobody_says_anything() -> None:
    logs = []
    for speculate in ("none", "next_turn"):
        driver = virtual(speculate=speculate)
        for index in range(4):
            driver.at(index * 30 * MS, submit(f"r{index}", 30 + index, max_tokens=9, session_id=f"s{index % 2}"))
        logs.append([line for result in run(driver) for line in describe(result)])
    assert logs[0] == logs[1]
    assert core().stats().policies is None
