"""Tiny models and requests that are driven by hand, batch by batch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agentserve.core.batch import Batch, Lane, ScheduledChunk
from agentserve.core.request import SamplingParams
from agentserve.executors.pytorch.devices.cpu import CpuDevice
from agentserve.executors.pytorch.executor import TorchExecutor
from agentserve.models.config import ModelConfig
from agentserve.models.interface import DecoderModel
from agentserve.models.loader import load_model
from agentserve.models.registry import ModelSource, resolve_model
from tests.contract.harness import Harness, TickingClock, chunk, greedy, spec

TINY = ModelConfig(
    architecture="llama",
    vocab_size=160,
    hidden_size=48,
    intermediate_size=64,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    rope_theta=10_000.0,
    tie_word_embeddings=False,
)


@functools.cache
def tiny_llama() -> DecoderModel:
    """A Llama of random weights."""
    return load_model(ModelSource("tiny", None, None, TINY), load_format="dummy", seed=1)


def torch_harness(
    model: DecoderModel | None = None, *, num_blocks: int = 64, block_size: int = 4, **values: Any
) -> Harness:
    """An executor on the CPU; `values` go to `TorchExecutor`."""
    clock = TickingClock()
    executor = TorchExecutor(
        model or tiny_llama(),
        CpuDevice(),
        num_blocks=num_blocks,
        block_size=block_size,
        max_num_seqs=8,
        clock=clock,
        **values,
    )
    return Harness(executor, clock)


def load_tiny(directory: Path) -> DecoderModel:
    """A model that `save_tiny_model` wrote."""
    return load_model(resolve_model(str(directory)))


class Generation:
    """A request: knows its tokens so far and makes the chunk that comes next."""

    def __init__(
        self,
        name: str,
        prompt: Sequence[int],
        block_ids: Sequence[int],
        *,
        params: SamplingParams | None = None,
        num_cached: int = 0,
        block_size: int = 4,
    ) -> None:
        self.name = name
        self.block_ids = tuple(block_ids)
        self.token_ids = list(prompt)
        self.num_computed = num_cached
        self._num_prompt = len(prompt)
        self._params = params or greedy()
        self._block_size = block_size

    @property
    def output(self) -> list[int]:
        return self.token_ids[self._num_prompt :]

    def next_chunk(self, max_tokens: int = 1_000_000) -> ScheduledChunk:
        start, end = self.num_computed, min(len(self.token_ids), self.num_computed + max_tokens)
        history = self.token_ids if self._params.needs_history else ()
        sample = spec(self._params, len(self.output), history, self._num_prompt) if end == len(self.token_ids) else None
        tokens = self.token_ids[start:end]
        return chunk(self.name, tokens, self.block_ids, start=start, sample=sample, block_size=self._block_size)


def step(harness: Harness, sequences: Sequence[Generation], *, max_tokens: int = 1_000_000, **values: Any) -> Batch:
    """Runs one batch with the next chunk of each sequence and applies what came out of it."""
    batch = harness.batch([sequence.next_chunk(max_tokens) for sequence in sequences], **values)
    output = harness.run(batch)
    assert output.error is None, output.error
    apply(batch, output.samples, sequences)
    return batch


def apply(batch: Batch, samples: Sequence[Any], sequences: Sequence[Generation]) -> None:
    by_name = {sample.request_id: sample.token_id for sample in samples}
    for scheduled, sequence in zip(batch.chunks, sequences, strict=True):
        assert scheduled.request_id == sequence.name
        sequence.num_computed = scheduled.end
        if scheduled.sample is not None:
            sequence.token_ids.append(by_name[sequence.name])


def generate(
    harness: Harness, sequences: Sequence[Generation], num_tokens: int, *, chunk_size: int = 1_000_000
) -> None:
    """Steps all sequences together until each has so many output tokens."""
    while unfinished := [sequence for sequence in sequences if len(sequence.output) < num_tokens]:
        step(harness, unfinished, max_tokens=chunk_size, lane=Lane.DECODE)
