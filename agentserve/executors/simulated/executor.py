"""An executor without hardware: durations from the cost model, synthetic tokens.

On a virtual clock it simulates a device; on the real clock it lets the daemon and its clients run with no hardware.
It never pretends: `Capabilities.simulated` is set, and the daemon says so everywhere.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from functools import lru_cache

from agentserve.core.batch import Batch, BatchOutput, Lane, SampleSpec, TokenSample
from agentserve.core.costmodel import CostModel
from agentserve.core.executor import Capabilities
from agentserve.core.splitmix import mix64

_MIN_OUTPUT, _MAX_OUTPUT = 27, 141  # output lengths of agent turns (AgentServe, Table I: 21 to 141 over its models)


class SimulatedExecutor:
    """Implements `core.executor.Executor`."""

    def __init__(
        self, cost_model: CostModel, *, num_blocks: int, block_size: int, vocabulary: Sequence[int], lookahead: int = 1
    ) -> None:
        """`vocabulary`: the token ids that outputs are made of, cycled through; at least one. `lookahead`: batches
        that may be in flight in a lane."""
        if not vocabulary:
            raise ValueError("the vocabulary is empty")
        self._cost_model = cost_model
        self._vocabulary = tuple(vocabulary)
        device = cost_model.device
        self._capabilities = Capabilities(
            name="simulated",
            device=f"simulated timing of {device.description}",
            compute_units=device.compute_units,
            unit_granularity=device.unit_granularity,
            min_units=device.min_units,
            num_blocks=num_blocks,
            block_size=block_size,
            lookahead=lookahead,
            simulated=True,
        )
        self._in_flight: dict[Lane, deque[BatchOutput]] = {lane: deque() for lane in Lane}
        self._checked: dict[str, tuple[int, ...]] = {}
        """Blocks of a request that were all found in the pool."""
        self._closed = False

    def capabilities(self) -> Capabilities:
        return self._capabilities

    def submit(self, batch: Batch, now_ns: int) -> None:
        if self._closed:
            raise RuntimeError("the executor is closed")
        lane = self._in_flight[batch.lane]
        if len(lane) >= self._capabilities.lookahead:
            raise RuntimeError(f"the {batch.lane} lane is full")
        started_ns = max(now_ns, lane[-1].finished_ns) if lane else now_ns
        duration_ns = self._cost_model.duration_ns(batch.shape, batch.lane, batch.partition, batch.co_running)
        error = self._check_blocks(batch)
        samples = () if error else tuple(self._samples(batch))
        lane.append(BatchOutput(batch.batch_id, batch.lane, started_ns, started_ns + duration_ns, samples, error))

    def poll(self, now_ns: int) -> list[BatchOutput]:
        done = []
        for lane in self._in_flight.values():
            while lane and lane[0].finished_ns <= now_ns:
                done.append(lane.popleft())
        if len(done) > 1:
            done.sort(key=lambda output: (output.finished_ns, output.batch_id))
        return done

    def next_completion_ns(self) -> int | None:
        return min((lane[0].finished_ns for lane in self._in_flight.values() if lane), default=None)

    def on_completion(self, wake: Callable[[], None]) -> None:
        """Never calls `wake`: every completion is known beforehand through `next_completion_ns`."""

    def close(self) -> None:
        self._closed = True
        for lane in self._in_flight.values():
            lane.clear()

    def _check_blocks(self, batch: Batch) -> str | None:
        for request_id in batch.ended_request_ids:
            self._checked.pop(request_id, None)
        for chunk in batch.chunks:
            block_ids = chunk.block_ids
            if self._checked.get(chunk.request_id) is block_ids:  # the control plane keeps the tuple until it changes
                continue
            if min(block_ids) < 0 or max(block_ids) >= self._capabilities.num_blocks:
                return f"request {chunk.request_id} has a block id outside the pool"
            self._checked[chunk.request_id] = block_ids
        return None

    def _samples(self, batch: Batch) -> list[TokenSample]:
        return [self._sample(chunk.request_id, chunk.sample) for chunk in batch.chunks if chunk.sample is not None]

    def _sample(self, request_id: str, spec: SampleSpec) -> TokenSample:
        """A token that depends on the seed and its index only, and the end of the output after a drawn length."""
        params, index = spec.params, spec.output_index
        start = _mixed(params.seed)
        if params.stop_token_ids and index >= max(_output_length(start), params.min_tokens):
            token_id = params.stop_token_ids[0]
        else:
            # Output texts start at different places of the vocabulary and then follow it.
            token_id = self._vocabulary[(start + index) % len(self._vocabulary)]
        if params.logprobs is None:
            return TokenSample(request_id, token_id)
        # A made-up distribution: each candidate half as likely as the one before it.
        candidates = [token_id] + [t for t in self._vocabulary if t != token_id]
        top = tuple((t, -(i + 1) * math.log(2)) for i, t in enumerate(candidates[: params.logprobs]))
        return TokenSample(request_id, token_id, -math.log(2), top)


@lru_cache(maxsize=4096)
def _mixed(seed: int) -> int:
    """Kept, since all tokens of a request have one seed."""
    return mix64(seed)


def _output_length(mixed_seed: int) -> int:
    return _MIN_OUTPUT + mixed_seed % (_MAX_OUTPUT - _MIN_OUTPUT + 1)
