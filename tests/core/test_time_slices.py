"""Time slices: who waits gets the place of one that has run for a while, and nobody waits for ever."""

from __future__ import annotations

from typing import Any

import pytest

from agentserve.config import AdapterConfig, LoraConfig, TierConfig, TieringConfig
from agentserve.core.engine import StepResult
from agentserve.core.events import RequestAdmitted, RequestFinished, RequestPreempted, SubmitRequest, TokenGenerated
from agentserve.errors import ConfigError
from tests.core.builders import MS, core, finished, submit, virtual

HOST = TieringConfig(1000, (TierConfig("host", 200, 1e9, 1e9),))
SLOW_HOST = TieringConfig(4000, (TierConfig("host", 200, 1e6, 1e6),))
"""A block takes 4 ms each way: something is on its way down nearly all the time."""


def moves(results: list[StepResult]) -> list[tuple[str, str]]:
    """Who gets a place, gives it up and ends, in order."""
    names = {RequestAdmitted: "in", RequestPreempted: "out", RequestFinished: "end"}
    return [(names[type(e)], e.request_id) for result in results for e in result.events if type(e) in names]


def run(*commands: Any, **values: Any) -> list[StepResult]:
    """All come at once."""
    driver = virtual(**values)
    for command in commands:
        driver.at(0, command)
    results = driver.run()
    driver.core.check_invariants()
    assert driver.core.memory.num_available_blocks == driver.core.memory.num_blocks
    return results


