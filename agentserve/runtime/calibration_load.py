"""Turns a load into batches: sequences that walk on step by step, and start again before they leave their blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from agentserve.core.batch import SampleSpec, ScheduledChunk
from agentserve.core.request import SamplingParams, WorkClass
from agentserve.runtime.calibration_grid import Limits, Load, chunk_end, decode_end

_GREEDY = SampleSpec(SamplingParams(max_tokens=1, temperature=0.0), 0, (), 0)


class LoadStream:
    """The batches of one lane that run a load, without end."""

    def __init__(self, name: str, load: Load, filled: Sequence[int], private: Iterator[int], limits: Limits) -> None:
        """Takes the blocks it needs.

        Args:
            name: begins the names of its requests; no other stream in flight has it.
            load: what a batch is.
            filled: blocks with finite keys and values; contexts are made of them and they are not written to.
            private: blocks that nobody else uses.
            limits: of the executor.
        """
        decodes = [
            _Sequence(f"{name}-{index}", load.context, 1, decode_end(load.context, limits), True)
            for index in range(load.num_decodes)
        ]
        end = chunk_end(load.start, load.chunk, limits)
        prompts = [_Sequence(f"{name}-prompt", load.start, load.chunk, end, False)] if load.chunk else []
        self._sequences = (*decodes, *prompts)
        for index, sequence in enumerate(self._sequences):
            sequence.take_blocks(filled, private, limits, offset=index)
        self._ended: list[str] = []

    def next(self) -> tuple[tuple[ScheduledChunk, ...], bool]:
        """The chunks of the next batch, and whether its duration is that of the load.

        It is not if sequences that start in the middle are made ready: what an executor keeps for a sequence, such as
        its keys and values in one piece, it makes in the first batch with it.
        """
        for sequence in self._sequences:
            if sequence.is_exhausted:
                self._ended.append(sequence.restart())
        unprepared = tuple(sequence for sequence in self._sequences if sequence.is_unprepared)
        if unprepared:
            return tuple(sequence.advance(1) for sequence in unprepared), False
        return tuple(sequence.advance(sequence.step) for sequence in self._sequences), True

    def take_ended(self) -> tuple[str, ...]:
        """Requests that ended since the last call, for the next batch to be submitted."""
        ended = tuple(self._ended)
        self._ended.clear()
        return ended

    def close(self) -> tuple[str, ...]:
        """Ends everything; returns what `take_ended` would, all requests that still run included."""
        return (*self.take_ended(), *(sequence.request_id for sequence in self._sequences))


class _Sequence:
    """A request that decodes, or a prompt that is computed chunk by chunk."""

    def __init__(self, name: str, home: int, step: int, end: int, decodes: bool) -> None:
        self.step = step
        self._name = name
        self._home = self._position = home
        self._end = end
        self._decodes = decodes
        self._generation = 0
        self._block_ids: tuple[int, ...] = ()
        self._block_size = self._vocabulary_size = 1

    def take_blocks(self, filled: Sequence[int], private: Iterator[int], limits: Limits, offset: int) -> None:
        """Filled blocks for the context, as far apart from those of other sequences as their number allows."""
        self._block_size, self._vocabulary_size = limits.block_size, limits.vocabulary_size
        assert self._home % limits.block_size == 0, "a context is whole blocks"
        num_shared = self._home // limits.block_size
        shared = tuple(filled[(offset * num_shared + index) % len(filled)] for index in range(num_shared))
        num_private = -(-self._end // limits.block_size) - num_shared
        self._block_ids = shared + tuple(next(private) for _ in range(num_private))

    @property
    def request_id(self) -> str:
        return f"{self._name}-{self._generation}"

    @property
    def is_exhausted(self) -> bool:
        return self._position + self.step > self._end

    @property
    def is_unprepared(self) -> bool:
        return self._home > 0 and self._position == self._home

    def restart(self) -> str:
        """Begins a new request and returns the one that ended."""
        ended = self.request_id
        self._generation += 1
        self._position = self._home
        return ended

    def advance(self, num_tokens: int) -> ScheduledChunk:
        start, end = self._position, self._position + num_tokens
        self._position = end
        if self._decodes:
            work_class = WorkClass.DECODE
        else:
            work_class = WorkClass.RESUME_PREFILL if start else WorkClass.COLD_PREFILL
        return ScheduledChunk(
            request_id=self.request_id,
            work_class=work_class,
            start=start,
            token_ids=tuple(position % self._vocabulary_size for position in range(start, end)),
            block_ids=self._block_ids[: -(-end // self._block_size)],
            sample=_GREEDY if self._decodes else None,
        )
