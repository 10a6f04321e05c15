"""What every executor with a tier below its pool must do, over all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agentserve.config import TierConfig, TieringConfig
from agentserve.core.batch import BatchOutput, TokenSample
from agentserve.core.executor import Tier
from agentserve.core.transfers import Transfer, TransferKind, TransferOutput
from agentserve.executors.pytorch.executor import kv_bytes_per_block
from agentserve.executors.pytorch.tiers.disk import DiskOptions
from tests.contract.factories import FACTORIES
from tests.contract.harness import BLOCK_SIZE, NUM_BLOCKS, Harness, chunk, greedy, spec
from tests.executors.builders import TINY

NUM_SLOTS = 8
BLOCK_BYTES = kv_bytes_per_block(TINY, "float32", BLOCK_SIZE)
PROMPT = (5, 9, 23, 42, 77, 11, 30, 8)
"""Two blocks."""


class Bench:
    """An executor with one tier, and transfers of it."""

    def __init__(self, harness: Harness, tier: Tier) -> None:
        self.harness, self.tier = harness, tier
        self._num_transfers = 0

    def store(self, block_ids: tuple[int, ...], slots: tuple[int, ...]) -> Transfer:
        return self._transfer(TransferKind.STORE, Tier.DEVICE, self.tier, block_ids, slots)

    def load(self, slots: tuple[int, ...], block_ids: tuple[int, ...]) -> Transfer:
        return self._transfer(TransferKind.LOAD, self.tier, Tier.DEVICE, slots, block_ids)

    def submit(self, *transfers: Transfer) -> None:
        for transfer in transfers:
            self.harness.executor.submit_transfer(transfer, self.harness.clock.now_ns())

    def run(self, transfer: Transfer) -> TransferOutput:
        self.submit(transfer)
        (output,) = self.harness.collect(1)
        assert isinstance(output, TransferOutput) and output.transfer_id == transfer.transfer_id
        return output

    def compute(self, name: str, prompt: tuple[int, ...], first_block: int) -> None:
        """The KV of a prompt, in two blocks."""
        done = self.harness.run(self.harness.batch([chunk(name, prompt, (first_block, first_block + 1))]))
        assert done.error is None

    def after(self, name: str, first_block: int) -> TokenSample:
        """What comes behind the two blocks and a token."""
        blocks = (first_block, first_block + 1, 50)
        last = chunk(name, (3,), blocks, start=8, sample=spec(greedy(logprobs=5), 0, (*PROMPT, 3), 9))
        done = self.harness.run(self.harness.batch([last], ended_request_ids=(name,)))
        assert done.error is None
        return done.samples[0]

    def _transfer(
        self, kind: TransferKind, source: Tier, target: Tier, sources: tuple[int, ...], targets: tuple[int, ...]
    ) -> Transfer:
        self._num_transfers += 1
        slots = targets if kind is TransferKind.STORE else sources
        # A content for each slot, as far as these tests go.
        ids = tuple(bytes([slot % 256]) * 16 for slot in slots)
        num_bytes = BLOCK_BYTES * len(sources)
        return Transfer(
            self._num_transfers, kind, source, target, sources, targets, num_bytes, ids, (bytes(16),) * len(ids)
        )


def make(name: str, tier: Tier, directory: Path) -> Bench:
    tiering = TieringConfig(BLOCK_BYTES, (TierConfig(tier.value, NUM_SLOTS, 1e9, 1e9, 1000),))
    values: dict[str, Any] = {"tiering": tiering}
    if tier is Tier.DISK and name != "simulated":
        values["disk"] = DiskOptions(directory, "random")
    return Bench(FACTORIES[name](**values), tier)


@pytest.fixture(params=[(name, tier) for name in FACTORIES for tier in (Tier.HOST, Tier.DISK)], ids="-".join)
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    made = make(*request.param, tmp_path)
    yield made
    made.harness.executor.close()


def same(sample: TokenSample, other: TokenSample) -> bool:
    """Bit by bit: the same blocks, computed upon in the same way."""
    return (sample.token_id, sample.top_logprobs) == (other.token_id, other.top_logprobs)


def test_the_tier_is_named(bench: Bench) -> None:
    assert bench.harness.executor.capabilities().tiers == (Tier.DEVICE, bench.tier)


def test_what_was_stored_is_loaded_into_other_blocks(bench: Bench) -> None:
    bench.compute("a", PROMPT, 0)
    expected = bench.after("a", 0)
    assert bench.run(bench.store((0, 1), (3, 5))).error is None
    bench.compute("b", PROMPT[::-1], 0)
    bench.compute("b2", PROMPT[::-1], 10)
    assert bench.run(bench.load((3, 5), (10, 11))).error is None
    assert same(bench.after("c", 10), expected)


def test_a_load_into_the_blocks_of_a_request_that_just_ended_is_seen(bench: Bench) -> None:
    """That it has ended is said with the next batch only, which reads the same blocks."""
    bench.compute("a", PROMPT, 0)
    expected = bench.after("a", 0)
    bench.run(bench.store((0, 1), (0, 1)))
    bench.compute("b", PROMPT[::-1], 0)
    bench.run(bench.load((0, 1), (0, 1)))
    last = chunk("c", (3,), (0, 1, 50), start=8, sample=spec(greedy(logprobs=5), 0, (*PROMPT, 3), 9))
    done = bench.harness.run(bench.harness.batch([last], ended_request_ids=("b",)))
    assert same(done.samples[0], expected)


def test_a_slot_can_be_used_again(bench: Bench) -> None:
    bench.compute("a", PROMPT, 0)
    bench.compute("b", PROMPT[::-1], 2)
    expected = bench.after("b", 2)
    bench.run(bench.store((0, 1), (6, 7)))
    bench.run(bench.store((2, 3), (6, 7)))
    bench.run(bench.load((6, 7), (4, 5)))
    assert same(bench.after("c", 4), expected)


def test_transfers_of_a_link_end_in_order_and_each_has_one_output(bench: Bench) -> None:
    before = bench.harness.clock.now_ns()
    bench.compute("a", PROMPT, 0)
    stores = [bench.store((0, 1), (2 * index, 2 * index + 1)) for index in range(4)]
    bench.submit(*stores)
    outputs = bench.harness.collect(4)
    assert [output.transfer_id for output in outputs] == [store.transfer_id for store in stores]
    times = [before] + [time for output in outputs for time in (output.started_ns, output.finished_ns)]
    assert times == sorted(times)
    assert bench.harness.executor.next_completion_ns() is None
    assert bench.harness.executor.poll(bench.harness.clock.now_ns() + 10**12) == []


def test_batches_go_on_meanwhile(bench: Bench) -> None:
    bench.compute("a", PROMPT, 0)
    bench.submit(bench.store((0, 1), (0, 1)))
    bench.harness.submit(bench.harness.batch([chunk("b", PROMPT, (4, 5))]))
    outputs = bench.harness.collect(2)
    assert {type(output) for output in outputs} == {BatchOutput, TransferOutput}
    assert all(output.error is None for output in outputs)


BAD: dict[str, Callable[[Bench], Transfer]] = {
    "block": lambda bench: bench.store((0, NUM_BLOCKS), (0, 1)),
    "negative block": lambda bench: bench.load((0, 1), (-1, 0)),
    "slot": lambda bench: bench.store((0, 1), (0, NUM_SLOTS)),
    "slot to read": lambda bench: bench.load((NUM_SLOTS, 0), (0, 1)),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=list(BAD))
def test_a_transfer_that_cannot_be_right_fails_and_harms_nobody(bench: Bench, bad: Callable[[Bench], Transfer]) -> None:
    bench.compute("a", PROMPT, 0)
    expected = bench.after("a", 0)
    assert bench.run(bench.store((0, 1), (0, 1))).error is None
    error = bench.run(bad(bench)).error
    assert error is not None and "outside the" in error
    assert bench.run(bench.load((0, 1), (8, 9))).error is None
    assert same(bench.after("b", 8), expected)


def test_a_tier_that_is_not_there_is_refused(bench: Bench) -> None:
    transfer = Transfer(1, TransferKind.STORE, Tier.DEVICE, Tier.CXL, (0,), (0,), BLOCK_BYTES)
    with pytest.raises(RuntimeError, match="no"):
        bench.submit(transfer)


def test_a_closed_executor_takes_no_transfer(bench: Bench) -> None:
    bench.harness.executor.close()
    with pytest.raises(RuntimeError, match="closed"):
        bench.submit(bench.store((0,), (0,)))


@pytest.mark.parametrize("name", FACTORIES)
def test_an_executor_without_tiers_takes_no_transfer(name: str) -> None:
    bench = Bench(FACTORIES[name](), Tier.HOST)
    with pytest.raises(RuntimeError, match="no"):
        bench.submit(bench.store((0,), (0,)))
    bench.harness.executor.close()
