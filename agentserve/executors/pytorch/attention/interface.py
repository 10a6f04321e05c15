"""What the model runner needs of keys and values: a backend makes a batch ready, and the batch attends.

There are two backends. `paged.PagedBackend` attends over the blocks themselves, with kernels for GPUs and some CPUs.
`mirror.MirrorBackend` keeps dense copies of the sequences that are worked on: torch's attention wants that, which the
other CPUs have.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from torch import Tensor

from agentserve.core.batch import Lane, ScheduledChunk
from agentserve.models.interface import Attention


class OpenBatch(Protocol):
    """A batch whose keys and values are ready to be attended to and to be added to.

    The flat batch that the model computes need not have the order of the chunks: `last_rows` says where they are.
    """

    @property
    def attention(self) -> Attention:
        """For the forward pass of this batch."""
        ...

    @property
    def num_rows(self) -> int:
        """Rows of the flat batch, padding included."""
        ...

    @property
    def last_rows(self) -> Sequence[int]:
        """For each chunk the row of its last token."""
        ...

    @property
    def is_static(self) -> bool:
        """Whether this is a decode step in the buffers of the lane, as `StaticSteps` has them."""
        ...

    def inputs(self, carried: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids and positions, each `[num_rows]` int64.

        `carried` `[n]` int64 has the tokens that the lane's last batch sampled; they are put in where a chunk's token
        is pending.
        """
        ...

    def finish(self) -> None:
        """After the forward pass: makes keys and values of the batch visible to batches behind a fence."""
        ...

    def close(self) -> None:
        """Gives back what `open` took. Follows in any case."""
        ...


class StaticSteps(Protocol):
    """Decode steps that read the same memory each time, so that they can be captured in graphs.

    A step has one of a few numbers of rows, its bucket; rows beyond the sequences are padding.
    """

    buckets: tuple[int, ...]
    """Rising to the most sequences of a batch."""

    def batch(self, lane: Lane, bucket: int) -> OpenBatch:
        """The step of this bucket that was made ready last. Making this object launches nothing and copies nothing."""
        ...

    def pad(self, lane: Lane, bucket: int, units: int) -> None:
        """Makes a step ready that consists of padding: for warming up and capturing. To be called in the slot."""
        ...


class KvBackend(Protocol):
    """Keeps keys and values. Two lanes may use it at once, as long as a request is in one of them only."""

    num_blocks: int
    block_size: int

    @property
    def pages(self) -> Tensor:
        """The blocks, contiguous `[n, num_layers, 2, num_kv_heads, block_size, head_dim]` with `n >= num_blocks`.

        Others may copy whole blocks from and to it that no batch in flight writes or reads; see `overwritten`.
        """
        ...

    def overwritten(self, block_ids: Sequence[int]) -> None:
        """Says that others are about to write to these blocks. Called by any thread."""
        ...

    @property
    def static_steps(self) -> StaticSteps | None:
        """None if steps of this backend cannot be captured."""
        ...

    def open(self, lane: Lane, chunks: Sequence[ScheduledChunk], sources: Sequence[int], units: int) -> OpenBatch:
        """Makes a batch ready, in the slot in which it will run.

        Args:
            lane: whose batch it is; its batches are opened one after the other.
            chunks: checked, not empty.
            sources: for each chunk the place in `carried` of its token if that is pending, else -1.
            units: compute units of the slot.
        """
        ...

    def forget(self, request_ids: Iterable[str]) -> None:
        """Drops what is kept for requests that ended or lost their blocks. Called by the thread that submits."""
        ...

    def close(self) -> None:
        """Gives page-locked memory back, while the slots that used it are still there; nothing may be in flight."""
        ...
