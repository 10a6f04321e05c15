"""What is special about the torch executor: bad batches, errors, time stamps."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace

import pytest

from agentserve.core.batch import Lane
from agentserve.core.slots import PartitionKind, SlotPartition
from agentserve.errors import EngineError
from agentserve.executors.pytorch.devices.cpu import CpuDevice
from agentserve.executors.pytorch.executor import TorchExecutor
from tests.contract.harness import Harness, TickingClock, chunk, greedy, spec
from tests.executors.builders import tiny_llama, torch_harness

GOOD = chunk("a", [5, 6, 7], (0,), sample=spec(greedy()))


@pytest.fixture(params=["mirror", "torch"])
def harness(request: pytest.FixtureRequest) -> Iterator[Harness]:
    made = torch_harness(attention=request.param)
    yield made
    made.executor.close()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (replace(GOOD, token_ids=(5, 160, 7)), "outside the vocabulary of 160"),
        (replace(GOOD, token_ids=(5, -1, 7)), "outside the vocabulary"),
        (replace(GOOD, block_ids=(64,)), "outside the pool of 64"),
        (replace(GOOD, block_ids=(0, 1)), "2 blocks for 3 tokens"),
        (replace(GOOD, block_ids=()), "0 blocks for 3 tokens"),
        (replace(GOOD, token_ids=()), "no such positions"),
        (replace(GOOD, start=-1), "no such positions: -1 to 2"),
        (replace(GOOD, start=254, block_ids=tuple(range(65))), "no such positions: 254 to 257"),
        (replace(GOOD, sample=spec(greedy(logit_bias=((160, 1.0),)))), "no such token: 160"),
        (replace(GOOD, sample=spec(greedy(repetition_penalty=1.1), 0, (1, 500), 1)), "no such token: 500"),
    ],
)
def test_a_batch_that_cannot_be_right_fails_and_harms_no_other(harness, caplog, bad, message):
    good = harness.run(harness.batch([GOOD]))
    other = chunk("b", [9, 9], (1,), sample=spec(greedy()))
    failed = harness.run(harness.batch([other, replace(bad, request_id="bad")]))
    assert failed.error is not None and failed.error.startswith("EngineError: request bad")
    assert message in failed.error
    assert failed.samples == ()
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "Traceback" in caplog.text
    assert harness.run(harness.batch([GOOD], ended_request_ids=("a",))).samples == good.samples


def test_a_slot_that_does_not_exist_is_an_error_of_the_batch(harness):
    partition = SlotPartition(10_000, 1, PartitionKind.SPLIT)
    failed = harness.run(harness.batch([GOOD], partition=partition))
    assert failed.error is not None and "no slot of 10000 cores" in failed.error
    assert harness.run(harness.batch([GOOD])).error is None


def test_more_chunks_than_sequences_are_an_error(harness):
    chunks = [chunk(str(i), [1], (i,)) for i in range(9)]
    failed = harness.run(harness.batch(chunks))
    assert failed.error is not None and "a batch of 9 chunks; the limit is 8" in failed.error
    assert harness.run(harness.batch([])).error is not None


def test_an_error_of_the_model_is_an_error_of_the_batch(harness, monkeypatch):
    def fail(*args):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(tiny_llama(), "forward", fail)
        assert harness.run(harness.batch([GOOD], Lane.PREFILL)).error == "RuntimeError: out of memory"
    assert harness.run(harness.batch([GOOD], Lane.PREFILL)).error is None


def test_outputs_can_be_polled_after_close(harness):
    harness.submit(harness.batch([GOOD]))
    harness.submit(harness.batch([replace(GOOD, request_id="b", block_ids=(1,))], Lane.PREFILL))
    harness.executor.close()
    outputs = harness.executor.poll(harness.clock.now_ns())
    assert sorted(output.lane for output in outputs) == [Lane.DECODE, Lane.PREFILL]
    assert all(output.error is None and len(output.samples) == 1 for output in outputs)


def test_whoever_registers_late_hears_of_what_is_finished_already():
    harness = torch_harness()
    harness.submit(harness.batch([GOOD]))
    assert harness.woken.wait(60)
    calls = []
    harness.executor.on_completion(lambda: calls.append(1))
    assert calls == [1]
    harness.executor.close()


def test_stamps_come_from_the_clock(harness):
    harness.clock.advance_to(1_000_000)
    output = harness.run(harness.batch([GOOD]))
    assert 1_000_000 < output.started_ns < output.finished_ns < 1_000_100


@pytest.mark.parametrize("field", ["num_blocks", "block_size", "max_num_seqs"])
def test_sizes_must_be_positive(field):
    sizes = {"num_blocks": 4, "block_size": 4, "max_num_seqs": 4, field: 0}
    with pytest.raises(EngineError, match="must be positive"):
        TorchExecutor(tiny_llama(), CpuDevice(), clock=TickingClock(), **sizes)
