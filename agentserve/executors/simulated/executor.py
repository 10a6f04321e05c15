"""An executor without hardware: durations from the cost model, synthetic tokens.

On a virtual clock it simulates a device; on the real clock it lets the daemon and its clients run with no hardware.
It never pretends: `Capabilities.simulated` is set, and the daemon says so everywhere.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate

from agentserve.config import LoraConfig, TieringConfig
from agentserve.core.adapters import TransferOrder
from agentserve.core.batch import Batch, BatchOutput, BatchShape, Lane, SampleSpec, TokenSample
from agentserve.core.costmodel import CostModel
from agentserve.core.decode_run import DecodePlan
from agentserve.core.executor import Capabilities, Completion
from agentserve.core.splitmix import mix64
from agentserve.errors import EngineError
from agentserve.executors.simulated.constrained import ConstrainedTokens
from agentserve.executors.simulated.links import SimulatedLinks

_MIN_OUTPUT, _MAX_OUTPUT = 27, 141  # output lengths of agent turns (AgentServe, Table I: 21 to 141 over its models)


class SimulatedExecutor:
    """Implements `core.decode_run.PredictableExecutor`."""

    def __init__(
        self,
        cost_model: CostModel,
        *,
        num_blocks: int,
        block_size: int,
        vocabulary: Sequence[int],
        lookahead: int = 1,
        tiering: TieringConfig | None = None,
        lora: LoraConfig | None = None,
        constrained: ConstrainedTokens | None = None,
    ) -> None:
        """Makes an idle device.

        Args:
            cost_model: says how long batches take.
            num_blocks: of the KV pool.
            block_size: tokens in a block.
            vocabulary: the token ids that outputs are made of, cycled through; at least one.
            lookahead: batches that may be in flight in a lane.
            tiering: the tiers below the pool, and the links to them.
            lora: the slots for adapters, and the link to them.
            constrained: chooses tokens for requests with a grammar; without it they fail.
        """
        if not vocabulary:
            raise ValueError("the vocabulary is empty")
        self._cost_model = cost_model
        self._vocabulary = tuple(vocabulary)
        self._vocabulary_set = frozenset(vocabulary)
        self._links = SimulatedLinks(tiering, num_blocks, lora)
        self._constrained = constrained
        device = cost_model.device
        self._turnaround_ns = device.turnaround_ns
        self._wakes = device.wake_ns > 0
        self._busy_until_ns = 0
        """End of the batch that ends last: only what the device does when it wakes up depends on it."""
        self._capabilities = Capabilities(
            name="simulated",
            device=f"simulated timing of {device.description}",
            compute_units=device.compute_units,
            unit_granularity=device.unit_granularity,
            min_units=device.min_units,
            num_blocks=num_blocks,
            block_size=block_size,
            tiers=self._links.tiers,
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
        started_ns = max(now_ns, lane[-1].finished_ns) if lane else now_ns + self._turnaround_ns
        duration_ns = self._cost_model.duration_ns(batch.shape, batch.lane, batch.partition, batch.co_running)
        if self._wakes and not any(self._in_flight.values()):
            duration_ns += self._cost_model.device.wake_ns_after(started_ns - self._busy_until_ns)
        self._busy_until_ns = max(self._busy_until_ns, started_ns + duration_ns)
        error = self._check_blocks(batch)
        samples: tuple[TokenSample, ...] = ()
        if error is None:
            try:
                samples = tuple(self._samples(batch))
            except EngineError as problem:  # a grammar's: it costs this batch, not the engine
                error = str(problem)
        lane.append(BatchOutput(batch.batch_id, batch.lane, started_ns, started_ns + duration_ns, samples, error))

    def submit_transfer(self, transfer: TransferOrder, now_ns: int) -> None:
        if self._closed:
            raise RuntimeError("the executor is closed")
        self._links.submit(transfer, now_ns)

    def poll(self, now_ns: int) -> list[Completion]:
        """Batches, then transfers, each in the order of finishing."""
        done: list[BatchOutput] = []
        for lane in self._in_flight.values():
            while lane and lane[0].finished_ns <= now_ns:
                done.append(lane.popleft())
        if len(done) > 1:
            done.sort(key=lambda output: (output.finished_ns, output.batch_id))
        return [*done, *self._links.poll(now_ns)]

    def next_completion_ns(self) -> int | None:
        next_ns = self._links.next_completion_ns()
        for lane in self._in_flight.values():
            if lane and (next_ns is None or lane[0].finished_ns < next_ns):
                next_ns = lane[0].finished_ns
        return next_ns

    def decode_ends(self, plan: DecodePlan, before_ns: int | None) -> tuple[int, list[int]]:
        decodes, prefills = self._in_flight[Lane.DECODE], self._in_flight[Lane.PREFILL]
        if self._turnaround_ns or self._wakes:
            return 0, []  # the batches of a run follow each other at once, on a device that is busy
        num_steps = self._num_before_stop(plan)
        if num_steps < 1 or any(output.error is not None for output in decodes):
            return 0, []
        limits = [output.finished_ns for output in prefills]
        limits += [
            at_ns for at_ns in (before_ns, plan.before_ns, self._links.next_completion_ns()) if at_ns is not None
        ]
        limit_ns = min(limits, default=None)
        ends = [output.finished_ns for output in decodes]
        num_more = num_steps - len(ends)
        last = plan.batches[-1].shape
        shape = BatchShape(last.num_decodes, last.num_decode_context + last.num_decodes, num_samples=last.num_decodes)
        if limit_ns is not None and num_more > 0:
            # Batches grow longer with their context, so no more of them can end before the limit.
            shortest_ns = self._cost_model.decode_durations(shape, plan.partition, plan.co_running, 1)[0]
            num_more = min(num_more, max(0, limit_ns - ends[-1]) // max(1, shortest_ns))
        if num_more > 0:
            durations = self._cost_model.decode_durations(shape, plan.partition, plan.co_running, num_more)
            ends = [*ends[:-1], *accumulate(durations, initial=ends[-1])]
        del ends[num_steps:]
        if limit_ns is not None:
            del ends[bisect_left(ends, limit_ns) :]
        return decodes[0].started_ns, ends

    def decoded_tokens(self, spec: SampleSpec, skip: int, count: int) -> list[int]:
        vocabulary = self._vocabulary
        size = len(vocabulary)
        first = (_mixed(spec.params.seed) + spec.output_index + skip) % size
        tokens = list(vocabulary[first : first + count])
        while len(tokens) < count:
            tokens += vocabulary[: count - len(tokens)]
        return tokens

    def skip_decodes(self) -> None:
        self._in_flight[Lane.DECODE].clear()

    def _num_before_stop(self, plan: DecodePlan) -> int:
        """Steps of a plan before any request may get a token that ends it."""
        num_steps = plan.num_steps
        for chunk in plan.batches[0].chunks:
            assert chunk.sample is not None
            params = chunk.sample.params
            if not params.stop_token_ids:
                continue
            if not self._vocabulary_set.isdisjoint(params.stop_token_ids):
                return 0
            # The token of that index ends the output; what is made ahead of it must not be made in vain.
            last = max(_output_length(_mixed(params.seed)), params.min_tokens)
            num_steps = min(num_steps, last - chunk.sample.output_index)
        return num_steps

    def on_completion(self, wake: Callable[[], None]) -> None:
        """Never calls `wake`: every completion is known beforehand through `next_completion_ns`."""

    def close(self) -> None:
        self._closed = True
        for lane in self._in_flight.values():
            lane.clear()
        self._links.clear()

    def _check_blocks(self, batch: Batch) -> str | None:
        for request_id in batch.ended_request_ids:
            self._checked.pop(request_id, None)
        for chunk in batch.chunks:
            block_ids = chunk.block_ids
            if self._checked.get(chunk.request_id) is block_ids:  # the control plane keeps the tuple until it changes
                continue
            # Blocks of a request stay as they are, and others come behind them. Those before the chunk, when it is the
            # first one, were written by others.
            known = self._checked.get(chunk.request_id)
            first = chunk.start // self._capabilities.block_size if known is None else len(known)
            fresh = block_ids[first:] or block_ids[-1:]
            if min(fresh) < 0 or max(fresh) >= self._capabilities.num_blocks:
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
        if params.constrained:
            if self._constrained is None:
                raise EngineError(f"request {request_id} is constrained, but there are no grammars here")
            token_id = self._constrained.choose(request_id, spec, token_id)
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
