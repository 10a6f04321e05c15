"""The live comparison of policies: its world, its adapters, and what it makes of calls."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agentserve.models.lora import linear_shapes, read_adapter
from agentserve.models.registry import resolve_model
from bench.load.client import Call
from bench.scalesim.adapters import write_adapters
from bench.scalesim.live import World, make_server, summary, table
from bench.scalesim.runs import SYSTEMS


def test_adapters_are_read_by_the_daemon(tmp_path: Path) -> None:
    model = resolve_model("smollm2-135m").config
    assert model is not None
    write_adapters(tmp_path, ["a"], model, rank=4)
    adapter = read_adapter("a", tmp_path / "a", model, max_rank=4)
    num_elements = model.num_layers * 4 * sum(map(sum, linear_shapes(model).values()))
    assert (adapter.rank, adapter.num_bytes, adapter.scaling) == (4, 4 * num_elements, 1.0)


def test_a_fifth_of_the_agents_calls_in_a_step_and_prompts_grow() -> None:
    world = World()
    steps, programs = world.steps(), world.programs()
    num_calls = sum(len(step.calls) for step in steps)
    assert sum(len(program.turns) for program in programs.values()) == num_calls
    assert 0.15 < num_calls / len(steps) / world.num_agents < 0.25
    for name, program in programs.items():
        assert program.adapter == name
        assert list(program.num_prompt_tokens) == sorted(set(program.num_prompt_tokens))
        assert 150 <= program.num_prompt_tokens[0] <= 300
    assert all(step.distances for step in steps)


def test_the_systems_differ_in_policy_and_tier_only(tmp_path: Path) -> None:
    commands = {system: make_server(system, World(), tmp_path).command for system in SYSTEMS}
    options = {system: dict(zip(c[4::2], c[5::2], strict=True)) for system, c in commands.items()}
    named = {system: (o.pop("--policy"), o.pop("--kv-offloading-size")) for system, o in options.items()}
    assert named == {
        "lru": ("lru", "0.0"),
        "hierarchical": ("lru", "1.0"),
        "scalesim": ("invocation_distance", "1.0"),
    }
    assert options["lru"] == options["hierarchical"] == options["scalesim"]
    # Memory for as many agents as there are slots for adapters; their prompts do not all fit.
    assert int(options["lru"]["--max-loras"]) == World().num_residents < World().num_agents


def call(ttft_ms: int, num_cached: int) -> Call:
    call = Call("s", sent_ns=1_000_000, num_prompt_tokens=200, num_cached_tokens=num_cached, num_output_tokens=2)
    call.chunks = [((1 + ttft_ms) * 1_000_000, 1), ((9 + ttft_ms) * 1_000_000, 1)]
    return call


def test_means_are_taken_behind_the_warm_up() -> None:
    world = World(num_warm_steps=1)
    calls = [[call(900, 0)], [call(10, 100), call(30, 200)], [call(20, 0)]]
    play: Any = SimpleNamespace(calls=calls, step_ms=[900.0, 60.0, 40.0])
    found = summary(play, world)
    assert found["ttft_ms"] == pytest.approx(20.0) and found["ttft_p50_ms"] == pytest.approx(20.0)
    assert (found["num_calls"], found["active_per_step"], found["step_ms"]) == (3, 1.5, 50.0)
    assert (found["calls_per_s"], found["hit_rate"]) == (pytest.approx(30.0), 0.5)
    text = table([{"lru": found}, {"lru": {**found, "ttft_ms": 40.0}}])
    assert "mean      30.0" in text and text.count(SYSTEMS["lru"]) == 3 and SYSTEMS["scalesim"] not in text
