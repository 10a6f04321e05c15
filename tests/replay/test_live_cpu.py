"""Live runs of the torch executor on CPU lanes, under load, replay identically."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from agentserve.core.events import EndRequest, EngineEvent, RequestFinished
from agentserve.core.request import FinishReason
from agentserve.executors.pytorch.devices.cpu import CpuDevice
from agentserve.executors.pytorch.executor import TorchExecutor
from agentserve.models.config import ModelConfig
from agentserve.models.interface import DecoderModel
from agentserve.models.loader import load_model
from agentserve.models.registry import ModelSource
from agentserve.runtime.live import LiveDriver, MonotonicClock
from agentserve.runtime.recording import Header, Recorder
from agentserve.runtime.replay import build_core, replay
from tests.core.builders import config, submit

NUM_RUNS = 20
NUM_REQUESTS = 24
NUM_BLOCKS, BLOCK_SIZE = 40, 4


@pytest.fixture(scope="module")
def model() -> DecoderModel:
    shape = ModelConfig(
        architecture="llama",
        vocab_size=200,
        hidden_size=64,
        intermediate_size=96,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=True,
    )
    return load_model(ModelSource("tiny", None, None, shape), load_format="dummy")


@pytest.mark.parametrize("seed", range(NUM_RUNS))
def test_a_live_run_under_load_replays_identically(seed: int, model: DecoderModel, tmp_path: Path) -> None:
    source = random.Random(seed)
    executor = TorchExecutor(
        model, CpuDevice(), num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, max_num_seqs=8, clock=MonotonicClock()
    )
    units = executor.capabilities().compute_units
    header = Header(config(num_blocks=NUM_BLOCKS, max_model_len=100), units, 1, 1, "tiny", "cpu")
    ends: dict[str, RequestFinished] = {}
    moved = threading.Condition()

    def on_events(events: Sequence[EngineEvent]) -> None:
        with moved:
            for event in events:
                if isinstance(event, RequestFinished):
                    assert event.request_id not in ends
                    ends[event.request_id] = event
            moved.notify()

    path = tmp_path / "run.jsonl"
    core = build_core(header)
    driver = LiveDriver(
        core, executor, MonotonicClock(), on_events=on_events, on_failure=pytest.fail, recorder=Recorder(path, header)
    )
    driver.start()
    for index in range(NUM_REQUESTS):
        base = source.randrange(3) * 40
        prompt = [base + place for place in range(source.randrange(1, 40))]
        driver.post(submit(f"r{index}", prompt, max_tokens=source.randrange(1, 24), seed=index))
        if source.random() < 0.25:
            driver.post(EndRequest(f"r{source.randrange(index + 1)}"))
        if index % 6 == 5:
            # Let the engine get ahead, so that requests arrive in the middle of others' lives.
            with moved:
                assert moved.wait_for(lambda wanted=index - 4: len(ends) >= wanted, timeout=60)
    with moved:
        assert moved.wait_for(lambda: len(ends) == NUM_REQUESTS, timeout=60)
    driver.stop()
    assert driver.failure is None
    assert {end.reason for end in ends.values()} <= {FinishReason.LENGTH, FinishReason.CANCELLED}
    assert core.memory.num_available_blocks == NUM_BLOCKS, "blocks were lost"
    report = replay(path)
    assert report.identical, report.divergence
    assert report.num_requests == NUM_REQUESTS
    stats = core.stats()
    assert stats.num_evicted_blocks > 0 and stats.num_prefix_hit_tokens > 0, "the load was too light to prove much"
