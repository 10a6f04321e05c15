"""Options of the KV tiers: what is refused before a model is loaded, and a daemon's engine that has them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from agentserve.build import Engine, build_engine
from agentserve.build.tiers import check_tiers
from agentserve.config import ServeConfig
from agentserve.core.executor import Tier
from agentserve.core.request import SamplingParams
from agentserve.errors import ConfigError
from agentserve.models.fingerprint import weights_fingerprint
from agentserve.models.registry import resolve_model
from agentserve.profiles.links import disk_blocks
from agentserve.runtime.replay import replay
from agentserve.runtime.streams import StreamEnd
from tests.models.builders import save_tiny_model


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("cpu", {"kv_disk_path": "x"}, "--kv-disk-path needs --kv-disk-size"),
        ("cpu", {"kv_disk_size": 1.0}, "need each other"),
        ("cpu", {"kv_write_back": "on_evict"}, "--kv-write-back needs"),
        ("cpu", {"kv_flush_timeout": 5.0, "kv_offloading_size": 1.0}, "--kv-flush-timeout needs --kv-disk-path"),
        ("cpu", {"kv_offloading_size": 1e9}, "GiB of memory are free"),
        ("cuda", {"kv_offloading_size": 1.0, "prefix_caching": False}, "need prefix caching"),
        ("cpu", {"kv_disk_size": 1.0, "kv_disk_path": "/dev/null/kv"}, "--kv-disk-path /dev/null/kv: Not a directory"),
        ("simulated", {"kv_disk_size": 1.0, "kv_disk_path": "x"}, "simulated timing keeps no files"),
    ],
)
def test_what_cannot_be_is_refused(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_tiers(ServeConfig(**options), kind)


def test_it_is_refused_before_the_model_is_loaded() -> None:
    lines: list[str] = []
    config = ServeConfig(model="smollm2-135m", load_format="dummy", executor="cpu", kv_disk_size=1.0)
    with pytest.raises(ConfigError, match="need each other"):
        build_engine(config, lines.append)
    assert lines == []


def test_files_take_whole_pages() -> None:
    assert disk_blocks(1.0, 4096) == 2**30 // 8192
    assert disk_blocks(1.0, 3900) == 2**30 // 4096


def test_a_simulated_disk() -> None:
    config = ServeConfig(model="qwen2.5-7b", executor="simulated", kv_offloading_size=1.0, kv_disk_size=2.0)
    engine = build_engine(config, lambda _: None)
    try:
        assert engine.capabilities.tiers == (Tier.DEVICE, Tier.HOST, Tier.DISK)
        assert any("disk tier: 2 GiB" in note for note in engine.notes)
    finally:
        engine.stop()


def test_weights_are_told_apart(tmp_path: Path) -> None:
    def fingerprint(name: str, seed: int = 0, load_format: str = "auto") -> str:
        return weights_fingerprint(resolve_model(str(tmp_path / name)), load_format=load_format, seed=seed)

    for name, seed in (("a", 0), ("b", 1)):
        save_tiny_model(tmp_path / name, "llama", seed=seed)
    assert fingerprint("a") == fingerprint("a") != fingerprint("b")
    assert fingerprint("a", 1, "dummy") == fingerprint("b", 1, "dummy") != fingerprint("a", 2, "dummy")


async def generate(engine: Engine, token_ids: Sequence[int]) -> tuple[list[int], int]:
    """The answer to a prompt, and the tokens of the prompt that were found."""
    engine.bridge.bind(engine.client, asyncio.get_running_loop())
    engine.driver.start()
    tokens: list[int] = []
    async for event in engine.client.generate(list(token_ids), SamplingParams(max_tokens=6, temperature=0.0)):
        if isinstance(event, StreamEnd):
            assert event.error is None
            return tokens, event.stats.num_cached_tokens
        tokens += [sample.token_id for sample in getattr(event, "samples", ())]
    raise AssertionError("the stream has no end")


@pytest.mark.parametrize(
    ("options", "num_kept"),
    [
        ({}, 48),
        # With a host tier nothing has to leave for the disk while the daemon runs: it is written when it ends.
        ({"kv_offloading_size": 0.001}, 48),
        ({"kv_offloading_size": 0.001, "kv_write_back": "on_evict"}, 48),
        ({"kv_offloading_size": 0.001, "kv_flush_timeout": 0.0}, 0),
    ],
)
def test_a_daemon_goes_on_with_the_kv_of_the_one_before_it_and_the_recording_replays(
    tmp_path: Path, options: dict[str, Any], num_kept: int
) -> None:
    save_tiny_model(tmp_path / "tiny", "llama", max_position_embeddings=512)
    words = tokenizers.models.WordLevel({f"w{index}": index for index in range(100)}, unk_token="w0")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tiny" / "tokenizer.json"))
    answers = []
    for turn in range(2):
        config = ServeConfig(
            model=str(tmp_path / "tiny"),
            executor="cpu",
            controller="static",
            kv_cache_memory=1 << 20,
            kv_disk_path=str(tmp_path / "kv"),
            kv_disk_size=0.01,
            record=str(tmp_path / f"log{turn}"),
            **options,
        )
        engine = build_engine(config, lambda _: None)
        try:
            answers.append(asyncio.run(generate(engine, range(50))))
        finally:
            engine.stop()
        found = next(note for note in engine.notes if note.startswith("disk tier"))
        assert f", {num_kept // 16 if turn else 0} found" in found
        assert replay(tmp_path / f"log{turn}").divergence is None
    # Three blocks of 16 tokens.
    assert [num_cached for _, num_cached in answers] == [0, num_kept]
    assert answers[0][0] == answers[1][0]
