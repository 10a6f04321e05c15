"""Batches that follow each other before anybody has seen the tokens of the first."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from queue import SimpleQueue

import pytest
import torch

from agentserve.core.batch import PENDING_TOKEN, Batch, BatchOutput, Lane, ScheduledChunk
from agentserve.core.request import SamplingParams
from agentserve.executors.pytorch.devices.cpu import CpuDevice
from agentserve.executors.pytorch.executor import TorchExecutor
from agentserve.executors.pytorch.sampler import enqueue
from tests.contract.harness import Harness, TickingClock, chunk, greedy, spec
from tests.executors.builders import Generation, generate, tiny_llama, torch_harness

PROMPTS = {"a": [5, 9, 23, 42, 77], "b": [11], "c": [(7 * i) % 150 + 3 for i in range(14)]}
BLOCKS = {name: tuple(range(10 * i, 10 * i + 10)) for i, name in enumerate(PROMPTS)}
PARAMS = {
    "a": greedy(),
    "b": SamplingParams(max_tokens=64, temperature=1.0, seed=3),
    "c": SamplingParams(max_tokens=64, temperature=0.8, top_p=0.9, seed=4, logprobs=2),
}
NUM_TOKENS = 9


@pytest.fixture(params=["mirror", "torch"])
def harness(request: pytest.FixtureRequest) -> Iterator[Harness]:
    made = torch_harness(attention=request.param, lookahead=2)
    yield made
    made.executor.close()


def prompt(name: str) -> ScheduledChunk:
    """The whole prompt, sampled."""
    return chunk(name, PROMPTS[name], BLOCKS[name], sample=spec(PARAMS[name]))


def pending(name: str, output_index: int) -> ScheduledChunk:
    """The decode step behind output token `output_index - 1`, whatever that is."""
    start = len(PROMPTS[name]) + output_index - 1
    return chunk(name, [PENDING_TOKEN], BLOCKS[name], start=start, sample=spec(PARAMS[name], output_index))


def expected(names: Sequence[str]) -> dict[str, list[int]]:
    """Tokens of the same requests, one batch after the other."""
    one_by_one = torch_harness()
    generations = [Generation(name, PROMPTS[name], BLOCKS[name], params=PARAMS[name]) for name in names]
    generate(one_by_one, generations, NUM_TOKENS)
    one_by_one.executor.close()
    return {generation.name: generation.output for generation in generations}


def tokens_of(outputs: Sequence[BatchOutput], name: str) -> list[int]:
    assert [output.error for output in outputs] == [None] * len(outputs)
    return [s.token_id for output in outputs for s in output.samples if s.request_id == name]


def run_ahead(harness: Harness, batches: Sequence[Batch]) -> list[BatchOutput]:
    """Always two batches in flight, as long as there are any."""
    outputs: list[BatchOutput] = []
    num_submitted = 0
    while len(outputs) < len(batches):
        while num_submitted < min(len(batches), len(outputs) + 2):
            harness.submit(batches[num_submitted])
            num_submitted += 1
        outputs += harness.collect_some()
    return outputs


def test_tokens_are_those_of_one_batch_after_the_other(harness):
    names = list(PROMPTS)
    batches = [harness.batch([prompt(name) for name in names])]
    batches += [harness.batch([pending(name, index) for name in names]) for index in range(1, NUM_TOKENS)]
    outputs = run_ahead(harness, batches)
    assert [output.batch_id for output in outputs] == [batch.batch_id for batch in batches]
    assert {name: tokens_of(outputs, name) for name in names} == expected(names)
    # Batches of a lane do not overlap, whenever they were launched.
    times = [t for output in outputs for t in (output.started_ns, output.finished_ns)]
    assert times == sorted(times)


def test_requests_come_and_go(harness):
    """Each batch finds its tokens by request, wherever they were in the batch before."""
    lists = [["a"], ["a", "b"], ["b", "c", "a"], ["c", "a"], ["a", "c"], ["c"]]
    counts = dict.fromkeys(PROMPTS, 0)
    batches = []
    for names in lists:
        batches.append(harness.batch([pending(n, counts[n]) if counts[n] else prompt(n) for n in names]))
        for name in names:
            counts[name] += 1
    outputs = run_ahead(harness, batches)
    alone = expected(list(PROMPTS))
    for name, count in counts.items():
        assert tokens_of(outputs, name) == alone[name][:count]


def test_prompts_among_pending_tokens(harness):
    """A mixed batch: decodes whose tokens are pending, with chunks of a prompt between and behind them."""
    first, second = PROMPTS["c"][:6], PROMPTS["c"][6:]
    begin = chunk("c", first, BLOCKS["c"])
    end = chunk("c", second, BLOCKS["c"], start=6, sample=spec(PARAMS["c"]))
    batches = [
        harness.batch([prompt("a"), prompt("b")]),
        harness.batch([pending("b", 1), begin, pending("a", 1)]),
        harness.batch([end, pending("a", 2), pending("b", 2)]),
        harness.batch([pending("c", 1), pending("b", 3), pending("a", 3)]),
    ]
    outputs = run_ahead(harness, batches)
    alone = expected(list(PROMPTS))
    assert {name: tokens_of(outputs, name) for name in PROMPTS} == {
        "a": alone["a"][:4],
        "b": alone["b"][:4],
        "c": alone["c"][:2],
    }


def test_a_token_that_was_not_sampled_is_an_error(harness):
    first = harness.batch([prompt("a")])
    harness.run(first)
    failed = harness.run(harness.batch([pending("b", 1)]))
    assert failed.error is not None and "request b waits for a token" in failed.error
    # The batch that failed carries nothing on.
    failed = harness.run(harness.batch([pending("a", 1)]))
    assert failed.error is not None and "request a waits for a token" in failed.error


def test_results_are_freed_by_the_thread_that_launches(harness, monkeypatch):
    """Page-locked memory that another thread frees while a graph is captured would put an event into that graph."""
    threads: list[str] = []

    def watched(*arguments):
        sampled = enqueue(*arguments)
        sampled.maxima = sampled.maxima.clone()
        weakref.finalize(sampled.maxima, lambda: threads.append(threading.current_thread().name))
        return sampled

    monkeypatch.setattr("agentserve.executors.pytorch.runner.enqueue", watched)
    batches = [harness.batch([prompt("a")])] + [harness.batch([pending("a", index)]) for index in range(1, NUM_TOKENS)]
    run_ahead(harness, batches)
    assert len(threads) == NUM_TOKENS - 3  # not yet those of the two in flight, and of one that is being read
    assert not [name for name in threads if "fences" in name]
    harness.executor.close()
    assert len(threads) == NUM_TOKENS  # the rest before the slots are gone


def test_lanes_do_not_mix_up_their_tokens(harness):
    harness.run(harness.batch([prompt("a")], Lane.PREFILL))
    failed = harness.run(harness.batch([pending("a", 1)], Lane.DECODE))
    assert failed.error is not None and "request a waits for a token" in failed.error


def test_if_a_batch_cannot_be_launched_the_next_one_fails_too(harness):
    bad = replace(prompt("a"), block_ids=(1000, 1001))
    outputs = run_ahead(harness, [harness.batch([bad]), harness.batch([pending("a", 1)])])
    assert outputs[0].error is not None and "outside the pool" in outputs[0].error
    assert outputs[1].error is not None and "request a waits for a token" in outputs[1].error
    assert harness.run(harness.batch([prompt("b")])).error is None


def nothing_but_nan(monkeypatch: pytest.MonkeyPatch, turns: Sequence[bool]) -> None:
    """The model computes logits that are not numbers, in the given turns."""
    original: Callable[[torch.Tensor], torch.Tensor] = tiny_llama().logits
    left = list(turns)

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        result = original(hidden)
        return torch.full_like(result, float("nan")) if left.pop(0) else result

    monkeypatch.setattr(tiny_llama(), "logits", logits)


def test_if_a_batch_fails_later_those_that_need_its_tokens_fail_too(harness, monkeypatch):
    """Only when the first batch is read it is seen to have failed; the second has been launched by then."""
    nothing_but_nan(monkeypatch, [True, False, False])
    first, second = harness.batch([prompt("a")]), harness.batch([pending("a", 1)])
    outputs = run_ahead(harness, [first, second, harness.batch([prompt("b")])])
    assert outputs[0].error is not None and "not finite" in outputs[0].error
    assert outputs[1].error == f"EngineError: it was given tokens of batch {first.batch_id}, which failed"
    assert outputs[1].samples == ()
    assert outputs[2].error is None


def test_a_batch_that_needs_nothing_of_a_failed_one_is_well(harness, monkeypatch):
    nothing_but_nan(monkeypatch, [True, False])
    outputs = run_ahead(harness, [harness.batch([prompt("a")]), harness.batch([prompt("b")])])
    assert [output.error is None for output in outputs] == [False, True]


class HeldFence:
    """A fence that the test opens."""

    def __init__(self) -> None:
        self.opened = threading.Event()

    def done(self) -> bool:
        return self.opened.is_set()

    def wait(self) -> None:
        assert self.opened.wait(60), "nobody opened the fence"


class HeldSlot:
    """A slot whose work seems to go on until its fence is opened."""

    def __init__(self, slot, launched) -> None:
        self.units = slot.units
        self._slot = slot
        self._launched = launched

    def launch(self, work: Callable[[], None]) -> HeldFence:
        self._slot.run(work)
        fence = HeldFence()
        self._launched.put(fence)
        return fence


class HeldDevice(CpuDevice):
    """A device that works asynchronously, as far as the executor can see."""

    lookahead = 2

    def __init__(self, launched) -> None:
        super().__init__()
        self._launched = launched

    def slot(self, lane, units):
        return HeldSlot(super().slot(lane, units), self._launched)


def test_a_batch_is_launched_before_the_one_ahead_of_it_is_done():
    launched: SimpleQueue[HeldFence] = SimpleQueue()
    executor = TorchExecutor(
        tiny_llama(),
        HeldDevice(launched),
        num_blocks=64,
        block_size=4,
        max_num_seqs=8,
        clock=TickingClock(),
        attention="torch",
    )
    harness = Harness(executor, TickingClock())
    try:
        assert executor.capabilities().lookahead == 2
        harness.submit(harness.batch([prompt("a")]))
        first = launched.get(timeout=60)
        # The lane waits for the first batch already when the second one comes.
        harness.submit(harness.batch([pending("a", 1)]))
        second = launched.get(timeout=60)
        assert executor.poll(0) == []
        second.opened.set()
        assert executor.poll(0) == []  # in order, whatever comes first
        first.opened.set()
        outputs = harness.collect(2)
        assert tokens_of(outputs, "a") == expected(["a"])["a"][:2]
    finally:
        while not launched.empty():
            launched.get().opened.set()
        executor.close()
