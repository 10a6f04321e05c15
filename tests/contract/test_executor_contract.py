"""What every executor must do, over all of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from agentserve.core.batch import Lane
from agentserve.core.executor import Tier
from agentserve.core.request import SamplingParams
from tests.contract.factories import FACTORIES
from tests.contract.harness import BLOCK_SIZE, NUM_BLOCKS, Harness, chunk, greedy, spec

PROMPT = (5, 9, 23, 42, 77, 11)


@pytest.fixture(params=FACTORIES)
def harness(request: pytest.FixtureRequest) -> Iterator[Harness]:
    made = FACTORIES[request.param]()
    yield made
    made.executor.close()


def prompt_chunk(name: str, params: SamplingParams | None = None, *, first_block: int = 0, output_index: int = 0):
    """A whole prompt of six tokens in two blocks, sampled."""
    sample = spec(params or greedy(), output_index, PROMPT, len(PROMPT))
    return chunk(name, PROMPT, (first_block, first_block + 1), sample=sample)


def test_capabilities_are_consistent(harness):
    capabilities = harness.executor.capabilities()
    assert capabilities.name and capabilities.device
    assert (capabilities.num_blocks, capabilities.block_size) == (NUM_BLOCKS, BLOCK_SIZE)
    assert 1 <= capabilities.min_units <= capabilities.compute_units
    assert 1 <= capabilities.unit_granularity <= capabilities.compute_units
    assert capabilities.lookahead >= 1
    assert Tier.DEVICE in capabilities.tiers
    assert harness.executor.capabilities() == capabilities


def test_nothing_comes_of_nothing(harness):
    assert harness.executor.poll(harness.clock.now_ns()) == []
    assert harness.executor.next_completion_ns() is None


def test_a_batch_has_exactly_one_output(harness):
    batch = harness.batch([prompt_chunk("a")])
    output = harness.run(batch)
    assert (output.batch_id, output.lane, output.error) == (batch.batch_id, Lane.DECODE, None)
    assert harness.executor.next_completion_ns() is None
    assert harness.executor.poll(harness.clock.now_ns() + 10**12) == []


def test_times_are_in_order_and_not_before_the_submission(harness):
    before = harness.clock.now_ns()
    outputs = [harness.run(harness.batch([prompt_chunk("a")])) for _ in range(3)]
    times = [before] + [t for output in outputs for t in (output.started_ns, output.finished_ns)]
    times.append(harness.clock.now_ns())
    assert times == sorted(times)


def test_samples_are_those_asked_for_in_the_order_of_the_chunks(harness):
    chunks = [
        prompt_chunk("z", first_block=0),
        chunk("b", PROMPT, (2, 3)),  # a prompt that goes on: nothing to sample
        prompt_chunk("a", first_block=4),
    ]
    output = harness.run(harness.batch(chunks, Lane.PREFILL))
    assert [sample.request_id for sample in output.samples] == ["z", "a"]


def test_a_batch_may_sample_nothing(harness):
    assert harness.run(harness.batch([chunk("a", PROMPT, (0, 1))], Lane.PREFILL)).samples == ()


def test_both_lanes_work_at_once_and_each_keeps_its_order(harness):
    done: dict[Lane, list[int]] = {lane: [] for lane in Lane}
    expected: dict[Lane, list[int]] = {lane: [] for lane in Lane}
    for _ in range(3):
        for lane, block in ((Lane.PREFILL, 0), (Lane.DECODE, 2)):
            batch = harness.batch([prompt_chunk(lane.value, first_block=block)], lane, co_running=True)
            expected[lane].append(batch.batch_id)
            harness.submit(batch)
        for output in harness.collect(2):
            assert output.error is None
            done[output.lane].append(output.batch_id)
    assert done == expected


def test_a_full_lane_refuses(harness):
    for _ in range(harness.executor.capabilities().lookahead):
        harness.submit(harness.batch([prompt_chunk("a")]))
    with pytest.raises(RuntimeError, match="full"):
        harness.submit(harness.batch([prompt_chunk("b", first_block=2)]))
    # The other lane has room, and the refused batch left no trace.
    harness.submit(harness.batch([prompt_chunk("c", first_block=4)], Lane.PREFILL))
    assert len(harness.collect(harness.executor.capabilities().lookahead + 1)) >= 2
    assert harness.run(harness.batch([prompt_chunk("b", first_block=2)])).error is None


def test_a_closed_executor_refuses_and_may_be_closed_again(harness):
    harness.submit(harness.batch([prompt_chunk("a")]))
    harness.executor.close()
    harness.executor.close()
    with pytest.raises(RuntimeError, match="closed"):
        harness.submit(harness.batch([prompt_chunk("b")]))


def test_says_when_it_will_be_done_or_wakes_whoever_waits(harness):
    harness.submit(harness.batch([prompt_chunk("a")]))
    due_ns = harness.executor.next_completion_ns()
    if due_ns is None:
        assert harness.woken.wait(60)
    else:
        assert harness.executor.poll(due_ns - 1) == []
        harness.clock.advance_to(due_ns)
    # The first look after that finds the output.
    assert len(harness.executor.poll(harness.clock.now_ns())) == 1


def test_a_token_depends_on_seed_and_index_only(harness):
    """Not on the batch, the lane, the request id, or what was drawn before."""

    def draw(seed: int, output_index: int, *, lane: Lane = Lane.DECODE, company: int = 0) -> int:
        params = SamplingParams(max_tokens=64, temperature=1.0, seed=seed)
        chunks = [prompt_chunk(f"other-{i}", greedy(), first_block=2 * i + 2) for i in range(company)]
        chunks.insert(company // 2, prompt_chunk("one", params, output_index=output_index))
        output = harness.run(harness.batch(chunks, lane, ended_request_ids=("one",)))
        assert output.error is None
        return output.samples[company // 2].token_id

    alone = [draw(seed, index) for seed in (1, 2) for index in range(6)]
    again = [draw(seed, index, lane=Lane.PREFILL) for seed in (1, 2) for index in range(6)]
    in_company = [draw(seed, index, company=5) for seed in (1, 2) for index in range(6)]
    assert alone == again == in_company
    assert len(set(alone)) > 3  # and it does depend on them
    assert alone[:6] != alone[6:]


@pytest.mark.parametrize("num_top", [0, 1, 5])
def test_logprobs_come_when_asked_for(harness, num_top):
    output = harness.run(
        harness.batch(
            [prompt_chunk("with", greedy(logprobs=num_top)), prompt_chunk("without", greedy(), first_block=2)]
        )
    )
    asked, other = output.samples
    assert asked.logprob is not None and asked.logprob <= 0.0
    assert len(asked.top_logprobs) == num_top
    values = [logprob for _, logprob in asked.top_logprobs]
    assert values == sorted(values, reverse=True)
    assert len({token_id for token_id, _ in asked.top_logprobs}) == num_top
    if num_top:
        # A greedy choice is the most likely token.
        assert asked.top_logprobs[0] == (asked.token_id, asked.logprob)
    assert (other.logprob, other.top_logprobs) == (None, ())


@pytest.mark.parametrize("block_id", [-1, NUM_BLOCKS])
def test_a_failed_batch_harms_no_other(harness, block_id):
    good = harness.run(harness.batch([prompt_chunk("a")]))
    failed = harness.run(harness.batch([prompt_chunk("a"), prompt_chunk("b", first_block=block_id)]))
    assert failed.error is not None and "block" in failed.error
    assert failed.samples == ()
    assert harness.run(harness.batch([prompt_chunk("a")], ended_request_ids=("a", "b"))).samples == good.samples
