"""KV tiers with a real model: the same tokens wherever the KV was meanwhile, and whatever happened to it."""

from __future__ import annotations

import errno
import logging
import random
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from agentserve.config import TierConfig, TieringConfig
from agentserve.core.events import EndRequest, EngineEvent, RequestFinished, SubmitRequest
from agentserve.core.transfers import Tier, Transfer
from agentserve.errors import EngineError
from agentserve.executors.pytorch.tiers import block_file
from agentserve.executors.pytorch.tiers.links import TierLinks
from agentserve.models.interface import DecoderModel
from agentserve.models.loader import load_model
from agentserve.runtime.live import LiveDriver, MonotonicClock
from agentserve.runtime.replay import build_core
from tests.core.builders import header, simulated, submit
from tests.engine.harness import Run
from tests.engine.tiers import BLOCK_SIZE, greedy, start, tiering
from tests.executors.builders import load_tiny
from tests.models.builders import SMOLLM2, requires_smollm2, save_tiny_model

LONG = 196
"""Tokens of a prompt: 12 whole blocks and a piece."""
NUM_BLOCKS = 13
"""Of the device: one such prompt and its answer fill it."""

ATTENTIONS = pytest.mark.parametrize("attention", ["mirror", "torch"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DecoderModel:
    directory = tmp_path_factory.mktemp("tiny")
    save_tiny_model(directory, "llama", max_position_embeddings=512)
    return load_tiny(directory)


def prompt(seed: int, num_tokens: int = LONG) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(100), k=num_tokens))


@pytest.fixture
def computed(model: DecoderModel) -> Callable[..., Run]:
    """What comes out where nothing is ever kept: each request in an engine of its own."""

    def compute(*requests: SubmitRequest, attention: str = "mirror") -> Run:
        whole = Run()
        for request in requests:
            engine = start(model, num_blocks=NUM_BLOCKS, attention=attention)
            run = engine.run([request])
            engine.close()
            whole.tokens |= run.tokens
            whole.logprobs |= run.logprobs
        return whole

    return compute


def assert_same(run: Run, expected: Run) -> None:
    for name, tokens in run.tokens.items():
        assert tokens == expected.tokens[name], name
        assert run.logprobs[name] == pytest.approx(expected.logprobs[name], abs=1e-4)


THREE = [greedy("first", prompt(1)), greedy("other", prompt(2)), greedy("again", prompt(1))]
"""The second one drives the first one out of the device, and the third one brings it back."""


@ATTENTIONS
@pytest.mark.parametrize("write_back", ["incremental", "on_evict"])
@pytest.mark.parametrize("below", [{"host": 64}, {"disk": 64}, {"host": 12, "disk": 64}], ids=["host", "disk", "both"])
def test_what_was_evicted_is_loaded_and_is_what_was_computed(
    model, computed, tmp_path, attention, write_back, below: dict[str, int]
) -> None:
    directory = tmp_path if "disk" in below else None
    tiers = tiering(model, **below, write_back=write_back)
    engine = start(model, num_blocks=NUM_BLOCKS, attention=attention, tiers=tiers, directory=directory)
    run = engine.run(THREE, apart=True)
    assert run.ends["first"].stats.num_cached_tokens == 0
    assert run.ends["again"].stats.num_cached_tokens == 12 * BLOCK_SIZE
    assert sum(stats.num_hit_tokens for stats in engine.core.stats().tiers) > 0
    assert not any(stats.num_failed_transfers for stats in engine.core.stats().tiers)
    assert_same(run, computed(*THREE, attention=attention))
    engine.close()


