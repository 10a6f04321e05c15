"""Adapters in the engine, on simulated hardware: who waits for what, and how long."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from agentserve.build.simulation import build_driver, make_plans, run_plan
from agentserve.config import AdapterConfig, LoraConfig
from agentserve.core.events import EndRequest, EngineEvent, RequestAdmitted, RequestFinished, SubmitRequest
from agentserve.core.request import FinishReason, SamplingParams
from agentserve.errors import ConfigError
from agentserve.runtime.recording import Recorder, Recording
from agentserve.runtime.virtual import VirtualDriver
from agentserve.sim.cells import Cell
from agentserve.sim.programs import Program, Turn, dump_programs
from tests.core.builders import MS, header

LORA = LoraConfig(
    tuple(AdapterConfig(name, 4000, 2) for name in "abcd"),
    max_resident=2,
    read_bytes_per_s=1e6,
    latency_ns=1 * MS,
    max_load_bytes=2000,
)
"""A load takes two copies of 1 ms latency and 2 ms of bytes: 6 ms."""


def submit(request_id: str, adapter: str | None, num_tokens: int = 8, max_tokens: int = 3) -> SubmitRequest:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    return SubmitRequest(request_id, tuple(range(1, num_tokens + 1)), params, adapter=adapter)


def events_of(driver: VirtualDriver) -> list[EngineEvent]:
    """Everything that happens, step by step."""
    events: list[EngineEvent] = []
    while (result := driver.step()) is not None:
        events += result.events
    return events


def test_a_request_waits_for_its_adapter_and_others_do_not() -> None:
    driver = build_driver(header(lora=LORA))
    for command in (submit("1", "a"), submit("2", None), submit("3", "a")):
        driver.at(0, command)
    admitted = {e.request_id: e.at_ns for e in events_of(driver) if isinstance(e, RequestAdmitted)}
    assert admitted["2"] == 0
    # Loaded after 6 ms; the first batch boundary behind that lets them in, one after the other finds its prefix.
    assert admitted["1"] >= 6 * MS and admitted["3"] >= admitted["1"]


def test_an_unknown_adapter_is_an_error_of_the_request() -> None:
    for lora in (LORA, None):
        driver = build_driver(header(lora=lora))
        driver.at(0, submit("1", "nobody"))
        (end,) = [event for event in events_of(driver) if isinstance(event, RequestFinished)]
        assert end.reason is FinishReason.ERROR and "nobody" in (end.error or "")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scheduler", ["lanes", "chunked"])
def test_everybody_is_served_with_few_slots_and_little_memory(seed: int, scheduler: str) -> None:
    """Sixty requests with five kinds of adapters in two slots, with preemptions and cancellations."""
    rng = random.Random(seed)
    driver = build_driver(header(lora=LORA, num_blocks=24, max_model_len=60, scheduler=scheduler, decode_lookahead=2))
    for number in range(60):
        at_ns = rng.randrange(600) * MS
        name = rng.choice(["a", "b", "c", "d", None])
        driver.at(at_ns, submit(str(number), name, rng.randrange(1, 30), rng.randrange(1, 25)))
        if rng.random() < 0.2:
            driver.at(at_ns + rng.randrange(100) * MS, EndRequest(str(number)))
    ends = []
    while (result := driver.step()) is not None:
        driver.core.check_invariants()
        ends += [event for event in result.events if isinstance(event, RequestFinished)]
    assert len(ends) == 60 and all(end.reason is not FinishReason.ERROR for end in ends)
    stats = driver.core.stats()
    assert stats.adapters is not None and stats.adapters.num_evictions > 0
    assert stats.num_free_blocks + stats.num_cached_blocks == 24


def test_runs_of_decodes_make_the_same_decisions() -> None:
    """Single steps and runs agree on every end, with loads in between."""
    found = []
    for whole in (True, False):
        driver = build_driver(header(lora=LORA))
        for number, name in enumerate("abcdabcd"):
            driver.at(number * 20 * MS, submit(str(number), name, max_tokens=30))
        ends = []
        while (result := (driver.advance() if whole else driver.step())) is not None:
            ends += [(e.request_id, e.at_ns) for e in result.events if isinstance(e, RequestFinished)]
        found.append(ends)
    assert found[0] == found[1] and len(found[0]) == 8


def test_a_recording_has_the_adapters(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "log", header(lora=LORA))
    recorder.close()
    assert Recording(tmp_path / "log").header.config.lora == LORA


def test_programs_name_adapters(tmp_path: Path) -> None:
    programs = [Program(f"p{n}", (Turn(50, 5, 100.0), Turn(20, 5)), adapter=f"x{n}") for n in range(6)]
    path = tmp_path / "programs.jsonl"
    dump_programs(programs, path)
    values = {"workload": str(path), "agents": 2, "model": "qwen2.5-3b"}
    few, many = (run_plan(make_plans((Cell(**values, max_loras=n),))[0])["summary"] for n in (1, 6))
    assert few != many, "the number of slots made no difference"
    dump_programs([Program("p", (Turn(50, 5),))], path)
    with pytest.raises(ConfigError, match="--max-loras"):
        make_plans((Cell(**values, max_loras=1),))
