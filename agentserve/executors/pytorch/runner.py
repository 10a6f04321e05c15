"""Runs a model on a batch: inputs, forward pass, sampling."""

from __future__ import annotations

import torch

from agentserve.core.batch import Batch, ScheduledChunk, TokenSample
from agentserve.errors import EngineError
from agentserve.executors.pytorch.attention.sdpa import SdpaAttention
from agentserve.executors.pytorch.kv_store import KvStore, Mirror
from agentserve.executors.pytorch.sampler import sample
from agentserve.models.interface import DecoderModel


class ModelRunner:
    """Computes batches. May be used by two threads at once, as long as a request is in one batch only."""

    def __init__(self, model: DecoderModel, store: KvStore, torch_device: torch.device) -> None:
        self._model = model
        self._store = store
        self._torch_device = torch_device

    def run(self, batch: Batch) -> tuple[TokenSample, ...]:
        """Computes the KV of all chunks and samples where that is asked for.

        Raises EngineError for a batch that cannot be right, before anything is written.
        """
        for chunk in batch.chunks:
            self._check(chunk)
        with torch.inference_mode():
            mirrors = self._store.open(batch.chunks)
            try:
                return self._compute(batch.chunks, mirrors)
            finally:
                self._store.close(mirrors)

    def _compute(self, chunks: tuple[ScheduledChunk, ...], mirrors: list[Mirror]) -> tuple[TokenSample, ...]:
        attention = SdpaAttention(chunks, mirrors, self._model.config.num_kv_heads)
        token_ids = [token_id for chunk in chunks for token_id in chunk.token_ids]
        positions = [position for chunk in chunks for position in range(chunk.start, chunk.end)]
        hidden = self._model.forward(
            torch.tensor(token_ids, device=self._torch_device),
            torch.tensor(positions, device=self._torch_device),
            attention,
        )
        self._store.write_through(chunks, mirrors)
        rows, row = [], -1
        for chunk in chunks:
            row += chunk.num_tokens
            if chunk.sample is not None:
                rows.append(row)
        if not rows:
            return ()
        # Only the last token of a finished prompt goes through the head, the largest matrix of a small model.
        if len(rows) < len(token_ids):
            hidden = hidden[torch.tensor(rows, device=self._torch_device)]
        samples = sample(self._model.logits(hidden), [chunk.sample for chunk in chunks if chunk.sample is not None])
        sampled = (chunk.request_id for chunk in chunks if chunk.sample is not None)
        return tuple(
            TokenSample(request_id, choice.token_id, choice.logprob, choice.top_logprobs)
            for request_id, choice in zip(sampled, samples, strict=True)
        )

    def _check(self, chunk: ScheduledChunk) -> None:
        """An index out of range would read or write memory of other requests."""
        config, store = self._model.config, self._store
        name = f"request {chunk.request_id}"
        if not chunk.token_ids or chunk.start < 0 or chunk.end > config.max_position_embeddings:
            raise EngineError(f"{name}: no such positions: {chunk.start} to {chunk.end}")
        if min(chunk.token_ids) < 0 or max(chunk.token_ids) >= config.vocab_size:
            raise EngineError(f"{name} has a token id outside the vocabulary of {config.vocab_size}")
        if len(chunk.block_ids) != -(-chunk.end // store.block_size):
            raise EngineError(f"{name} has {len(chunk.block_ids)} blocks for {chunk.end} tokens")
        if min(chunk.block_ids) < 0 or max(chunk.block_ids) >= store.num_blocks:
            raise EngineError(f"{name} has a block id outside the pool of {store.num_blocks}")
        if chunk.sample is not None:
            outside = [t for t, _ in chunk.sample.params.logit_bias if not 0 <= t < config.vocab_size]
            outside += [t for t in chunk.sample.history if not 0 <= t < config.vocab_size]
            if outside:
                raise EngineError(f"{name}: no such token: {outside[0]}")