@ATTENTIONS
@pytest.mark.parametrize("host", [0, 12])
def test_a_disk_tier_is_found_again_after_a_restart(model, computed, tmp_path, attention, host) -> None:
    tiers = tiering(model, host=host, disk=64)
    engine = start(model, num_blocks=NUM_BLOCKS, attention=attention, tiers=tiers, directory=tmp_path)
    more = [greedy("first", prompt(1)), *(greedy(f"o{seed}", prompt(seed)) for seed in (2, 3))]
    engine.run(more, apart=True)
    engine.close()
    engine = start(model, num_blocks=NUM_BLOCKS, attention=attention, tiers=tiers, directory=tmp_path)
    again = greedy("again", (*prompt(1), 7, 8, 9))
    run = engine.run([again])
    assert run.ends["again"].stats.num_cached_tokens == 12 * BLOCK_SIZE
    assert engine.stats("disk").num_hit_tokens == 12 * BLOCK_SIZE
    assert_same(run, computed(again, attention=attention))
    engine.close()


@pytest.mark.parametrize("write_back", ["incremental", "on_evict"])
def test_what_only_the_host_has_is_flushed_and_found_after_a_restart(model, computed, tmp_path, write_back) -> None:
    """Two prompts of 12 blocks, one on the device and one on the host; then the same with room for one on the disk."""
    for num_files, names in ((64, "ab"), (14, "b")):
        tiers = tiering(model, host=64, disk=num_files, write_back=write_back)
        directory = tmp_path / str(num_files)
        engine = start(model, num_blocks=NUM_BLOCKS, tiers=tiers, directory=directory)
        engine.run([greedy("a", prompt(1)), greedy("b", prompt(2))], apart=True)
        assert engine.stats("disk").num_used_blocks == 0
        engine.flush()
        engine.close()
        again = [greedy(name, (*prompt(seed), 7, 8, 9)) for name, seed in (("a", 1), ("b", 2)) if name in names]
        engine = start(model, num_blocks=NUM_BLOCKS, tiers=tiers, directory=directory)
        # The answers reach into a 13th block. Of two prompts the one used last is worth more, with its beginning.
        assert engine.stats("disk").num_used_blocks == min(num_files, 24)
        run = engine.run(again, apart=True)
        assert [end.stats.num_cached_tokens for end in run.ends.values()] == [12 * BLOCK_SIZE] * len(again)
        assert_same(run, computed(*again))
        engine.close()


def test_a_flush_that_takes_too_long_is_given_up(caplog) -> None:
    """A disk that needs 1,000 s to write a block; the driver waits for a moment and stops."""
    tiers = TieringConfig(1000, (TierConfig("host", 64, 1e12, 1e12), TierConfig("disk", 64, 1e12, 1.0)))
    done = threading.Event()

    def on_events(events: Sequence[EngineEvent]) -> None:
        if any(isinstance(event, RequestFinished) for event in events):
            done.set()

    driver = LiveDriver(
        build_core(header(tiering=tiers)),
        simulated(tiering=tiers),
        MonotonicClock(),
        on_events=on_events,
        on_failure=pytest.fail,
        flush_timeout_s=0.05,
    )
    driver.start()
    driver.post(submit("a", 40))
    assert done.wait(30)
    driver.stop()
    assert "not all of the KV cache was written in 0.05 s" in caplog.text
    with pytest.raises(EngineError):
        driver.post(submit("b", 40))


@ATTENTIONS
def test_many_sessions_that_share_prefixes_in_little_memory(model, computed, tmp_path, attention) -> None:
    """Turns of five sessions over one system prompt, at once: blocks are handed on while copies of them are about."""
    system, draw = prompt(0, 64), random.Random(5)
    histories = [[*system, *prompt(10 + index, 20)] for index in range(5)]
    requests = []
    for turn in range(4):
        for index in draw.sample(range(5), 5):
            requests.append(greedy(f"s{index}t{turn}", histories[index], 4))
            histories[index] += prompt(100 * turn + index, 24)
    tiers = tiering(model, host=16, disk=64, max_transfer_blocks=3)
    engine = start(model, num_blocks=20, attention=attention, tiers=tiers, directory=tmp_path)
    tokens: Run = Run()
    for first in range(0, len(requests), 5):
        run = engine.run(requests[first : first + 5])
        tokens.tokens |= run.tokens
        tokens.logprobs |= run.logprobs
    assert sum(stats.num_hit_tokens for stats in engine.core.stats().tiers) > 0
    assert_same(tokens, computed(*requests, attention=attention))
    engine.close()
    engine = start(model, num_blocks=20, attention=attention, tiers=tiers, directory=tmp_path)
    assert_same(engine.run(requests[-5:]), tokens)
    assert engine.stats("disk").num_hit_tokens
    engine.close()


