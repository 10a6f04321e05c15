"""Greedy tokens of the torch executor equal those of transformers, however the work is cut up."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from agentserve.core.batch import Lane
from agentserve.core.slots import PartitionKind, SlotPartition
from agentserve.executors.pytorch.kv_store import KvStore
from tests.contract.harness import Harness
from tests.executors.builders import Generation, apply, generate, load_tiny, step, torch_harness
from tests.models.builders import save_tiny_model

NUM_TOKENS = 12
PROMPTS = {
    "short": [7],
    "one block": [11, 12, 13, 14],
    "odd": [(31 * i) % 150 + 3 for i in range(23)],
    "long": [(17 * i * i) % 150 + 3 for i in range(61)],
}
BLOCKS = {name: tuple(range(20 * i, 20 * i + 20)) for i, name in enumerate(PROMPTS)}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(ours, {prompt: tokens of transformers})."""
    directory = tmp_path_factory.mktemp("tiny")
    theirs = save_tiny_model(directory, "llama")
    expected = {}
    for name, prompt in PROMPTS.items():
        tokens = list(prompt)
        with torch.inference_mode():
            for _ in range(NUM_TOKENS):
                tokens.append(int(theirs(torch.tensor([tokens])).logits[0, -1].argmax()))
        expected[name] = tokens[len(prompt) :]
    return load_tiny(directory), expected


@pytest.fixture(params=["mirror", "torch"])
def harness(models, request) -> Iterator[Harness]:
    """Attention over mirrors and over blocks; the latter through both threads of a lane."""
    lookahead = 1 if request.param == "mirror" else 2
    made = torch_harness(models[0], num_blocks=100, attention=request.param, lookahead=lookahead)
    yield made
    made.executor.close()


@pytest.fixture
def expected(models) -> dict[str, list[int]]:
    return models[1]


def generations(**values) -> dict[str, Generation]:
    return {name: Generation(name, prompt, BLOCKS[name], **values) for name, prompt in PROMPTS.items()}


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("chunk_size", [1000, 1, 3, 7])
def test_alone(harness, expected, name, chunk_size):
    generation = generations()[name]
    generate(harness, [generation], NUM_TOKENS, chunk_size=chunk_size)
    assert generation.output == expected[name]


@pytest.mark.parametrize("chunk_size", [1000, 5])
def test_batched_with_others(harness, expected, chunk_size):
    all_of_them = generations()
    generate(harness, list(all_of_them.values()), NUM_TOKENS, chunk_size=chunk_size)
    assert {name: generation.output for name, generation in all_of_them.items()} == expected


def test_after_a_prefix_hit(harness, expected):
    first = generations()["long"]
    generate(harness, [first], 4)
    # Fifteen full blocks of the first request, then blocks of its own.
    second = Generation("second", PROMPTS["long"], BLOCKS["long"][:15] + BLOCKS["odd"], num_cached=60)
    generate(harness, [second], NUM_TOKENS)
    assert second.output == expected["long"]
    # The shared blocks were not written: the first request goes on as if nothing had happened.
    generate(harness, [first], NUM_TOKENS)
    assert first.output == expected["long"]


def test_after_a_preemption(harness, expected):
    generation = generations()["odd"]
    generate(harness, [generation], 5)
    # Its blocks go to another request; then it is computed again elsewhere, output included.
    other = Generation("other", PROMPTS["long"], BLOCKS["odd"])
    step(harness, [other], ended_request_ids=("odd",))
    generation.num_computed, generation.block_ids = 0, BLOCKS["short"]
    generate(harness, [generation], NUM_TOKENS, chunk_size=9)
    assert generation.output == expected["odd"]


def test_mirrors_are_rebuilt_from_the_blocks(harness, expected):
    generation = generations()["long"]
    while len(generation.output) < NUM_TOKENS:
        step(harness, [generation], max_tokens=13, ended_request_ids=("long",))
    assert generation.output == expected["long"]


def test_a_mirror_of_another_length_is_not_used(harness, expected):
    generation = generations()["long"]
    generate(harness, [generation], 3)
    # Back to a block boundary, as after a preemption with a prefix hit that nobody announced.
    generation.num_computed = 40
    generate(harness, [generation], NUM_TOKENS)
    assert generation.output == expected["long"]


def test_mirrors_stay_within_their_limit(models, expected, monkeypatch):
    """With room for no mirror at all they last for a batch, and the tokens are the same."""
    stores = []
    original = KvStore.__init__

    def limited(self, *args, **values):
        stores.append(self)
        original(self, *args, **{**values, "mirror_limit_bytes": 0})

    monkeypatch.setattr(KvStore, "__init__", limited)
    harness = torch_harness(models[0], num_blocks=100)
    all_of_them = generations()
    generate(harness, list(all_of_them.values()), NUM_TOKENS)
    harness.executor.close()
    assert {name: generation.output for name, generation in all_of_them.items()} == expected
    assert stores[0].mirror_bytes == 0


def test_both_lanes_busy(harness, expected):
    """Each lane steps its own requests at its own pace; then prompts move from the prefill to the decode lane."""
    units = harness.executor.capabilities().compute_units
    low = max(1, units // 2)
    split = SlotPartition(low, max(1, units - low), PartitionKind.SPLIT)
    all_of_them = generations()
    lanes = {Lane.DECODE: [all_of_them["short"], all_of_them["odd"]], Lane.PREFILL: [all_of_them["long"]]}
    in_flight = {}

    def submit(lane: Lane) -> None:
        chunks = [generation.next_chunk(5 if lane is Lane.PREFILL else 1000) for generation in lanes[lane]]
        batch = harness.batch(chunks, lane, partition=split, co_running=True)
        in_flight[lane] = batch
        harness.submit(batch)

    for lane in Lane:
        submit(lane)
    while in_flight:
        for done in harness.collect_some():
            assert done.error is None
            apply(in_flight.pop(done.lane), done.samples, lanes[done.lane])
        if lanes[Lane.PREFILL] and all_of_them["long"].output and Lane.DECODE not in in_flight:
            lanes[Lane.DECODE].append(lanes[Lane.PREFILL].pop())
        for lane in Lane:
            lanes[lane] = [generation for generation in lanes[lane] if len(generation.output) < NUM_TOKENS]
            if lanes[lane] and lane not in in_flight and not (lane is Lane.PREFILL and all_of_them["long"].output):
                submit(lane)
    for name in ("short", "odd", "long"):
        assert all_of_them[name].output == expected[name]


@pytest.mark.parametrize("lookahead", [1, 2])
def test_threads_end_with_the_executor(models, lookahead):
    before = set(threading.enumerate())
    harness = torch_harness(models[0], num_blocks=100, lookahead=lookahead)
    generate(harness, [generations()["short"]], 2)
    assert set(threading.enumerate()) > before
    harness.executor.close()
    assert set(threading.enumerate()) == before
