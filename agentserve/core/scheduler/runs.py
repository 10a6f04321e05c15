"""Runs of decode steps, as a scheduler sees them: which ones are certain, and what is left of them in its books.

See `core/decode_run.py`. A step of a run does what a single step does to the controller, the memory and the requests,
and leaves out what would come out as before: admission, queues, chunks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from agentserve.core.batch import Batch, BatchOutput, BatchShape, Lane
from agentserve.core.decode_run import DecodePlan, DecodeRun, TokenSource
from agentserve.core.memory.manager import MemoryManager
from agentserve.core.request import Request, WorkClass
from agentserve.core.scheduler.base import Scheduler

# Looking up a member of an enumeration costs as much as a call.
_DECODE, _PREFILL = Lane.DECODE, Lane.PREFILL
_DECODE_WORK = WorkClass.DECODE


class RunScheduler(Scheduler):
    """A scheduler that can book runs of decode steps."""

    def decode_plan(self, *, settled: bool = False) -> DecodePlan | None:
        """The decode steps that are certain now; None if the next is not, or if they must be settled and are not."""
        head = self.in_flight.get(_DECODE)
        co_running = _PREFILL in self.in_flight
        # Without prompts a change of mind of the controller changes nothing.
        is_calm = not (co_running or self._reading or self.speculation.request) and self._memory.residency is None
        if self._slice_ns and self.waiting:
            return None  # whose slice is over changes from step to step
        if head is None or (settled and not is_calm) or self._ended or self._draining or not self._continues_alone():
            return None
        depth = 1 if self.ahead is None else 2
        num_steps = self._num_certain(head, depth)
        admission = self._admission_waits()
        if num_steps < 1 or admission is None:
            return None
        batches = (head,) if self.ahead is None else (head, self.ahead)
        is_settled = is_calm and admission and self._has_room(num_steps, depth)
        if settled and not is_settled:
            return None
        partition = self._co_partition() if co_running else self._table.whole
        return DecodePlan(batches, num_steps, partition, co_running, is_settled)

    def run_decodes(self, plan: DecodePlan, started_ns: int, ends_ns: Sequence[int], tokens: TokenSource) -> DecodeRun:
        """Books decode batches that end at `ends_ns`; fewer of them if something changes, but at least one.

        Behind it the scheduler is as in a single step that has taken the last completion and has not scheduled yet.
        """
        head = plan.batches[0]
        growth = _Growth(self._memory, list(self._decoding), head, tokens, len(plan.batches))
        following = _Following(plan, len(ends_ns))
        # Who got no memory is asked again when there is another amount of it.
        available = None if self._admission_waits() else self._memory.num_available_blocks
        has_room = available is None and self._memory.residency is None and self._has_room(len(ends_ns), growth.depth)
        self.batch_done(BatchOutput(head.batch_id, _DECODE, started_ns, ends_ns[0], ()))
        num_steps = 1
        while True:
            if num_steps >= growth.next_step:
                growth.publish(num_steps)
                if self._memory.residency is not None:
                    break  # copies to lower tiers may begin
            if num_steps == len(ends_ns) or self._is_short(growth.num_wanted(num_steps), available):
                break
            # As far as the memory need not be looked at.
            stop = following.stop(num_steps, len(ends_ns) if has_room else max(growth.next_step, num_steps + 1))
            num_more = self._follow(*following.of(num_steps), ends_ns[num_steps - 1], ends_ns[num_steps:stop])
            growth.catch_up(num_steps + num_more)
            num_steps += num_more
            if num_steps < stop:
                break
        ends = tuple(ends_ns[:num_steps])
        run = DecodeRun(
            started_ns=started_ns,
            ends_ns=ends,
            plan=plan,
            tokens=growth.finish(ends[-1], num_steps),
            block_ids=growth.block_ids(),
            occupancy=tuple(growth.occupancy),
            first_batch_id=self._num_batches,
            block_size=self._memory.block_size,
            in_flight=None,
        )
        self._num_batches += num_steps - 1
        if len(plan.batches) == 1:
            return run
        ahead = run.batch(num_steps)
        self._begin(ahead, ends[-1])
        return dataclasses.replace(run, in_flight=ahead)

    # ---- what schedulers differ in ----

    def _continues_alone(self) -> bool:
        """Whether a decode batch is followed by one of the same requests and nothing else, if nothing happens.

        Here: no prompt is to be read.
        """
        return not self._reading and self.ahead is None

    def _follow(self, batch: Batch, shape: BatchShape, started_ns: int, ends_ns: Sequence[int]) -> int:
        """Makes batches that follow each other from `started_ns` on: asks and tells whoever has to be asked and told.

        `batch` says how they run; the first one has this shape. Returns how many were made: fewer if something changed,
        and the next batch must be made as in a single step.
        """
        num_batches = self._agree(batch, shape, started_ns, ends_ns)
        if self._observer is not None:
            self._observer.continued(started_ns, ends_ns[:num_batches])
        return num_batches

    def _agree(self, batch: Batch, shape: BatchShape, started_ns: int, ends_ns: Sequence[int]) -> int:  # noqa: ARG002
        """The part of `_follow` that somebody else has a say in. Here: nobody."""
        return len(ends_ns)

    # ---- what is certain ----

    def _num_certain(self, head: Batch, depth: int) -> int:
        """Steps behind which no request reaches a limit; 0 if batches in flight are not just those that decode."""
        if len(head.chunks) != len(self._decoding):
            return 0
        limit = self._config.max_model_len
        num_steps = limit
        for request, chunk in zip(self._decoding, head.chunks, strict=True):
            params = request.sampling
            if (
                chunk.request_id != request.request_id
                or chunk.work_class is not _DECODE_WORK
                or request.finish_after_flight is not None
                or request.needs_history
                or params.logprobs is not None
                or params.constrained
            ):
                return 0
            num_tokens = len(request.token_ids)
            left = min(params.max_tokens + request.num_prompt_tokens, limit) - num_tokens
            num_steps = min(num_steps, left - depth)
        if self.ahead is not None and [c.request_id for c in self.ahead.chunks] != [c.request_id for c in head.chunks]:
            return 0
        return num_steps

    def _admission_waits(self) -> bool | None:
        """Whether nobody can be admitted: None if somebody can be now, False as long as the memory stays as it is."""
        adapters, held_adapters = self._memory.adapters, set[str]()
        for request in self.waiting:
            if self.speculation.request is not None:
                return None
            if self.num_seqs >= self._config.max_num_seqs:
                return True
            if request.request_id in self._waits_for:
                continue
            if adapters is not None and not adapters.admits(request, held_adapters):
                continue
            return False if self._state_of_things(request) == self._refused else None
        return True

    def _is_short(self, num_wanted: int, available_before: int | None) -> bool:
        """Whether blocks are missing for the next batch, or there are others than when somebody was refused."""
        available = self._memory.num_available_blocks
        return available < num_wanted or (available_before is not None and available_before != available)

    def _has_room(self, num_steps: int, depth: int) -> bool:
        """Whether the memory suffices for so many steps of all who decode, however blocks are shared."""
        size, num_new = self._memory.block_size, num_steps + depth
        return 2 * len(self._decoding) * (num_new // size + 2) <= self._memory.num_available_blocks


class _Following:
    """The batches of a run behind the first one as a controller sees them: how each runs, and its shape."""

    def __init__(self, plan: DecodePlan, num_steps: int) -> None:
        self._batches = plan.batches
        self._num_steps = num_steps
        self.depth = len(plan.batches)
        last = plan.batches[-1]
        # What a controller wants to know is how a batch ran. Its chunks may be those of a batch before it.
        is_alike = last.partition == plan.partition and last.co_running == plan.co_running
        self._following = (
            last if is_alike else dataclasses.replace(last, partition=plan.partition, co_running=plan.co_running)
        )
        shape = plan.batches[0].shape
        self._num_decodes, self._context = shape.num_decodes, shape.num_decode_context

    def stop(self, step: int, limit: int) -> int:
        """The first step behind `step`, from 0, whose batch may run in another way; at most `limit`."""
        return min(limit, self.depth if step < self.depth else self._num_steps, self._num_steps)

    def of(self, step: int) -> tuple[Batch, BatchShape]:
        """The batch that ends with `step`, from 0."""
        batch = self._batches[step] if step < self.depth else self._following
        num_decodes = self._num_decodes
        return batch, BatchShape(num_decodes, self._context + num_decodes * step, num_samples=num_decodes)


class _Growth:
    """Tokens and blocks of those who decode, brought up to date when a block is full, and at the end.

    Steps are counted from 1. The order of changes is that of single steps: all blocks that are full, then all that are
    new, each in the order of the chunks.
    """

    def __init__(
        self, memory: MemoryManager, requests: list[Request], head: Batch, tokens: TokenSource, depth: int
    ) -> None:
        self._memory = memory
        self._requests = requests
        self._specs = [chunk.sample for chunk in head.chunks]
        self._tokens = tokens
        self._before = [len(request.token_ids) for request in requests]
        self.depth = depth
        self._free_and_cached = memory.num_free_blocks, memory.num_cached_blocks
        self.occupancy: list[tuple[int, int, int]] = []
        """See `DecodeRun.occupancy`."""
        self._publish_at: list[int] = []
        self._extend_at: list[int] = []
        for request in requests:
            full_at, capacity = memory.limits(request.request_id)
            self._publish_at.append(full_at - len(request.token_ids) + 1)
            self._extend_at.append(capacity - len(request.token_ids) - depth + 2)
        self.next_step = min(*self._publish_at, *self._extend_at)
        """At which a block becomes full or is wanted."""

    def num_wanted(self, step: int) -> int:
        """Blocks that the batch behind this step needs."""
        return sum([at <= step for at in self._extend_at]) if step >= self.next_step else 0

    def catch_up(self, num_steps: int) -> None:
        """Publishes and takes blocks for all steps before the last one of `num_steps`: a batch has followed each."""
        memory = self._memory
        while (step := self.next_step) < num_steps:
            self.publish(step)
            self.extend(step)
            now = memory.num_free_blocks, memory.num_cached_blocks
            if now != self._free_and_cached:
                self._free_and_cached = now
                self.occupancy.append((step - 1, *now))

    def publish(self, step: int) -> None:
        """Books computed blocks."""
        for index, at in enumerate(self._publish_at):
            if at <= step:
                request = self._requests[index]
                self._append(index, step)
                num_computed = self._before[index] + step - 1
                self._memory.commit(request.request_id, request.token_ids, num_computed)
                full_at, _ = self._memory.limits(request.request_id)
                self._publish_at[index] = full_at - self._before[index] + 1

    def extend(self, step: int) -> None:
        """Takes blocks for the batch behind this step. The caller has made sure that there are enough."""
        size = self._memory.block_size
        for index, at in enumerate(self._extend_at):
            if at <= step:
                request_id = self._requests[index].request_id
                has_room = self._memory.extend(request_id, self._before[index] + step + self.depth - 1)
                assert has_room, "the blocks of a run were counted wrong"
                self._extend_at[index] += size
        self.next_step = min(*self._publish_at, *self._extend_at)

    def finish(self, now_ns: int, num_steps: int) -> tuple[tuple[int, ...], ...]:
        """Brings the requests up to date; returns the tokens that each of them got."""
        found = []
        for index, request in enumerate(self._requests):
            self._append(index, num_steps)
            before = self._before[index]
            request.num_computed_tokens = before + num_steps - 1
            request.last_token_ns = now_ns
            request.in_flight = self.depth > 1
            self._memory.commit(request.request_id, request.token_ids, request.num_computed_tokens)
            found.append(tuple(request.token_ids[before:]))
        return tuple(found)

    def block_ids(self) -> tuple[tuple[int, ...], ...]:
        """Of each request."""
        return tuple([self._memory.block_ids(request.request_id) for request in self._requests])

    def _append(self, index: int, num_steps: int) -> None:
        """Appends the tokens of the first `num_steps` steps, as far as they are not there yet."""
        token_ids = self._requests[index].token_ids
        num_done = len(token_ids) - self._before[index]
        if num_done < num_steps:
            spec = self._specs[index]
            assert spec is not None
            token_ids += self._tokens(spec, num_done, num_steps - num_done)