# ---- what goes wrong ----


def damaged(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


DAMAGES: dict[str, Callable[[Path], Any]] = {"damaged": damaged, "cut off": cut_off, "gone": Path.unlink}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_blocks_that_cannot_be_read_are_computed_again(model, computed, tmp_path, damage, caplog) -> None:
    caplog.set_level(logging.WARNING)
    tiers = tiering(model, disk=64, max_transfer_blocks=4)
    engine = start(model, num_blocks=NUM_BLOCKS, tiers=tiers, directory=tmp_path)
    engine.run(THREE[:2], apart=True)
    engine.settle()
    for path in tmp_path.glob("*.kv"):
        damage(path)
    run = engine.run(THREE[2:])
    assert run.ends["again"].stats.num_cached_tokens == 0
    assert_same(run, computed(*THREE[2:]))
    # The first of three pieces failed; the rest was not tried. Its first file is gone, and written again after that.
    assert engine.stats("disk").num_failed_transfers == 1
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    engine.close()


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_after_a_restart_what_is_whole_is_used(model, computed, tmp_path, damage) -> None:
    tiers = tiering(model, disk=64, max_transfer_blocks=4)
    engine = start(model, num_blocks=NUM_BLOCKS, tiers=tiers, directory=tmp_path)
    engine.run(THREE[:1])
    engine.close()
    # By age: the blocks of a prompt are written in order.
    files = sorted(tmp_path.glob("*.kv"), key=lambda path: path.stat().st_mtime_ns)
    damage(files[5])
    engine = start(model, num_blocks=NUM_BLOCKS, tiers=tiers, directory=tmp_path)
    run = engine.run(THREE[2:])
    # Damage is seen when the second piece of four is read; what is cut off or gone, in advance: five blocks are there.
    whole = 4 if damage is damaged else 5
    assert run.ends["again"].stats.num_cached_tokens == whole * BLOCK_SIZE
    assert_same(run, computed(*THREE[2:]))
    engine.close()


def test_a_full_disk_stops_writing_once_and_disturbs_nobody(model, computed, tmp_path, monkeypatch, caplog) -> None:
    caplog.set_level(logging.WARNING)
    write, num_writes = block_file.write_all, 0

    def full_after_ten(file: Any, data: memoryview) -> None:
        nonlocal num_writes
        num_writes += 1
        if num_writes > 10:  # two for each file: its header and its payload
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, data)

    monkeypatch.setattr(block_file, "write_all", full_after_ten)
    tiers = tiering(model, disk=64, max_transfer_blocks=1)
    engine = start(model, num_blocks=NUM_BLOCKS, tiers=tiers, directory=tmp_path)
    engine.run(THREE[:1])
    engine.settle()
    run = engine.run(THREE[1:], apart=True)
    assert_same(run, computed(*THREE))
    # Five files came to be; they can be read.
    assert run.ends["again"].stats.num_cached_tokens == 5 * BLOCK_SIZE
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".kv"] * 5 + [".lock"]
    assert num_writes == 11
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "has stopped writing" in caplog.text and "No space left" in caplog.text
    engine.close()


