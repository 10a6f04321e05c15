"""Policies of others: loaded by name, refused in one sentence, and isolated when they raise."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from importlib.metadata import EntryPoint, EntryPoints
from typing import Any

import pytest

from agentserve.build import policies, simulation
from agentserve.config import EngineConfig, resolve
from agentserve.config import names as configuration
from agentserve.core.agents.factory import PolicyContext
from agentserve.core.agents.policy import ToolUse
from agentserve.core.agents.registry import AgentRegistry
from agentserve.core.events import PolicyFailed, RequestAdmitted
from agentserve.errors import ConfigError
from agentserve.sim.cells import expand
from tests.composition import plugin_policies
from tests.core.builders import finished, header, submit

HERE = "tests.composition.plugin_policies"


def context(name: str) -> PolicyContext:
    return PolicyContext(name, AgentRegistry(), None, None)


def registered(monkeypatch: pytest.MonkeyPatch, **entries: tuple[str, ...]) -> None:
    made = EntryPoints(EntryPoint(n, v, configuration.POLICY_GROUP) for n, values in entries.items() for v in values)

    def select(**values: Any) -> EntryPoints:
        return made.select(**values)

    monkeypatch.setattr(configuration, "entry_points", select)
    monkeypatch.setattr(policies, "entry_points", select)
    assert importlib.metadata.entry_points(group=configuration.POLICY_GROUP, name="mine") == ()


def test_a_plug_in_decides_what_stays() -> None:
    driver = simulation.build_driver(
        header(policy=f"{HERE}:MostTurnsStay", protect_anchors=False, num_blocks=24, max_model_len=64)
    )
    # a calls twice, then b and c once each: with 24 blocks of 4 tokens there is room for two of three histories.
    for index, (session, first) in enumerate([("a", 1000), ("a", 1000), ("b", 2000), ("c", 3000), ("a", 1000)]):
        prompt = range(first, first + 40)
        driver.at(driver.clock.now_ns(), submit(f"r{index}", prompt, max_tokens=1, session_id=session))
        done = finished(driver.run())
        driver.core.check_invariants()
    assert done["r4"].stats.num_cached_tokens == 36  # lru would have evicted it for c
    stats = driver.core.stats().policies
    assert stats is not None and stats.policy == f"{HERE}:MostTurnsStay" and stats.counts["evictions_unlike_lru"]


def test_one_that_raises_loses_its_seat_under_its_own_name() -> None:
    name = f"{HERE}:Raising"
    driver = simulation.build_driver(header(policy=name))
    driver.at(0, submit("r", 20))
    results = driver.run()
    assert finished(results)["r"].error is None
    failed = [event for result in results for event in result.events if isinstance(event, PolicyFailed)]
    assert [(event.policy, event.error) for event in failed] == [(name, "RuntimeError: out of ideas")]


def test_a_plug_in_holds_calls_back_and_refuses_tool_calls() -> None:
    name = f"{HERE}:OneProgram"
    driver = simulation.build_driver(header(admission=name))
    for request_id, session, is_last in (("a", "s", False), ("b", "t", True), ("c", "s", True)):
        driver.at(0, submit(request_id, 8, session_id=session, is_last_turn=is_last))
    order = [
        event.request_id for result in driver.run() for event in result.events if isinstance(event, RequestAdmitted)
    ]
    assert order == ["a", "c", "b"]
    config = resolve({"safety": name, "tool_allow": "*=read,write_file"}, {}, {}).config
    listed, other = policies.safety_policies(config)
    use = ToolUse("a", "write_file")
    assert (listed.refusal(use), other.refusal(use)) == (None, "nothing is written here")
    assert policies.safety_policies(resolve({}, {}, {}).config) == []


def test_one_policy_may_have_several_seats() -> None:
    name = f"{HERE}:OneProgram"
    driver = simulation.build_driver(header(policy=name, order=name, admission=name, protect_anchors=False))
    agents = driver.core.agents
    assert len(agents._hooks.policies) == 1


def test_it_may_be_told_what_it_is_made_with() -> None:
    made = policies.with_plugins(f"{HERE}:NeedsContext")[f"{HERE}:NeedsContext"](context("n"))
    assert isinstance(made, plugin_policies.NeedsContext) and made.context.name == "n"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tests.no_such_module:Policy", "cannot import tests.no_such_module: ModuleNotFoundError"),
        (f"{HERE}:Missing", f"{HERE} has no Missing"),
        (f"{HERE}:NOT_A_POLICY", "is no subclass of agentserve.core.agents.Policy"),
        ("nobody", "there is no policy 'nobody'; there are lru, anchor"),
    ],
)
def test_what_cannot_be_used_is_refused_at_the_start(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        policies.with_plugins(name)


def test_one_that_cannot_be_made_is_refused_at_the_start() -> None:
    with pytest.raises(ConfigError, match=r"CannotBeMade' cannot be made: OSError: no such file"):
        simulation.build_driver(header(policy=f"{HERE}:CannotBeMade"))


def test_packages_register_policies_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    registered(monkeypatch, mine=(f"{HERE}:MostTurnsStay",), twice=("a:B", "c:D"))
    assert resolve({"policy": "mine"}, {}, {}).config.policy == "mine"
    made = policies.with_plugins("mine", "lru")["mine"](context("mine"))
    assert isinstance(made, plugin_policies.MostTurnsStay)
    with pytest.raises(ConfigError, match="'twice' is registered twice: a:B, c:D"):
        policies.with_plugins("twice")


def test_names_are_checked_where_they_are_typed() -> None:
    for wrong in ("mru", "a b:C", ":C", "a:", "module:Class"):
        with pytest.raises(ConfigError, match="policy"):
            EngineConfig(num_blocks=8, max_model_len=64, policy=wrong)
        with pytest.raises(ConfigError, match=r"--policy: must be one of .*module:Class"):
            expand({"policy": wrong})


def test_no_recording_makes_the_simulator_import_code() -> None:
    (cell,) = expand({})
    config = header(policy=f"{HERE}:MostTurnsStay").config
    with pytest.raises(ConfigError, match=f"--policy {HERE}:MostTurnsStay uses it"):
        simulation._check_plugins(cell, config)
    simulation._check_plugins(dataclasses.replace(cell, policy=config.policy), config)
