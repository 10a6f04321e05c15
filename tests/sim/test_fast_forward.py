"""Runs of decode steps are what single steps would have been, to the last bit."""

from __future__ import annotations

import dataclasses
from itertools import accumulate
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentserve.config import ControlConfig, TierConfig, TieringConfig
from agentserve.core.batch import Batch, BatchShape, Lane, ScheduledChunk
from agentserve.core.controllers import ControlSignal, DecodeSteps, follow_singly
from agentserve.core.costmodel import CostModel
from agentserve.core.decision_log import describe
from agentserve.core.engine import StepResult
from agentserve.core.events import EndRequest
from agentserve.core.request import WorkClass
from agentserve.core.slots import PartitionKind, SlotPartition
from agentserve.executors.simulated.executor import SimulatedExecutor
from agentserve.runtime.virtual import VirtualDriver
from agentserve.sim.cluster import Cluster, Instance, Link
from agentserve.sim.orchestrator import simulate
from agentserve.sim.programs import Program, Turn, Workload
from agentserve.sim.router import ROUTERS, build_router
from tests.core.builders import MS, core, cost_model, simulated, submit, virtual
from tests.core.test_determinism import WAYS

RELAXED = settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
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
    return driver.core.stats(), free, nodes, known(controller)


def known(controller: object) -> tuple[object, ...]:
    """What a controller remembers."""
    values = {k: repr(v) for k, v in vars(controller).items() if isinstance(v, int | float | tuple | None)}
    corrections = getattr(controller, "_corrections", None)
    return values, corrections and repr(vars(corrections))


def check(commands: list[Any], device: CostModel, values: dict[str, Any]) -> None:
    """Runs the same commands both ways on a device, and compares."""
    single, fast = (
        VirtualDriver(
            core(**values),
            SimulatedExecutor(
                device,
                num_blocks=values["num_blocks"],
                block_size=4,
                vocabulary=range(100, 120),
                lookahead=values.get("decode_lookahead", 1),
                tiering=values.get("tiering"),
            ),
        )
        for _ in range(2)
    )
    for at_ns, command in commands:
        single.at(at_ns, command)
        fast.at(at_ns, command)
    assert fast_log(fast)[0] == single_log(single)
    assert state(fast) == state(single)


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
    check(commands, cost_model(), values)


@RELAXED
@given(commands=calls(), num_blocks=st.sampled_from([30, 40]), policy=st.sampled_from(POLICIES), tiered=st.booleans())
def test_runs_with_policies_and_tiers(
    commands: list[Any], num_blocks: int, policy: dict[str, Any], tiered: bool
) -> None:
    tiering = TIERING if tiered else None
    values = {"num_blocks": num_blocks, "max_model_len": 110, "control": ControlConfig(), "tiering": tiering, **policy}
    check(commands, cost_model(), values)


@pytest.mark.parametrize("name", ["reactive", "predictive", "predictive-ttft"])
@RELAXED
@given(commands=calls(), slower=st.sampled_from([0.8, 1.25]), lookahead=st.sampled_from([1, 2]))
def test_runs_on_a_device_that_is_not_as_predicted(
    name: str, commands: list[Any], slower: float, lookahead: int
) -> None:
    """Controllers have corrections to learn, at every step."""
    values = {"num_blocks": 200, "max_model_len": 110, "decode_lookahead": lookahead, **WAYS[name]}
    check(commands, cost_model(bandwidth_bytes_per_s=1e9 / slower, flops_per_s=2e9 * slower), values)


@st.composite
def decode_steps(draw: st.DrawFn) -> DecodeSteps:
    """Batches that take what is predicted, or not, beside a lane that is busy or idle, with prompts to read or none."""
    num_decodes, is_shared = draw(st.integers(1, 5)), draw(st.booleans())
    # A plan is made anew after some decisions, and when the mean context passes a multiple of 256.
    context = num_decodes * draw(st.integers(1, 600) | st.integers(240, 256)) + draw(st.integers(0, 4))
    shape = BatchShape(num_decodes, context, num_samples=num_decodes)
    partition = SlotPartition(8, 8, PartitionKind.STREAM if is_shared else PartitionKind.WHOLE)
    chunk = ScheduledChunk("r", WorkClass.DECODE, 0, (1,), (0,), None)
    batch = Batch(0, Lane.DECODE, partition, draw(st.sampled_from([is_shared, is_shared, not is_shared])), (chunk,))
    count, started_ns = draw(st.integers(1, 30)), draw(st.integers(0, 10**9))
    durations = cost_model().decode_durations(shape, partition, is_shared, count)
    delays = draw(st.one_of(st.just([0] * count), st.lists(st.integers(-MS, MS), min_size=count, max_size=count)))
    ends = accumulate([took + late for took, late in zip(durations, delays, strict=True)], initial=started_ns)
    pending, resume = draw(st.sampled_from([0, 0, 40])), draw(st.sampled_from([0, 0, 25]))
    oldest_ns = started_ns - 5 * MS if pending + resume else None
    signal = ControlSignal(started_ns, shape, resume, pending, 0, (resume > 0) + (pending > 0), 0, 0, oldest_ns)
    return DecodeSteps(batch, shape, started_ns, list(ends)[1:], is_shared, signal)


@pytest.mark.parametrize("name", ["static", "reactive", "predictive", "predictive-ttft"])
@settings(max_examples=40)
@given(parts=st.lists(decode_steps(), min_size=1, max_size=6))
def test_controllers_follow_batches_as_they_would_one_by_one(name: str, parts: list[DecodeSteps]) -> None:
    bulk, single = (core(**WAYS[name])._scheduler._controller for _ in range(2))
    assert bulk is not None and single is not None
    for steps in parts:
        present = bulk.decide(steps.signal)
        assert present == single.decide(steps.signal)
        assert bulk.follow(steps, present) == follow_singly(single, steps, present)
        assert known(bulk) == known(single)


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
