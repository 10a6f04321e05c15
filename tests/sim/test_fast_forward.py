"""Runs of decode steps are what single steps would have been, to the last bit."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentserve.config import ControlConfig, TierConfig, TieringConfig
from agentserve.core.decision_log import describe
from agentserve.core.engine import StepResult
from agentserve.core.events import EndRequest
from agentserve.executors.simulated.executor import SimulatedExecutor
from agentserve.runtime.virtual import VirtualDriver
from agentserve.sim.cluster import Cluster, Instance, Link
from agentserve.sim.orchestrator import simulate
from agentserve.sim.programs import Program, Turn, Workload
from agentserve.sim.router import ROUTERS, build_router
from tests.core.builders import MS, core, cost_model, simulated, submit, virtual
from tests.core.test_determinism import WAYS

RELAXED = settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.too_slow])
TIERING = TieringConfig(block_bytes=4000, tiers=(TierConfig("host", 20, 4e5, 3e5, MS),), max_transfer_blocks=4)
"""A block takes 10 ms up and 13 ms down."""
POLICIES: tuple[dict[str, Any], ...] = (
    {},
    {"policy": "ttl"},
    {"policy": "evict_always"},
    {"policy": "continuum"},
    {"order": "plas"},
)


def lines(at_ns: int, result: StepResult) -> list[str]:
    return [f"{at_ns} {line}" for line in describe(result)]


def single_log(driver: VirtualDriver) -> list[str]:
    log = []
    while (result := driver.step()) is not None:
        log += lines(driver.clock.now_ns(), result)
    return log


def fast_log(driver: VirtualDriver) -> tuple[list[str], int]:
    """The log with runs taken apart, and how many steps were in runs."""
    log: list[str] = []
    num_in_runs = 0
    while (result := driver.advance()) is not None:
        if result.run is None:
            log += lines(driver.clock.now_ns(), result)
            continue
        driver.core.check_invariants()
        num_in_runs += result.run.num_steps
        for output, step in result.run.single_steps(result):
            log += lines(output.finished_ns, step)
        assert driver.clock.now_ns() == result.run.ends_ns[-1]
    return log, num_in_runs


def state(driver: VirtualDriver) -> tuple[object, ...]:
    """What later decisions depend on, as far as it can be compared."""
    memory = driver.core.memory
    free = [memory._pool.is_free(block) for block in range(memory.num_blocks)]
    nodes = [(node.key, node.block_id, node.last_access) for node in memory._tree.nodes()]
    controller = driver.core._scheduler._controller
    if controller is None:
        return driver.core.stats(), free, nodes
    known = {k: repr(v) for k, v in vars(controller).items() if isinstance(v, int | float | tuple | None)}
    corrections = getattr(controller, "_corrections", None)
    return driver.core.stats(), free, nodes, known, corrections and repr(vars(corrections))


@st.composite
def calls(draw: st.DrawFn) -> list[tuple[int, Any]]:
    """Calls with shared prefixes, outputs up to 60 tokens, stop tokens, and a few that are cancelled."""
    made: list[tuple[int, Any]] = []
    for index in range(draw(st.integers(1, 14))):
        base = draw(st.integers(0, 2)) * 1000
        prompt = [base + i for i in range(draw(st.integers(1, 50)))] + draw(st.lists(st.integers(0, 9), max_size=6))
        at_ns = draw(st.integers(0, 400)) * MS
        command = submit(f"r{index}", prompt, max_tokens=draw(st.integers(1, 60)), seed=index)
        if draw(st.booleans()):
            stops = draw(st.sampled_from([(7,), (7, 8), (105,)]))
            command = dataclasses.replace(
                command, sampling=dataclasses.replace(command.sampling, stop_token_ids=stops, min_tokens=1)
            )
        made.append((at_ns, command))
        if draw(st.integers(0, 5)) == 0:
            made.append((at_ns + draw(st.integers(0, 300)) * MS, EndRequest(f"r{index}")))
    return made


@pytest.mark.parametrize("name", WAYS)
@RELAXED
@given(commands=calls(), num_blocks=st.sampled_from([30, 40, 200]), lookahead=st.sampled_from([1, 2]))
def test_runs_are_what_single_steps_are(name: str, commands: list[Any], num_blocks: int, lookahead: int) -> None:
    values = {"num_blocks": num_blocks, "max_model_len": 110, "decode_lookahead": lookahead, **WAYS[name]}
    single, fast = virtual(**values), virtual(**values)
    for at_ns, command in commands:
        single.at(at_ns, command)
        fast.at(at_ns, command)
    assert fast_log(fast)[0] == single_log(single)
    assert state(fast) == state(single)


@RELAXED
@given(commands=calls(), num_blocks=st.sampled_from([30, 40]), policy=st.sampled_from(POLICIES), tiered=st.booleans())
def test_runs_with_policies_and_tiers(
    commands: list[Any], num_blocks: int, policy: dict[str, Any], tiered: bool
) -> None:
    tiering = TIERING if tiered else None
    values = {"num_blocks": num_blocks, "max_model_len": 110, "control": ControlConfig(), "tiering": tiering, **policy}
    single, fast = (
        VirtualDriver(
            core(**values),
            SimulatedExecutor(
                cost_model(), num_blocks=num_blocks, block_size=4, vocabulary=range(100, 120), tiering=tiering
            ),
        )
        for _ in range(2)
    )
    for at_ns, command in commands:
        single.at(at_ns, command)
        fast.at(at_ns, command)
    assert fast_log(fast)[0] == single_log(single)
    assert state(fast) == state(single)


def test_most_decode_steps_are_in_runs() -> None:
    driver = virtual(num_blocks=200)
    driver.at(0, submit("a", 8, max_tokens=100))
    driver.at(50 * MS, submit("b", 8, max_tokens=50, seed=1))
    _, num_in_runs = fast_log(driver)
    # 99 batches give the tokens of `a` behind its first one. Those of `b` are in the same batches.
    assert 90 <= num_in_runs <= 99


def test_a_run_ends_before_a_command() -> None:
    driver = virtual(num_blocks=200)
    driver.at(0, submit("a", 8, max_tokens=100))
    driver.at(100 * MS, EndRequest("a"))
    log, num_in_runs = fast_log(driver)
    assert num_in_runs > 0
    # The batch in flight at that time is waited for.
    finished = [line for line in log if "finish a" in line]
    assert len(finished) == 1
    assert 100 * MS <= int(finished[0].split()[0]) < 110 * MS


# ---- the simulator ----


def cluster(num_instances: int, router: str, overload: str, **values: Any) -> Cluster:
    instances = [Instance(core(**values), simulated(values["num_blocks"])) for _ in range(num_instances)]
    link = Link(kv_bytes_per_token=100_000)
    return Cluster(instances, build_router(router, overload=overload, overload_calls=1), link)


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    programs = []
    for index in range(draw(st.integers(1, 8))):
        turns = draw(
            st.lists(
                st.builds(Turn, st.integers(1, 30), st.integers(1, 25), st.sampled_from([0.0, 1.0, 20.0, 100.0])),
                min_size=1,
                max_size=3,
            )
        )
        arrival_ms = float(draw(st.integers(0, 100)))
        programs.append(Program(f"p{index}", tuple(turns), arrival_ms=arrival_ms))
    return Workload("w", tuple(programs), None)


@RELAXED
@given(
    workload=workloads(),
    num_instances=st.integers(1, 3),
    router=st.sampled_from(ROUTERS),
    overload=st.sampled_from(["wait", "re-prefill", "move"]),
    control=st.sampled_from(["static", "reactive", "predictive"]),
    num_blocks=st.sampled_from([70, 200]),
    max_batches=st.sampled_from([None, 0, 7]),
)
def test_a_cluster_that_leaves_steps_out(
    workload: Workload,
    num_instances: int,
    router: str,
    overload: str,
    control: str,
    num_blocks: int,
    max_batches: int | None,
) -> None:
    values = {"num_blocks": num_blocks, "control": ControlConfig(controller=control)}
    runs = [
        simulate(
            workload,
            cluster(num_instances, router, overload, **values),
            max_batches=max_batches,
            fast_forward=fast_forward,
        )
        for fast_forward in (False, True)
    ]
    assert runs[0] == runs[1]
