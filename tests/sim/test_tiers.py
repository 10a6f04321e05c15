"""`agentserve simulate` with host memory below the KV cache: its options, its report, and what it is good for."""

from __future__ import annotations

from typing import Any

import pytest

from agentserve.build.simulation import make_plans, run_plan
from agentserve.core.transfers import Tier
from agentserve.errors import ConfigError
from agentserve.executors.simulated.links import SimulatedLinks
from agentserve.profiles.links import TierSizes, host_link, make_tiering
from agentserve.sim.cells import expand
from agentserve.sim.plots import draw_residency

BUSY = {"workload": "coding_agent:programs=8,scale=0.4", "rate": "1", "kv_cache_memory": "512MiB"}
"""Eight programs of about 38 turns that start within seconds and together need several times the KV cache."""


def simulated(**options: str) -> dict[str, Any]:
    (plan,) = make_plans(expand(options))
    return dict(run_plan(plan))


def mean_jct_s(result: dict[str, Any]) -> float:
    return float(result["summary"]["job_completion_ns"]["mean"]) / 1e9


def test_a_host_tier_cuts_the_mean_job_completion_time_by_a_quarter_where_memory_is_short() -> None:
    without, with_host = simulated(**BUSY), simulated(**BUSY, kv_offloading_size="16")
    assert mean_jct_s(with_host) < 0.75 * mean_jct_s(without)
    (host,) = with_host["instances"][0]["kv"]["tiers"]
    assert host["num_hit_tokens"] > 0 and host["loaded_bytes"] > host["stored_bytes"] > 0
    assert host["num_used_blocks"] <= host["num_blocks"]
    # [ns, held, cached, in the host]: it fills, and never overflows.
    assert all(len(sample) == 4 and sample[3] <= host["num_blocks"] for sample in with_host["residency"][0])
    draw_residency(with_host, ())


def test_where_memory_is_ample_it_changes_nothing() -> None:
    ample = {**BUSY, "kv_cache_memory": "8GiB"}
    assert mean_jct_s(simulated(**ample)) == mean_jct_s(simulated(**ample, kv_offloading_size="16"))


def test_sizes_and_links_become_tiers_with_a_note_each() -> None:
    options = {"kv_offloading_size": "4", "cxl_size": "8", "host_link_gb_per_s": "20", "kv_write_back": "on_evict"}
    (plan,) = make_plans(expand(options))
    tiering = plan.header.config.tiering
    assert tiering is not None and tiering.write_back == "on_evict"
    host, cxl = tiering.tiers
    # qwen2.5-7b in bfloat16: 28 layers, 4 KV heads of 128, keys and values: 57,344 bytes a token, 917,504 a block.
    assert (host.name, host.num_blocks, host.read_bytes_per_s) == ("host", 4 * 2**30 // 917_504, 20e9)
    assert (cxl.name, cxl.num_blocks) == ("cxl", 8 * 2**30 // 917_504)
    assert ["as given" in note or "estimated" in note for note in plan.notes[-2:]] == [True, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host_link_gb_per_s": "20"}, "--host-link-gb-per-s needs --kv-offloading-size"),
        ({"cxl_link_gb_per_s": "20", "kv_offloading_size": "1"}, "--cxl-link-gb-per-s needs --cxl-size"),
        ({"kv_write_back": "on_evict"}, "--kv-write-back needs"),
        ({"kv_offloading_size": "0.0001"}, "it needs room for one at least"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plans(expand(options))


def test_a_card_has_the_link_of_its_generation() -> None:
    # 16e9 transfers/s * 128/130 * 16 lanes / 8 bits = 31.5 GB/s, of which 80 % are reached.
    assert host_link("rtx-4090").bytes_per_s == pytest.approx(25.2e9, rel=1e-3)
    assert host_link("rtx-5090").bytes_per_s == pytest.approx(50.4e9, rel=1e-3)
    assert "a guess" in host_link("something else").source
    assert make_tiering(TierSizes(host_gib=0.0), "rtx-4090", 1000) == (None, ())


def test_a_device_without_tiers_has_no_links() -> None:
    links = SimulatedLinks(None, 4)
    assert links.tiers == (Tier.DEVICE,)
    assert links.next_completion_ns() is None
    assert links.poll(10**9) == []
