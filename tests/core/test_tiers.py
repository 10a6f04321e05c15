"""KV tiers on a virtual clock: what is loaded, when exactly, and what is computed instead.

The device computes a token of a prompt in 1 ms and at least 8 ms a batch, and reads the KV of a token in 1 us; a block
has 4 tokens and 4,000 bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agentserve.config import EngineConfig, TierConfig, TieringConfig
from agentserve.core.batch import Batch, BatchOutput
from agentserve.core.decision_log import describe
from agentserve.core.events import EndRequest, RequestAdmitted, RequestFinished
from agentserve.core.executor import Tier, require_tiers
from agentserve.core.memory.tiers import child_id, root_id
from agentserve.core.transfers import StoredBlock, TierContents, Transfer, TransferOutput
from agentserve.errors import ConfigError
from agentserve.runtime.recording import Header, Recorder, Recording
from agentserve.runtime.virtual import VirtualDriver
from tests.core.builders import MS, config, simulated, submit, virtual

FAST = 2_000_000.0
"""Bytes a second: 2 ms a block."""


def tiers(*sizes: int, bytes_per_s: float = FAST, **values: Any) -> TieringConfig:
    """The first is the host, the second CXL; 1 ms latency."""
    named = zip(("host", "cxl"), sizes, strict=False)
    return TieringConfig(
        4000, tuple(TierConfig(name, size, bytes_per_s, bytes_per_s, MS) for name, size in named), **values
    )


def returning(tiering: TieringConfig | None, **values: Any) -> VirtualDriver:
    """`a` (40 tokens) comes, leaves, is evicted by `b`, which needs all 22 blocks, and comes again as `c` at 1 s."""
    driver = virtual(num_blocks=22, max_model_len=88, tiering=tiering, **values)
    prompt = tuple(range(40))
    driver.at(0, submit("a", prompt, max_tokens=1))
    driver.at(300 * MS, submit("b", 85, max_tokens=1))
    driver.at(1000 * MS, submit("c", prompt, max_tokens=1))
    return driver


def ends(driver: VirtualDriver) -> dict[str, RequestFinished]:
    found = {}
    while (result := driver.step()) is not None:
        driver.core.check_invariants()
        found.update({e.request_id: e for e in result.events if isinstance(e, RequestFinished)})
    return found


def ttft_ms(end: RequestFinished) -> float:
    assert end.stats.first_token_ns is not None
    return (end.stats.first_token_ns - end.stats.arrival_ns) / MS


def test_without_tiers_an_evicted_prefix_is_computed_again() -> None:
    end = ends(returning(None))["c"]
    # Chunks of 16, 16 and 8 tokens, which end at 16, 32 and 40.
    assert (end.stats.num_cached_tokens, ttft_ms(end)) == (0, 40.088)


def test_a_load_takes_latency_and_bytes_over_bandwidth() -> None:
    driver = returning(tiers(64))
    end = ends(driver)["c"]
    # Nine blocks: 1 + 9 * 2 = 19 ms, sooner than their 36 tokens are computed. Then 4 tokens: 8 ms, as any batch.
    assert (end.stats.num_cached_tokens, ttft_ms(end)) == (36, 27.04)
    (host,) = driver.core.stats().tiers
    # Stored: the 10 blocks of `a` and the 21 full ones of `b`.
    assert (host.num_hit_tokens, host.loaded_bytes, host.stored_bytes) == (36, 9 * 4000, 31 * 4000)
    assert (host.num_used_blocks, host.num_dropped_blocks, host.num_failed_transfers) == (31, 0, 0)


def test_a_load_is_cut_in_transfers_and_each_has_its_latency() -> None:
    end = ends(returning(tiers(64, max_transfer_blocks=4)))["c"]
    # Four, four and one block: 3 * 1 + 9 * 2 = 21 ms.
    assert ttft_ms(end) == 29.04


def test_what_is_computed_sooner_is_neither_stored_nor_loaded() -> None:
    driver = returning(tiers(64, bytes_per_s=900_000.0))
    end = ends(driver)["c"]
    # 40 tokens: 1 + 10 * 4.4 = 45.4 ms against 40 ms. 84 tokens: 94.3 ms against 84 ms.
    assert (end.stats.num_cached_tokens, ttft_ms(end)) == (0, 40.088)
    assert driver.core.stats().tiers[0].stored_bytes == 0


def test_a_load_competes_with_those_before_it_on_the_link() -> None:
    driver = returning(tiers(64))
    driver.at(1000 * MS, submit("d", (*range(24), *range(500, 504)), max_tokens=1))
    found = ends(driver)
    assert found["c"].stats.num_cached_tokens == 36
    # `d` has 6 blocks in common with `c` and waits for these, as for any prefix that is on its way.
    assert found["d"].stats.num_cached_tokens == 24
    assert found["d"].stats.first_scheduled_ns == 1019 * MS


@pytest.mark.parametrize(("num_before", "num_cached"), [(0, 0), (20, 36)])
def test_what_is_computed_instead_waits_for_the_device(num_before: int, num_cached: int) -> None:
    driver = virtual(num_blocks=32, max_model_len=128, tiering=tiers(64))
    prompts = {name: tuple(range(100 * index, 100 * index + 40)) for index, name in enumerate("ax")}
    for name, prompt in prompts.items():
        driver.at(0, submit(name, prompt, max_tokens=1))
    driver.at(300 * MS, submit("b", 125, max_tokens=1))
    if num_before:
        driver.at(1000 * MS, submit("n", num_before, max_tokens=1))
    driver.at(1000 * MS, submit("c", prompts["a"], max_tokens=1))
    driver.at(1000 * MS, submit("d", prompts["x"], max_tokens=1))
    # The 9 blocks of `d` come behind those of `c`, after 1 + 18 * 2 = 37 ms; to compute them takes 36, behind others.
    assert ends(driver)["d"].stats.num_cached_tokens == num_cached


def test_on_evict_copies_only_what_has_to_leave_and_who_needs_the_room_waits() -> None:
    driver = returning(tiers(64, write_back="on_evict"))
    found = ends(driver)
    # `b` waits for the 10 blocks of `a`: 1 + 10 * 2 = 21 ms; then five chunks of 16 tokens and one of 5.
    assert ttft_ms(found["b"]) == pytest.approx(21 + 5 * 16 + 8 + (16 + 32 + 48 + 64 + 80 + 85) / 1000)
    # `c` needs 10 blocks and one is free: it waits for 9 of `b` to go down, then for 9 of its own to come up.
    assert ttft_ms(found["c"]) == 19 + 19 + 8.04
    assert driver.core.stats().tiers[0].stored_bytes == 19 * 4000


def test_a_full_tier_passes_its_oldest_blocks_on() -> None:
    driver = returning(tiers(21, 64))
    end = ends(driver)["c"]
    host, cxl = driver.core.stats().tiers
    assert end.stats.num_cached_tokens == 36
    assert host.num_hit_tokens + cxl.num_hit_tokens == 36
    # The 10 blocks of `a` made room for the 21 of `b`, and 10 of these for the blocks of `c`.
    assert (host.num_used_blocks, cxl.num_used_blocks, cxl.num_hit_tokens) == (21, 20, 36)


class Failing:
    """An executor whose copies to the device all fail."""

    def __init__(self, tiering: TieringConfig) -> None:
        self._inner = simulated(22, tiering=tiering)
        self._loads: set[int] = set()

    def submit(self, batch: Batch, now_ns: int) -> None:
        self._inner.submit(batch, now_ns)

    def submit_transfer(self, transfer: Transfer, now_ns: int) -> None:
        if transfer.destination is Tier.DEVICE:
            self._loads.add(transfer.transfer_id)
        self._inner.submit_transfer(transfer, now_ns)

    def poll(self, now_ns: int) -> list[BatchOutput | TransferOutput]:
        return [
            TransferOutput(o.transfer_id, o.started_ns, o.finished_ns, "made to fail")
            if isinstance(o, TransferOutput) and o.transfer_id in self._loads
            else o
            for o in self._inner.poll(now_ns)
        ]

    def next_completion_ns(self) -> int | None:
        return self._inner.next_completion_ns()


def test_a_failed_load_is_a_miss() -> None:
    whole = returning(tiers(64))
    driver = VirtualDriver(whole.core, Failing(tiers(64)))  # type: ignore[arg-type]  # what a driver needs of it
    driver._arrivals = whole._arrivals
    end = ends(driver)["c"]
    # 19 ms in vain, then all 40 tokens.
    assert (end.stats.num_cached_tokens, ttft_ms(end)) == (0, 59.088)
    (host,) = driver.core.stats().tiers
    # What could not be read is gone: the 9 blocks; the same content is stored again behind that.
    assert (host.num_failed_transfers, host.num_hit_tokens, host.num_used_blocks) == (1, 0, 31)


def test_a_cancelled_load_gives_everything_back() -> None:
    driver = returning(tiers(64, max_transfer_blocks=4))
    driver.at(1005 * MS, EndRequest("c"))  # in the first of three transfers, which takes 9 ms
    found = ends(driver)
    assert found["c"].at_ns == 1009 * MS
    assert driver.core.stats().tiers[0].loaded_bytes == 4 * 4000
    assert driver.core.memory.num_available_blocks == 22


def test_transfers_are_in_the_decision_log() -> None:
    driver = returning(tiers(64))
    lines = []
    while (result := driver.step()) is not None:
        lines += describe(result)
    assert "store 0 device>host 0-9>0-9" in lines
    # `c` has the blocks that `b` left first: those at the end of its prompt.
    assert "load 2 host>device 0-8>12-20" in lines


def test_a_run_with_unused_tiers_is_a_run_without() -> None:
    def log(tiering: TieringConfig | None) -> list[RequestAdmitted]:
        driver = virtual(num_blocks=200, tiering=tiering)
        for index in range(6):
            driver.at(index * 50 * MS, submit(f"r{index}", (*range(30), index), max_tokens=9, seed=index))
        return [event for result in driver.run() for event in result.events]

    assert log(tiers(64)) == log(None)


def test_an_executor_without_the_tier_is_refused() -> None:
    with pytest.raises(ConfigError, match="the executor simulated has no host tier"):
        require_tiers(simulated().capabilities(), tiers(4))
    require_tiers(simulated(tiering=tiers(4)).capabilities(), tiers(4))
    require_tiers(simulated().capabilities(), None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tiers": ()}, "must be named"),
        ({"tiers": (TierConfig("host", 1, 1.0, 1.0), TierConfig("host", 1, 1.0, 1.0))}, "each once"),
        ({"write_back": "never"}, "write_back must be one of"),
        ({"max_transfer_blocks": 0}, "at least 1"),
    ],
)
def test_tiers_that_cannot_be_are_refused(change: dict[str, Any], message: str) -> None:
    values: dict[str, Any] = {"block_bytes": 1, "tiers": (TierConfig("host", 1, 1.0, 1.0),), **change}
    with pytest.raises(ConfigError, match=message):
        TieringConfig(**values)


def test_tiers_need_prefix_caching() -> None:
    with pytest.raises(ConfigError, match="need prefix caching"):
        config(tiering=tiers(4), enable_prefix_caching=False)
    assert isinstance(config(tiering=tiers(4)), EngineConfig)


def stored(prompt: tuple[int, ...], num_blocks: int) -> TierContents:
    """The first blocks of a prompt, in slots from 3 on."""
    blocks, parent = [], root_id(None)
    for index in range(num_blocks):
        own = child_id(parent, prompt[4 * index : 4 * index + 4])
        blocks.append(StoredBlock(3 + index, own, parent))
        parent = own
    return TierContents(Tier.HOST, tuple(blocks))


def test_what_a_tier_held_before_is_loaded() -> None:
    driver = virtual(num_blocks=22, max_model_len=88, tiering=tiers(16))
    prompt = tuple(range(40))
    driver.core.step(0, [stored(prompt, 7)], [])
    driver.core.check_invariants()
    driver.at(0, submit("a", prompt, max_tokens=1))
    driver.at(300 * MS, submit("b", 60, max_tokens=1))
    end = ends(driver)["a"]
    assert end.stats.num_cached_tokens == 28
    (host,) = driver.core.stats().tiers
    # Three blocks of `a` are new to the tier. The 15 full ones of `b` need more than the 6 slots that are left, and
    # what was there before goes first: but nothing goes of `a`, which is in use by then or was used later.
    assert host.num_hit_tokens == 28
    assert host.num_used_blocks == 16


def test_what_was_there_before_leaves_before_anything_else() -> None:
    driver = virtual(num_blocks=22, max_model_len=88, tiering=tiers(9))
    driver.core.step(0, [stored(tuple(range(100, 128)), 6)], [])
    driver.at(0, submit("a", 36, max_tokens=1))
    ends(driver)
    driver.core.check_invariants()
    (host,) = driver.core.stats().tiers
    assert (host.num_used_blocks, host.stored_bytes) == (9, 9 * 4000)


def test_transfers_say_what_they_move() -> None:
    driver = returning(tiers(64))
    transfers: list[Transfer] = []
    while (result := driver.step()) is not None:
        transfers += [transfer for transfer in result.transfers if isinstance(transfer, Transfer)]
    store, load = transfers[0], transfers[2]
    expected = stored(tuple(range(40)), 10).blocks
    assert store.content_ids == tuple(block.content_id for block in expected)
    assert store.parent_ids == tuple(block.parent_id for block in expected)
    assert load.content_ids == store.content_ids[:9]


def test_what_a_tier_held_is_in_the_recording(tmp_path: Path) -> None:
    driver = virtual(num_blocks=22, max_model_len=88, tiering=tiers(16))
    contents = stored(tuple(range(40)), 2)
    header = Header(driver.core.config, 16, 1, 1, "m", "simulated")
    recorder = Recorder(tmp_path / "log", header)
    recorder.write(0, [contents], [], driver.core.step(0, [contents], []))
    recorder.close()
    (step,) = Recording(tmp_path / "log").steps()
    assert step.completions == (contents,)