@ATTENTIONS
def test_transfers_that_fail_cost_time_only(model, computed, monkeypatch, attention) -> None:
    def fail(self: TierLinks, transfer: Transfer, staging: object) -> None:
        del self, staging
        raise OSError(f"no copy of {transfer.transfer_id}")

    tiers = tiering(model, host=64, max_transfer_blocks=4)
    engine = start(model, num_blocks=NUM_BLOCKS, attention=attention, tiers=tiers)
    run = engine.run(THREE[:2], apart=True)
    engine.settle()
    monkeypatch.setattr(TierLinks, "_copy", fail)
    again = engine.run([THREE[2], greedy("more", prompt(4))], apart=True)
    assert again.ends["again"].stats.num_cached_tokens == 0
    assert engine.stats("host").num_failed_transfers > 1
    run.tokens |= again.tokens
    run.logprobs |= again.logprobs
    assert_same(run, computed(*THREE, greedy("more", prompt(4)), attention=attention))
    engine.close()


class SlowLink:
    """Copies to the device that wait until they are let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        copy = TierLinks._copy

        def wait(links: TierLinks, transfer: Transfer, staging: Any) -> None:
            if transfer.destination is Tier.DEVICE:
                self.begun.set()
                assert self.go.wait(60)
            copy(links, transfer, staging)

        monkeypatch.setattr(TierLinks, "_copy", wait)


def test_a_slow_load_holds_up_nobody_else(model, computed, monkeypatch) -> None:
    engine = start(model, num_blocks=2 * NUM_BLOCKS, tiers=tiering(model, host=64))
    engine.run([*THREE[:2], greedy("third", prompt(3))], apart=True)
    engine.settle()
    slow, beside = SlowLink(monkeypatch), greedy("beside", prompt(6, 40), 6)
    run = engine.run([THREE[2], beside], on_end={"beside": slow.go.set})
    assert list(run.ends) == ["beside", "again"]
    assert run.ends["again"].stats.num_cached_tokens == 12 * BLOCK_SIZE
    assert_same(run, computed(THREE[2], beside))
    engine.close()


def test_a_request_that_is_cancelled_while_it_loads_gives_everything_back(model, computed, monkeypatch) -> None:
    engine = start(model, num_blocks=NUM_BLOCKS, tiers=tiering(model, host=64, max_transfer_blocks=4))
    engine.run(THREE[:2], apart=True)
    engine.settle()
    slow = SlowLink(monkeypatch)
    engine.step([THREE[2]])
    assert slow.begun.wait(60)
    engine.step([EndRequest("again")])
    assert engine.core.has_unfinished  # a copy into its blocks is still under way
    slow.go.set()
    engine.settle()
    assert not engine.core.has_unfinished
    # One of the three pieces was copied.
    assert engine.stats("host").num_hit_tokens == 4 * BLOCK_SIZE
    assert engine.core.memory.num_available_blocks == NUM_BLOCKS
    later = greedy("later", prompt(1))
    assert_same(engine.run([later]), computed(later))
    engine.close()


@requires_smollm2
@pytest.mark.smollm2
def test_smollm2_writes_the_same_from_host_and_disk(tmp_path) -> None:
    """A prompt of 100 tokens, of which 6 blocks are whole."""
    model = load_model(SMOLLM2)
    requests = [greedy("cold", prompt(1, 100)), greedy("other", prompt(2, 104)), greedy("warm", prompt(1, 100))]
    runs: list[Run] = []
    for host, disk, start_at in ((0, 0, 2), (64, 0, 0), (0, 64, 0), (0, 64, 2)):
        tiers = tiering(model, host=host, disk=disk)
        directory = tmp_path if disk else None
        engine = start(model, num_blocks=7, tiers=tiers, directory=directory, max_model_len=112)
        runs.append(engine.run(requests[start_at:], apart=True))
        engine.close()
    assert [run.ends["warm"].stats.num_cached_tokens for run in runs] == [0, *[6 * BLOCK_SIZE] * 3]
    assert len({tuple(run.tokens["warm"]) for run in runs}) == 1