def texts(results: list[StepResult]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for result in results:
        for event in result.events:
            if isinstance(event, TokenGenerated):
                found.setdefault(event.request_id, []).append(event.sample.token_id)
    return found


def times(results: list[StepResult]) -> list[tuple[str, str, int]]:
    """The same without the ends, with the milliseconds."""
    names = {RequestAdmitted: "in", RequestPreempted: "out"}
    return [
        (names[type(event)], event.request_id, round(event.at_ns / MS))
        for result in results
        for event in result.events
        if isinstance(event, RequestAdmitted | RequestPreempted)
    ]


def test_without_slices_who_runs_keeps_its_place() -> None:
    results = run(submit("a", 8, max_tokens=40), submit("b", 8, max_tokens=4), max_num_seqs=1)
    assert moves(results) == [("in", "a"), ("end", "a"), ("in", "b"), ("end", "b")]


def test_who_waits_gets_the_place_of_one_that_has_run_for_its_slice() -> None:
    results = run(submit("a", 8, max_tokens=40), submit("b", 8, max_tokens=4), max_num_seqs=1, time_slice_ns=40 * MS)
    assert moves(results) == [("in", "a"), ("out", "a"), ("in", "b"), ("end", "b"), ("in", "a"), ("end", "a")]
    # A batch takes 8 ms, the prompt as well: the fifth one ends after 40 ms. Four later "b" has its four tokens.
    assert times(results) == [("in", "a", 0), ("out", "a", 40), ("in", "b", 40), ("in", "a", 72)]


def test_each_turn_is_twice_as_long_as_the_one_before_it() -> None:
    requests = [submit("a", 8, max_tokens=60), submit("b", 8, max_tokens=60)]
    results = run(*requests, max_num_seqs=1, time_slice_ns=40 * MS)
    ins = [(who, at) for what, who, at in times(results) if what == "in"]
    # "a" gives way after one slice, and has used up one then. So "b" has to use up two: 40 + 80 ms. Then "a" has to use
    # up three, the second and the third one: 80 + 160 ms. "b" would be the next to go, after its third and fourth one,
    # but its 45 last tokens take less than 160 + 320 ms.
    assert ins[:4] == [("a", 0), ("b", 40), ("a", 160), ("b", 401)]
    assert moves(results)[-4:] == [("in", "b"), ("end", "b"), ("in", "a"), ("end", "a")]
    assert {who: len(text) for who, text in texts(results).items()} == {"a": 60, "b": 60}


@pytest.mark.parametrize("tiering", [None, HOST])
@pytest.mark.parametrize(
    "values", [{}, {"scheduler": "chunked"}, {"decode_lookahead": 2}, {"policy": "invocation_distance"}]
)
def test_turns_change_no_text_and_everybody_ends(tiering: TieringConfig | None, values: dict[str, Any]) -> None:
    requests = [submit(name, 30, max_tokens=30, session_id=name) for name in "abcde"]
    texts_alone = texts(run(*requests, max_num_seqs=5, num_blocks=200))
    limits = {"max_num_seqs": 2, "num_blocks": 40, "max_model_len": 64, "tiering": tiering}
    results = run(*requests, time_slice_ns=50 * MS, **limits, **values)
    assert texts(results) == texts_alone and len(finished(results)) == 5
    firsts = [
        event.at_ns
        for r in results
        for event in r.events
        if isinstance(event, TokenGenerated) and not event.output_index
    ]
    plain = run(*requests, **limits, **values)
    plain_firsts = [
        event.at_ns for r in plain for event in r.events if isinstance(event, TokenGenerated) and not event.output_index
    ]
    assert sum(firsts) < sum(plain_firsts), "nobody had his first token sooner"


@pytest.mark.parametrize("tiering", [None, HOST, SLOW_HOST])
def test_the_same_for_memory_that_is_short(tiering: TieringConfig | None) -> None:
    """There are seats enough, but blocks for two of them."""
    requests = [submit(name, 40, max_tokens=12) for name in "abc"]
    values = {"num_blocks": 26, "max_model_len": 64, "tiering": tiering}
    results = run(*requests, time_slice_ns=30 * MS, **values)
    # The prompt of "b" is still being read when the slice of "a" is over.
    assert moves(results)[:4] == [("in", "a"), ("in", "b"), ("out", "a"), ("in", "c")] and len(finished(results)) == 3
    assert moves(run(*requests, **values))[:4] == [("in", "a"), ("in", "b"), ("end", "a"), ("in", "c")]


def test_nobody_gives_way_to_less_important_ones() -> None:
    requests = [submit("a", 8, max_tokens=30, priority=-1), submit("b", 8, max_tokens=4)]
    results = run(*requests, max_num_seqs=1, time_slice_ns=10 * MS)
    assert moves(results) == [("in", "a"), ("end", "a"), ("in", "b"), ("end", "b")]


def test_a_slot_for_an_adapter_changes_hands() -> None:
    lora = LoraConfig(tuple(AdapterConfig(name, 4000, 2) for name in "xyz"), max_resident=2, read_bytes_per_s=1e6)
    requests = [submit(name, 8, max_tokens=30, adapter=name) for name in "xyz"]
    results = run(*requests, lora=lora, time_slice_ns=40 * MS)
    # "y" was loaded behind "x", so its slice ends later.
    assert moves(results)[:4] == [("in", "x"), ("in", "y"), ("out", "x"), ("in", "z")]
    assert len(finished(results)) == 3
    # Two requests of one adapter do not give a slot back when one of them stops.
    shared = [submit("1", 8, max_tokens=30, adapter="x"), submit("2", 8, max_tokens=30, adapter="x")]
    results = run(
        *shared, submit("3", 8, max_tokens=4, adapter="y"), lora=LoraConfig(lora.adapters, 1), time_slice_ns=40 * MS
    )
    assert moves(results)[:5] == [("in", "1"), ("in", "2"), ("end", "1"), ("out", "2"), ("in", "3")]


def test_a_seat_changes_hands_although_there_are_slots_enough() -> None:
    """What the next ones need is loaded while they wait for a seat: so it is there when somebody gives way."""
    lora = LoraConfig(tuple(AdapterConfig(name, 4000, 2) for name in "uvwxyz"), max_resident=6, read_bytes_per_s=1e6)
    requests = [submit(name, 8, max_tokens=30, adapter=name) for name in "uvwxyz"]
    results = run(*requests, lora=lora, max_num_seqs=2, time_slice_ns=40 * MS)
    firsts = [at for what, _, at in times(results) if what == "in"][:6]
    assert [who for what, who, _ in times(results) if what == "in"][:6] == list("uvwxyz")
    # Without slices the third one would wait for 30 tokens of 8 ms each.
    assert firsts[2] < 100 and firsts[5] < 240 and len(finished(results)) == 6


def test_few_places_are_vacated_while_others_are_being_loaded() -> None:
    """Each load takes 100 ms: who runs goes on until somebody has use for its place."""
    slow = LoraConfig(tuple(AdapterConfig(f"{i:02}", 1000, 1) for i in range(16)), max_resident=8, read_bytes_per_s=1e4)
    driver = virtual(lora=slow, max_num_seqs=8, time_slice_ns=40 * MS, num_blocks=400)
    for index in range(16):
        driver.at(0, submit(f"{index:02}", 8, max_tokens=200, adapter=f"{index:02}"))
    num_running = []
    while (result := driver.step()) is not None:
        if any(isinstance(event, RequestPreempted) for event in result.events):
            num_running.append(driver.core.stats().num_running)
    assert len(num_running) >= 8 and min(num_running) >= 4


def test_single_steps_and_runs_of_steps_are_the_same() -> None:
    requests: list[SubmitRequest] = [submit(name, 12, max_tokens=40) for name in "abcd"]
    logs = []
    for advances in (False, True):
        driver = virtual(max_num_seqs=2, time_slice_ns=60 * MS)
        for command in requests:
            driver.at(0, command)
        results = []
        while (result := driver.advance() if advances else driver.step()) is not None:
            results.append(result)
        logs.append((driver.core.stats(), times(results)))
    assert logs[0] == logs[1] and any(what == "out" for what, _, _ in logs[0][1])


def test_a_slice_is_longer_than_nothing() -> None:
    with pytest.raises(ConfigError, match="time_slice_ns"):
        core(time_slice_ns=0)
