"""The paged pool, its dense mirrors, and attention over them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agentserve.executors.pytorch.attention.sdpa import SdpaAttention
from agentserve.executors.pytorch.devices.cpu import CpuDevice
from agentserve.executors.pytorch.executor import kv_bytes_per_block
from agentserve.executors.pytorch.kv_store import KvStore
from tests.contract.harness import chunk
from tests.executors.builders import TINY
from tests.models.reference import DenseCache

BLOCK_SIZE = 4
# 2 * 2 layers * 2 heads * 8 elements * 4 bytes = 256 bytes a token; mirrors grow by 256 tokens.
STEP_BYTES = 256 * 256


def store(limit: int = 1 << 30, num_blocks: int = 64) -> KvStore:
    return KvStore(
        TINY, CpuDevice(), torch.float32, num_blocks=num_blocks, block_size=BLOCK_SIZE, mirror_limit_bytes=limit
    )


def run(kv: KvStore, chunks, key: torch.Tensor, value: torch.Tensor) -> None:
    """Writes the same keys and values `[num_tokens, heads, head_dim]` in all layers."""
    with torch.inference_mode():
        mirrors = kv.open(chunks)
        attention = SdpaAttention(chunks, mirrors, TINY.num_kv_heads)
        for layer in range(TINY.num_layers):
            attention.attend(layer, torch.zeros(len(key), TINY.num_heads, TINY.head_dim), key, value)
        kv.write_through(chunks, mirrors)
        kv.close(mirrors)


def contents(kv: KvStore, name: str, block_ids, length: int) -> torch.Tensor:
    """`[num_layers, 2, heads, length, head_dim]` as a mirror made from the blocks has them."""
    probe = chunk(name, [0], block_ids, start=length)
    mirrors = kv.open([probe])
    kv.close(mirrors)
    assert mirrors[0].buffer is not None
    return mirrors[0].buffer[:, :, :, :length].clone()


def tokens(count: int) -> torch.Tensor:
    return torch.arange(count * 16.0).view(count, 2, 8)


def test_bytes_of_a_block():
    # 2 (keys and values) * 2 layers * 2 heads * 8 elements * 4 bytes * 16 tokens
    assert kv_bytes_per_block(TINY, "float32", 16) == kv_bytes_per_block(TINY, torch.float32, 16) == 4096
    assert kv_bytes_per_block(TINY, "bfloat16", 16) == 2048


def test_what_was_written_is_in_the_blocks():
    kv = store()
    run(kv, [chunk("a", range(5), (9, 3)), chunk("b", range(3), (5,))], tokens(8), tokens(8) + 1000)
    kv.forget(["a", "b"])
    read = contents(kv, "a", (9, 3), 5)
    for layer in range(TINY.num_layers):
        assert torch.equal(read[layer, 0].transpose(0, 1), tokens(8)[:5])
        assert torch.equal(read[layer, 1].transpose(0, 1), tokens(8)[:5] + 1000)
    assert torch.equal(contents(kv, "b", (5,), 3)[0, 0].transpose(0, 1), tokens(8)[5:])


def test_blocks_before_the_start_are_not_written():
    kv = store()
    run(kv, [chunk("a", range(8), (0, 1))], tokens(8), tokens(8))
    # Token 6 lies in the second block: of that the first two stay, the first block stays as a whole.
    run(kv, [chunk("a", [0, 0, 0], (0, 1, 2), start=6)], -tokens(3) - 1, -tokens(3) - 1)
    kv.forget(["a"])
    read = contents(kv, "a", (0, 1, 2), 9)[0, 0].transpose(0, 1)
    assert torch.equal(read, torch.cat([tokens(8)[:6], -tokens(3) - 1]))


def test_a_mirror_grows_and_keeps_what_it_holds():
    kv = store(num_blocks=200)
    run(kv, [chunk("a", range(250), range(200))], tokens(250), tokens(250))
    assert kv.mirror_bytes == STEP_BYTES
    run(kv, [chunk("a", range(10), range(200), start=250)], tokens(10), tokens(10))
    assert kv.mirror_bytes == 2 * STEP_BYTES
    assert torch.equal(contents(kv, "a", range(200), 260)[1, 0, 0, :250], tokens(250)[:, 0])


def test_the_least_recently_used_mirror_goes_first():
    kv = store(limit=2 * STEP_BYTES)
    for name, block in (("a", 0), ("b", 1)):
        run(kv, [chunk(name, [1], (block,))], tokens(1), tokens(1))
    run(kv, [chunk("a", [1], (0,), start=1)], tokens(1), tokens(1))
    run(kv, [chunk("c", [1], (2,))], tokens(1), tokens(1))
    assert kv.mirror_bytes == 2 * STEP_BYTES
    assert list(kv._mirrors) == ["a", "c"]


def test_mirrors_of_batches_in_flight_stay_whatever_the_limit():
    kv = store(limit=STEP_BYTES)
    chunks = [chunk(name, [1], (block,)) for block, name in enumerate("abc")]
    mirrors = kv.open(chunks)
    assert kv.mirror_bytes == 3 * STEP_BYTES
    kv.close(mirrors)
    assert kv.mirror_bytes == STEP_BYTES


def test_a_mirror_forgotten_in_flight_leaves_the_books_right():
    kv = store()
    mirrors = kv.open([chunk("a", [1], (0,))])
    kv.forget(["a", "never seen"])
    assert kv.mirror_bytes == 0
    kv.close(mirrors)
    run(kv, [chunk("a", [1], (0,))], tokens(1), tokens(1))
    assert kv.mirror_bytes == STEP_BYTES


def test_the_next_turn_takes_over_the_mirror_of_the_last_one():
    kv = store()
    run(kv, [chunk("first", range(10), (0, 1, 2))], tokens(10), tokens(10))
    (mirror,) = kv.open([chunk("first", [1], (0, 1, 2), start=10)])
    buffer = mirror.buffer
    kv.close([mirror])
    kv.forget(["first"])
    assert kv.mirror_bytes == STEP_BYTES
    # Two whole blocks of it are cached; the third is new.
    (mirror,) = kv.open([chunk("second", [1, 2], (0, 1, 7), start=8)])
    assert mirror.buffer is buffer
    assert torch.equal(buffer[1, 0, :, :8].transpose(0, 1), tokens(10)[:8])
    kv.close([mirror])
    assert kv.mirror_bytes == STEP_BYTES
    # It is gone now: whoever else begins alike fills a mirror of its own.
    (other,) = kv.open([chunk("third", [1], (0, 1, 8), start=8)])
    assert other.buffer is not buffer
    kv.close([other])


def test_a_retired_mirror_ends_before_a_block_that_was_written():
    kv = store()
    run(kv, [chunk("first", range(12), (0, 1, 2))], tokens(12), tokens(12))
    kv.forget(["first"])
    run(kv, [chunk("else", range(4), (1,))], -tokens(4) - 1, -tokens(4) - 1)
    assert torch.equal(contents(kv, "second", (0, 1), 8)[0, 0].transpose(0, 1), torch.cat([tokens(4), -tokens(4) - 1]))


def test_a_prefix_of_a_long_conversation_does_not_take_its_mirror():
    kv = store()
    run(kv, [chunk("long", range(12), (0, 1, 2))], tokens(12), tokens(12))
    kv.forget(["long"])
    kv.close(kv.open([chunk("other", [1], (0, 5), start=4)]))
    assert kv.mirror_bytes == 2 * STEP_BYTES


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.permutations(range(5)), st.integers(0, 4), st.integers(1, 8), st.integers(0, 3)),
        max_size=25,
    )
)
def test_what_is_in_a_mirror_is_what_is_in_the_blocks(plan):
    """Requests that begin with whatever blocks, one after the other, some under a name that was used before."""
    kv = store(limit=3 * STEP_BYTES)
    kv.pages.zero_()
    for turn, (blocks, num_cached, wanted, name) in enumerate(plan):
        start = 4 * num_cached
        num_new = min(wanted, 20 - start)
        part = chunk(f"{name}", range(num_new), tuple(blocks[: -(-(start + num_new) // 4)]), start=start)
        (mirror,) = kv.open([part])
        for index in range(num_cached):
            kept = mirror.buffer[:, :, :, 4 * index : 4 * index + 4]
            assert torch.equal(kept, kv.pages[blocks[index]])
        kv.close([mirror])
        run(kv, [part], tokens(num_new) + 100 * turn, tokens(num_new) - 100 * turn)
        kv.forget([part.request_id])
    assert kv.mirror_bytes == STEP_BYTES * len(kv._retired) <= 3 * STEP_BYTES


def test_a_failed_batch_leaves_no_pin():
    kv = store(limit=0)
    with pytest.raises(IndexError):
        kv.open([chunk("a", [1], (0,)), chunk("b", [1], (999,), start=3)])
    kv.close(kv.open([chunk("c", [1], (1,))]))
    assert kv.mirror_bytes == 0


def test_two_lanes_at_once():
    """Each thread has its own requests; both fight for the room that mirrors may take."""
    kv = store(limit=2 * STEP_BYTES)

    def work(lane: int) -> None:
        for turn in range(60):
            name, block = f"{lane}-{turn % 3}", 8 * lane + turn % 3
            mark = tokens(2) + 1000 * lane + turn
            run(kv, [chunk(name, [1, 2], (block,))], mark, mark)
            kv.forget([f"{lane}-{(turn + 1) % 3}"])
            assert torch.equal(contents(kv, name, (block,), 2)[1, 0].transpose(0, 1), mark)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, range(2))) == [None, None]
    assert kv.mirror_bytes == (len(kv._mirrors) + len(kv._retired)) * STEP_BYTES <= 2 * STEP_BYTES


@settings(max_examples=30)
@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=4), st.booleans())
def test_attention_equals_the_definition(plan, drop):
    """Each sequence comes in chunks of the given sizes; in each round all that are left are one batch."""
    torch.manual_seed(sum(map(sum, plan)))
    kv, reference = store(), DenseCache()
    starts = [0] * len(plan)
    for turn in range(max(map(len, plan))):
        alive = [i for i, sizes in enumerate(plan) if turn < len(sizes)]
        chunks = [chunk(str(i), [0] * plan[i][turn], range(16 * i, 16 * i + 16), start=starts[i]) for i in alive]
        num_tokens = sum(c.num_tokens for c in chunks)
        with torch.inference_mode():
            mirrors = kv.open(chunks)
            ours = SdpaAttention(chunks, mirrors, TINY.num_kv_heads)
            theirs = reference.batch(*[(c.request_id, c.num_tokens) for c in chunks])
            for layer in range(TINY.num_layers):
                # As a model has them: heads of one projection, so rows are not contiguous.
                heads = torch.randn(num_tokens, 10, 8)
                query, key, value = heads[:, :6], heads[:, 6:8], heads[:, 8:]
                expected = theirs.attend(layer, query, key, value)
                torch.testing.assert_close(ours.attend(layer, query, key, value), expected, atol=1e-5, rtol=1e-5)
            kv.write_through(chunks, mirrors)
            kv.close(mirrors)
        for i, c in zip(alive, chunks, strict=True):
            starts[i] = c.end
        if drop:
            kv.forget([c.request_id for c in chunks])


def test_a_mirror_ends_before_a_block_that_others_write():
    """Both that of a request whose end was told and that of one whose end was not told yet."""
    kv = store()
    run(kv, [chunk("told", range(12), (0, 1, 2))], tokens(12), tokens(12))
    run(kv, [chunk("untold", range(12), (3, 4, 5))], tokens(12), tokens(12))
    kv.forget(["told"])
    kv.overwritten([1, 5, 9])
    kv.pages[1] = kv.pages[5] = -1.0
    kv.forget(["untold"])
    for name, blocks, first_written in (("a", (0, 1, 2), 4), ("b", (3, 4, 5), 8)):
        found = contents(kv, name, (*blocks, 20), 12)[1, 0].transpose(0, 1)
        expected = tokens(12)
        expected[first_written : first_written + 4] = -1.0
        assert torch.equal(found, expected)
