"""Measuring a device through the executor port: what is submitted is right, and what is recorded is what ran."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import pytest

from agentserve.core.batch import Batch, BatchOutput, Lane
from agentserve.core.costmodel import BatchShape, Contention, CostModel, ModelShape, Sample
from agentserve.core.executor import Capabilities
from agentserve.core.request import WorkClass
from agentserve.core.slots import PartitionKind, PartitionTable, build_partition_table
from agentserve.errors import ConfigError, EngineError
from agentserve.executors.simulated.executor import SimulatedExecutor
from agentserve.profiles.sheets import cpu_sheet
from agentserve.runtime.calibration import Progress, calibrate, measure, measure_isolated_tpot_ns
from agentserve.runtime.calibration_grid import Case, Grid, Limits, Load
from agentserve.runtime.calibration_load import LoadStream
from tests.core.builders import cost_model
from tests.executors.builders import torch_harness

TABLE = build_partition_table(8, 1, 1)
LIMITS = Limits(num_blocks=2048, block_size=16, max_model_len=2048, max_num_seqs=16)


class Spy:
    """An executor that checks and keeps every batch that passes through it."""

    def __init__(self, executor: SimulatedExecutor) -> None:
        self._executor = executor
        self.batches: list[Batch] = []
        self.live: set[str] = set()
        """Requests that the executor has seen and not been told to forget."""
        self._written: dict[int, str] = {}
        self._computed: dict[str, int] = {}
        self._in_flight: dict[Lane, Batch] = {}
        self.on_submit: Callable[[Batch], None] = lambda _: None
        self.next_completion_ns = executor.next_completion_ns
        self.on_completion = executor.on_completion
        self.close = executor.close

    def capabilities(self) -> Capabilities:
        return self._executor.capabilities()

    def submit(self, batch: Batch, now_ns: int) -> None:
        assert not self.batches or batch.batch_id > self.batches[-1].batch_id
        assert batch.batch_id < 0, "the engine's ids, from 0 on, must be larger"
        other = self._in_flight.get(Lane.PREFILL if batch.lane is Lane.DECODE else Lane.DECODE)
        busy = {chunk.request_id for chunk in other.chunks} if other else set()
        assert not busy & set(batch.ended_request_ids), "a request ended while it was in flight"
        self.live -= set(batch.ended_request_ids)
        for chunk in batch.chunks:
            self._check(chunk, busy)
        self.batches.append(batch)
        self._in_flight[batch.lane] = batch
        self.on_submit(batch)
        self._executor.submit(batch, now_ns)

    def poll(self, now_ns: int) -> list[BatchOutput]:
        outputs = self._executor.poll(now_ns)
        for output in outputs:
            del self._in_flight[output.lane]
        return outputs

    def _check(self, chunk, busy: set[str]) -> None:
        assert chunk.request_id not in busy, "a request in two batches in flight"
        assert chunk.num_tokens >= 1 and chunk.end <= LIMITS.max_model_len
        assert max(chunk.token_ids) < LIMITS.vocabulary_size
        assert len(chunk.block_ids) == -(-chunk.end // LIMITS.block_size)
        first = chunk.start // LIMITS.block_size
        if chunk.request_id in self.live:
            assert chunk.start == self._computed[chunk.request_id], "a request skips or repeats a token"
        else:
            # What a new request finds in its context must be finite: somebody has computed it.
            assert chunk.start % LIMITS.block_size == 0
            assert set(chunk.block_ids[:first]) <= self._written.keys()
        for block in chunk.block_ids[first:]:
            owner = self._written.get(block)
            assert owner not in self.live - {chunk.request_id}, "a block of another request is written to"
            self._written[block] = chunk.request_id
        self.live.add(chunk.request_id)
        self._computed[chunk.request_id] = chunk.end


def spy(model: CostModel | None = None) -> Spy:
    executor = SimulatedExecutor(
        model or cost_model(), num_blocks=LIMITS.num_blocks, block_size=LIMITS.block_size, vocabulary=range(100)
    )
    return Spy(executor)


def kind_of(sample: Sample) -> tuple[str, bool]:
    shape = sample.shape
    if shape.num_decodes and shape.num_prefill_tokens:
        return "mixed", sample.co_running
    return ("decode" if shape.num_decodes else "prefill"), sample.co_running


ALL_KINDS = {(kind, co_running) for kind in ("decode", "prefill") for co_running in (False, True)} | {("mixed", False)}


@pytest.mark.parametrize(("make", "units"), [(Grid.quick, 8), (Grid.full, 2)])
def test_a_grid_measures_every_kind_of_work_and_the_samples_are_exact(make, units) -> None:
    model = cost_model(compute_units=units)
    executor = spy(model)
    grid = make(build_partition_table(units, 1, 1), LIMITS)
    samples = measure(executor, grid)
    assert {kind_of(sample) for sample in samples} >= ALL_KINDS
    # Where both lanes run there are two samples.
    assert len(samples) == sum(len(case.loads) for case in grid.cases)
    for sample in samples:
        expected_ns = model.duration_ns(sample.shape, sample.lane, sample.partition, sample.co_running)
        assert sample.duration_ns == expected_ns
    assert executor.live == {"calibration-prompt-0"}  # a single token; everything else has been given up


def test_both_lanes_are_busy_all_the_time_while_they_are_measured_together() -> None:
    executor = spy()
    partition = TABLE.split_nearest(0.5)
    case = Case(partition, decode=Load(2, 64), prefill=Load(chunk=64))
    measure(executor, replace(Grid.quick(TABLE, LIMITS), cases=(case,), num_rounds=1))
    together = [batch for batch in executor.batches if batch.co_running]
    assert {batch.partition for batch in together} == {partition}
    assert {batch.lane for batch in together} == set(Lane)
    # 2 prefill chunks are timed after the one that warms up the slot.
    assert len([batch for batch in together if batch.lane is Lane.PREFILL]) == 3
    durations = {Lane.DECODE: 0, Lane.PREFILL: 0}
    model = cost_model()
    for batch in together:
        durations[batch.lane] += model.duration_ns(BatchShape.of(batch), batch.lane, batch.partition, True)
    # They start together; neither lane pauses before the last batch of the other has begun.
    decode_ns = model.duration_ns(BatchShape.of(together[0]), Lane.DECODE, partition, True)
    assert 0 <= durations[Lane.DECODE] - durations[Lane.PREFILL] <= 1.1 * decode_ns


def test_a_shape_is_as_asked_for() -> None:
    executor = spy()
    cases = (
        Case(TABLE.whole, decode=Load(4, 256, 64, 128)),
        Case(TABLE.whole, prefill=Load(chunk=96)),
    )
    mixed, cold = measure(executor, replace(Grid.quick(TABLE, LIMITS), cases=cases))
    assert (mixed.lane, mixed.shape.num_decodes, mixed.shape.num_samples) == (Lane.DECODE, 4, 4)
    # The first token at 256 makes the sequence ready; 257 to 304 are decoded with at most 48 steps.
    assert 4 * 258 <= mixed.shape.num_decode_context <= 4 * 304
    assert (mixed.shape.num_prefill_chunks, mixed.shape.num_prefill_tokens) == (1, 64)
    assert 128 + 1 + 64 <= mixed.shape.num_prefill_context <= 128 + 1 + 4 * 64
    # A cold chunk always begins a prompt: 96 * 97 / 2 pairs.
    assert cold.shape == BatchShape(0, 0, 1, 96, 96, 4656, 0, 96)
    colds = [chunk for batch in executor.batches for chunk in batch.chunks if chunk.num_tokens == 96]
    assert len({chunk.request_id for chunk in colds}) == len(colds) >= 3
    assert {chunk.work_class for chunk in colds} == {WorkClass.COLD_PREFILL}


def test_the_median_batch_counts() -> None:
    """One slow batch among three leaves no trace."""
    model = cost_model()
    case = Case(TABLE.whole, prefill=Load(chunk=64))
    executor = spy(model)
    real_duration_ns = model.duration_ns
    calls = itertools.count()
    # The second timed batch takes ten times as long.
    model.duration_ns = lambda *arguments: real_duration_ns(*arguments) * (10 if next(calls) == 4 else 1)
    grid = replace(Grid.quick(TABLE, LIMITS), cases=(case,), max_timed=3)
    (sample,) = measure(executor, grid)
    assert next(calls) > 4
    assert sample.duration_ns == real_duration_ns(sample.shape, Lane.PREFILL, TABLE.whole, False)


def test_the_isolated_time_per_token() -> None:
    executor, model = spy(), cost_model()
    tpot_ns = measure_isolated_tpot_ns(executor, LIMITS)
    decodes = [batch for batch in executor.batches if batch.lane is Lane.DECODE]
    assert len(decodes) == 16 and {batch.partition.kind for batch in decodes} == {PartitionKind.WHOLE}
    contexts = [BatchShape.of(batch).num_decode_context for batch in decodes]
    assert contexts == list(range(257, 273))
    durations = {model.duration_ns(BatchShape.of(batch), Lane.DECODE, TABLE.whole, False) for batch in decodes}
    assert tpot_ns in durations
    assert executor.live == {"calibration-prompt-0"}


def test_when_the_time_is_spent_only_what_is_required_is_measured() -> None:
    grid = Grid.quick(TABLE, LIMITS, time_limit_ns=0)
    seen: list[Progress] = []
    samples = measure(spy(), grid, seen.append)
    required = [case for case in grid.cases if case.required]
    assert 0 < len(required) < len(grid.cases)
    # There, back and there again: a disturbance of one round is outvoted by the others.
    rounds = (*required, *reversed(required), *required)
    assert [progress.label for progress in seen] == [*(case.label for case in rounds), ""]
    assert {kind_of(sample) for sample in samples} == ALL_KINDS
    assert seen[-1] == Progress(3 * len(grid.cases), 3 * len(grid.cases), "")


@pytest.mark.parametrize("make", [Grid.quick, Grid.full])
@pytest.mark.parametrize(
    "sizes",
    [
        # num_blocks, block_size, max_model_len, max_num_seqs
        (64, 4, 256, 8),
        (512, 16, 8192, 1),
        (16, 16, 256, 2),
        (8, 1, 2, 4),
        (3, 16, 40, 3),
    ],
)
@pytest.mark.parametrize("units", [1, 2, 8])
def test_small_executors_can_be_measured_too(make, sizes, units) -> None:
    limits = Limits(*sizes)
    table = build_partition_table(units, 1, 1)
    grid = make(table, limits)
    assert len(set(grid.cases)) == len(grid.cases)
    harness = SimulatedExecutor(
        cost_model(compute_units=units), num_blocks=limits.num_blocks, block_size=limits.block_size, vocabulary=[1]
    )
    samples = measure(harness, grid)
    assert all(sample.duration_ns > 0 for sample in samples)
    assert {"decode", "prefill"} <= {kind_of(sample)[0] for sample in samples}
    for sample in samples:
        longest = sample.shape.num_prefill_longest
        assert longest <= limits.max_model_len
        assert sample.shape.num_decodes + sample.shape.num_prefill_chunks <= limits.max_num_seqs


def test_too_small_to_measure() -> None:
    with pytest.raises(ConfigError, match="at least 2 tokens"):
        Limits(num_blocks=8, block_size=4, max_model_len=1, max_num_seqs=1)
    with pytest.raises(ConfigError, match="positive"):
        Limits(num_blocks=0, block_size=4, max_model_len=8, max_num_seqs=1)
    # Two blocks, but a prompt of half the window needs four.
    with pytest.raises(ConfigError, match="KV cache of 8 tokens is too small"):
        Grid.quick(TABLE, Limits(num_blocks=2, block_size=4, max_model_len=32, max_num_seqs=4))


def test_a_failed_batch_ends_the_measurement() -> None:
    executor = SimulatedExecutor(cost_model(), num_blocks=4, block_size=16, vocabulary=[1])
    with pytest.raises(EngineError, match=r"a batch of the calibration failed: .* outside the pool"):
        measure(executor, Grid.quick(TABLE, LIMITS))
    with pytest.raises(EngineError, match="a batch of the calibration failed"):
        measure_isolated_tpot_ns(executor, LIMITS)


def test_an_executor_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentserve.runtime.calibration._TIMEOUT_S", 0.01)
    executor = spy()
    executor.next_completion_ns = lambda: None
    with pytest.raises(EngineError, match="did not finish a batch"):
        measure_isolated_tpot_ns(executor, LIMITS)


def test_sequences_start_again_before_they_leave_their_blocks() -> None:
    limits = Limits(num_blocks=64, block_size=4, max_model_len=64, max_num_seqs=4)
    stream = LoadStream("s", Load(1, 8, 3, 16), range(8), itertools.count(8), limits)
    starts: list[tuple[int, ...]] = []
    ended: list[str] = []
    blocks: set[int] = set()
    for _ in range(120):
        chunks, timed = stream.next()
        assert timed == (tuple(chunk.start for chunk in chunks) != (8, 16) and len(chunks) == 2)
        starts.append(tuple(chunk.start for chunk in chunks))
        for chunk in chunks:
            blocks.update(chunk.block_ids[chunk.start // 4 :])
        ended += stream.take_ended()
    # Ready at 8 and 16, then one and three tokens a step, until the prompt has had four chunks.
    assert starts[:6] == [(8, 16), (9, 17), (10, 20), (11, 23), (12, 26), (16,)]
    # The sequence decodes 48 tokens, 8 to 55, in which the prompt starts again after every 4 chunks.
    assert max(start[0] for start in starts if len(start) == 2) == 55
    # 120 batches: 47 steps and 11 or 12 that make the prompt ready for each round of the sequence.
    assert [name for name in ended if "prompt" not in name] == ["s-0-0", "s-0-1"]
    # Positions 8 to 55 in 12 blocks and 16 to 28 in 4 (the last has one token), none of them a filled one.
    assert blocks == set(range(8, 24))
    assert stream.close() == ("s-0-2", f"s-prompt-{len(ended) - 2}")


CPU = cpu_sheet("test", "a CPU", compute_units=2, memory_bytes=1 << 34)
"""Where the fit starts: far from the device below in every rate."""
DEVICE = replace(
    CPU,
    bandwidth_bytes_per_s=15e9,
    flops_per_s=150e9,
    rows=((1.0, 4.0), (8.0, 12.0), (32.0, 48.0), (256.0, 256.0)),
    kv_bandwidth_bytes_per_s=7e9,
    attention_flops_per_s=40e9,
    bandwidth_saturation=0.3,
    rate_saturation=0.05,
    overhead_ns=1_500_000,
    layer_overhead_ns=120_000.0,
    sequence_overhead_ns=45_000.0,
    contention=Contention(decode_split=1.1, prefill_split=1.25, decode_shared=1.6, prefill_shared=1.9),
)
SMALL_MODEL = ModelShape(
    num_linear_parameters=106_000_000,
    num_head_parameters=28_000_000,
    weight_bytes=538_000_000,
    kv_bytes_per_token=46_080,
    attention_flops_per_pair=69_120,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
)


@pytest.mark.parametrize(("make", "typical", "worst"), [(Grid.quick, 0.03, 0.12), (Grid.full, 0.01, 0.02)])
def test_measuring_and_fitting_recover_a_device(make, typical: float, worst: float) -> None:
    """What was measured predicts batches that were not, alone and beside the other lane."""
    table, truth = build_partition_table(2, 1, 1), CostModel(DEVICE, SMALL_MODEL)
    executor = SimulatedExecutor(truth, num_blocks=2048, block_size=16, vocabulary=[1])
    fit = calibrate(executor, make(table, LIMITS), CPU, SMALL_MODEL, provenance="measured: in a test")
    assert fit.profile.provenance == "measured: in a test"
    fitted = CostModel(fit.profile, SMALL_MODEL)
    errors = []
    for partition, num_decodes, chunk in itertools.product(table.entries, (0, 1, 3, 6, 12), (0, 20, 48, 100, 200)):
        if num_decodes + chunk == 0:
            continue
        shape = BatchShape(num_decodes, num_decodes * 400, 0, 0, 0, 0, num_decodes)
        shape = shape.with_prefill(chunk, 300) if chunk else shape
        lane, co_running = Lane.DECODE if num_decodes else Lane.PREFILL, partition is not table.whole
        predicted = fitted.duration_ns(shape, lane, partition, co_running)
        errors.append(abs(predicted / truth.duration_ns(shape, lane, partition, co_running) - 1.0))
    assert median(errors) < typical
    assert max(errors) < worst


def cpu_table(capabilities: Capabilities) -> PartitionTable:
    return build_partition_table(capabilities.compute_units, capabilities.unit_granularity, capabilities.min_units)


def test_a_real_executor() -> None:
    """Nothing is said about how fast it is: only that everything was measured and the executor is as good as new."""
    harness = torch_harness(num_blocks=128, block_size=4)
    capabilities = harness.executor.capabilities()
    limits = Limits.of(capabilities, max_model_len=256, max_num_seqs=8)
    assert measure_isolated_tpot_ns(harness.executor, limits) > 0
    grid = Grid.quick(cpu_table(capabilities), limits, time_limit_ns=0)
    samples = measure(harness.executor, grid)
    assert {kind_of(sample) for sample in samples} == ALL_KINDS
    assert all(sample.duration_ns > 0 for sample in samples)
    assert {sample.partition.kind for sample in samples if sample.co_running} <= {
        PartitionKind.SPLIT,
        PartitionKind.CAP,
        PartitionKind.STREAM,
    }
    harness.executor.close()
