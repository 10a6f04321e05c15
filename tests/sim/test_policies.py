"""Policies on programs: the published comparison, the check that a policy did anything, and the command line's part."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest

from agentserve.build.simulation import build_driver, make_plans
from agentserve.core.stats import EngineStats, PolicyStats
from agentserve.errors import ConfigError
from agentserve.sim.cells import expand
from agentserve.sim.mechanism_check import MEANS, mechanism_check
from agentserve.sim.metrics import summarize
from agentserve.sim.orchestrator import SimulatedRun, simulate
from agentserve.sim.report import is_comparable, refusals, row
from tests.core import builders

CODING = {
    "workload": "coding_agent",
    "programs": "16",
    "rate": "0.6",
    "scale": "0.25",
    "kv_cache_memory": "450MiB",
    "max_model_len": "7500",
}


def run(gap_factor: float = 1.0, **values: str) -> SimulatedRun:
    """A coding workload on simulated hardware; `gap_factor` stretches its tool times."""
    (plan,) = make_plans(expand({**CODING, **values}))
    programs = tuple(
        dataclasses.replace(
            program,
            turns=tuple(dataclasses.replace(turn, tool_gap_ms=turn.tool_gap_ms * gap_factor) for turn in program.turns),
        )
        for program in plan.workload.programs
    )
    return simulate(dataclasses.replace(plan.workload, programs=programs), build_driver(plan.header))


def mean_jct_s(made: SimulatedRun) -> float:
    mean_ns = summarize(made.records).to_json()["job_completion_ns"]["mean"]
    assert isinstance(mean_ns, float | int)
    return mean_ns / 1e9


def test_continuum_beats_fcfs_at_the_measured_tool_times_when_memory_is_tight() -> None:
    """AgentServeSim, section 5: 190.9 s against 260.5 s, -26.7 %, at the tool times of SWE-bench."""
    fcfs, continuum = run(policy="lru", order="fcfs"), run(policy="continuum")
    assert not any(record.error for record in (*fcfs.records, *continuum.records))
    assert mean_jct_s(continuum) < 0.9 * mean_jct_s(fcfs)


def test_holding_new_programs_back_is_better_than_thrashing() -> None:
    """Tools that are quick, in memory for a third of the contexts: each program that is let in beyond that evicts what
    another one needs next. Fewer at a time are done sooner, all of them, and on average."""
    free, held = (run(0.2, admission=name) for name in ("none", "working_set"))
    assert not any(record.error for record in (*free.records, *held.records))
    assert mean_jct_s(held) < 0.85 * mean_jct_s(free)
    hits = [made.stats[0].num_prefix_hit_tokens / made.stats[0].num_prefix_query_tokens for made in (free, held)]
    assert hits[1] > hits[0] + 0.1


def test_in_ample_memory_no_policy_fires_and_none_is_compared() -> None:
    (plan,) = make_plans(expand({**CODING, "kv_cache_memory": "8GiB", "policy": "ttl"}))
    mechanism = mechanism_check(plan.header.config, run(kv_cache_memory="8GiB", policy="ttl").stats)
    assert mechanism.why_not == (
        "ttl never fired: nothing was evicted that lru would have kept, and its pins held nobody back"
    )
    assert mechanism.counts["pins_held"] > 0


def stats(policy: str = "lru", order: str = "default", failures: Any = (), **counts: int) -> EngineStats:
    return EngineStats(policies=PolicyStats(policy, order, counts, dict(failures)))


def test_the_counts_of_all_instances_are_taken_together() -> None:
    config = builders.config(policy="ttl", order="plas")
    good = mechanism_check(config, [stats(evictions_unlike_lru=1), stats(reorders=2, evictions_unlike_lru=3)])
    assert (good.why_not, good.counts) == (None, {"evictions_unlike_lru": 4, "reorders": 2})
    half = mechanism_check(config, [stats(admissions_held_back=1)])
    assert half.why_not == "plas never fired: no call came before one that had arrived earlier"


def test_a_policy_that_raised_is_not_compared() -> None:
    config = builders.config(policy="ttl")
    found = mechanism_check(config, [stats(evictions_unlike_lru=1, failures={"ttl": "KeyError: 1"})])
    assert found.why_not == "ttl raised KeyError: 1, and the built-in took its place"


def test_baselines_need_not_fire() -> None:
    assert mechanism_check(builders.config(), [EngineStats()]).why_not is None
    assert mechanism_check(builders.config(order="fcfs"), [stats()]).why_not is None
    assert mechanism_check(builders.config(admission="working_set"), [stats(calls_held=1)]).why_not is None
    assert "working_set never fired: it let every call in at once" in (
        mechanism_check(builders.config(admission="working_set"), [stats()]).why_not or ""
    )
    assert "lru never fired" in (mechanism_check(builders.config(protect_anchors=True), [stats()]).why_not or "")
    assert set(MEANS) >= {"belady", "srpt"}


def test_oracles_are_bounds_here() -> None:
    few = {"programs": "7"}
    runs = {policy: run(policy=policy, **few) for policy in ("lru", "evict_always", "belady")}
    hits = {policy: made.stats[0].num_prefix_hit_tokens for policy, made in runs.items()}
    assert hits["evict_always"] < hits["lru"] <= hits["belady"]
    assert mean_jct_s(run(order="srpt", **few)) <= mean_jct_s(run(order="fcfs", **few))


def test_a_sweep_leaves_out_the_order_that_continuum_brings() -> None:
    cells = expand({"policy": "ttl,continuum", "order": "default,plas"})
    assert [(cell.policy, cell.order) for cell in cells] == [
        ("ttl", "default"),
        ("ttl", "plas"),
        ("continuum", None),
    ]
    with pytest.raises(ConfigError, match="--policy: must be one of"):
        expand({"policy": "mru"})


def test_what_must_not_be_compared_has_no_numbers_in_a_sweep() -> None:
    distribution = dict.fromkeys(("p50", "p95", "mean"), 1.0)
    everything = {"ttft_ns": distribution, "tpot_ns": distribution, "itl_ns": distribution, "num_errors": 0}
    summary = {
        "all": everything,
        "job_completion_ns": distribution,
        "output_tokens_per_s": 1.0,
        "num_cached_tokens": 1,
        "num_prompt_tokens": 2,
    }
    result = {
        "parameters": {"policy": "ttl", "agents": 3},
        "workload": {"title": "react"},
        "summary": summary,
        "mechanism": {"why_not": "ttl never fired: so it was"},
        "num_preemptions": 0,
        "instances": [{"kv": {"mean_held": 0.5, "peak_held": 0.5}}],
    }
    assert not is_comparable(result, ("policy",)) and is_comparable(result, ("agents",))
    assert set(row(result, ("policy",))[1:]) == {"-"} and "-" not in row(result, ("agents",))
    assert refusals([result], ("policy",)) == ["policy ttl: not compared, ttl never fired: so it was"]
    assert refusals([result], ()) == ["react: says nothing about its policy, ttl never fired: so it was"]


def test_two_runs_decide_the_same() -> None:
    for policy, order in itertools.product(("ttl",), ("plas",)):
        assert run(policy=policy, order=order).records == run(policy=policy, order=order).records
