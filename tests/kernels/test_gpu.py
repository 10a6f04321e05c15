"""What only a GPU can show: real sizes, CUDA graphs, pools beyond 2**31 numbers, two lanes at once."""

from __future__ import annotations

import pytest
import torch

from agentserve_kernels import reference
from agentserve_kernels.attention import DecodeScratch
from agentserve_kernels.decode import paged_decode, scratch_rows
from agentserve_kernels.prefill import paged_prefill
from agentserve_kernels.sampling import SampleScratch, sample
from tests.kernels.builders import Cache, make_cache

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

MODELS = [(28, 4, 128), (9, 3, 64), (32, 8, 128)]
"""Heads, KV heads and head size of Qwen2.5-7B, SmolLM2-135M and Llama-3-8B."""
CUDA = torch.device("cuda")


def num_units() -> int:
    """Multiprocessors of the device."""
    return torch.cuda.get_device_properties(CUDA).multi_processor_count


def big_cache(lengths: list[int], num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> Cache:
    """As `make_cache`, without NaN and made on the device."""
    torch.manual_seed(len(lengths))
    counts = [-(-length // 16) for length in lengths]
    pool = torch.randn((sum(counts) + 1, 2, 2, num_kv_heads, 16, head_dim), device=CUDA).to(dtype)
    order = torch.randperm(len(pool), dtype=torch.int32)
    tables = torch.zeros((len(lengths), max(counts)), dtype=torch.int32)
    used = 0
    for row, count in enumerate(counts):
        tables[row, :count] = order[used : used + count]
        used += count
    kv_lengths = torch.tensor(lengths, dtype=torch.int32, device=CUDA)
    return Cache(pool, pool[:, 1, 0], pool[:, 1, 1], kv_lengths, tables.to(CUDA))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference over that of the expected."""
    expected = expected.double()
    return float((actual.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt())


LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("units", [8, None], ids=["slot", "device"])
def test_decode_of_real_sizes(model: tuple[int, int, int], dtype: torch.dtype, units: int | None) -> None:
    num_heads, num_kv_heads, head_dim = model
    units = units or num_units()
    cache = big_cache([1, 17, 1000, 4096, 16001], num_kv_heads, head_dim, dtype)
    query = torch.randn((5, num_heads, head_dim), device=CUDA).to(dtype)
    capability = torch.cuda.get_device_capability()
    rows = scratch_rows(5, num_heads, num_kv_heads, head_dim, 16384, units, dtype=dtype, capability=capability)
    scratch = DecodeScratch(rows, head_dim, device=CUDA)
    out, expected = torch.empty_like(query), torch.empty_like(query)
    arguments = (cache.kv_lengths, cache.block_tables)
    pages = (cache.k_pages, cache.v_pages)
    paged_decode(query, *pages, out, *arguments, scratch, scale=head_dim**-0.5, num_units=units)
    reference.paged_decode(query, *pages, expected, *arguments, scale=head_dim**-0.5)
    assert relative_error(out, expected) < LIMITS[dtype]


@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("splits", [False, True], ids=["whole", "split"])
def test_prefill_of_real_sizes(model: tuple[int, int, int], dtype: torch.dtype, splits: bool) -> None:
    num_heads, num_kv_heads, head_dim = model
    # (prefix, chunk): cold, and resumed after a long prefix.
    batch = [(2000, 30), (0, 700)] if not splits else [(5000, 40), (16, 3)]
    cache = big_cache([sum(pair) for pair in batch], num_kv_heads, head_dim, dtype)
    starts = torch.tensor([0, batch[0][1], batch[0][1] + batch[1][1]], dtype=torch.int32, device=CUDA)
    query = torch.randn((int(starts[-1]), num_heads, head_dim), device=CUDA).to(dtype)
    scratch = DecodeScratch(64 * 1024, head_dim, device=CUDA) if splits else None
    out, expected = torch.empty_like(query), torch.empty_like(query)
    arguments = (starts, cache.kv_lengths, cache.block_tables)
    pages = (cache.k_pages, cache.v_pages)
    paged_prefill(query, *pages, out, *arguments, scratch, scale=head_dim**-0.5, num_units=num_units())
    reference.paged_prefill(query, *pages, expected, *arguments, scale=head_dim**-0.5)
    assert relative_error(out, expected) < LIMITS[dtype]


def test_a_captured_decode_follows_its_inputs() -> None:
    cache = big_cache([4096, 4096, 4096], 4, 128, torch.bfloat16)
    query = torch.randn((3, 28, 128), device=CUDA).bfloat16()
    scratch = DecodeScratch(1 << 16, 128, device=CUDA)
    out, expected = torch.empty_like(query), torch.empty_like(query)
    pages = (cache.k_pages, cache.v_pages)

    def step() -> None:
        tables = (cache.kv_lengths, cache.block_tables)
        paged_decode(query, *pages, out, *tables, scratch, scale=0.1, num_units=num_units())

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for lengths in ([1, 0, 4096], [0, 0, 0], [777, 64, 65]):
        cache.kv_lengths.copy_(torch.tensor(lengths, dtype=torch.int32))
        query.normal_()
        out.fill_(torch.nan)
        graph.replay()
        reference.paged_decode(query, *pages, expected, cache.kv_lengths, cache.block_tables, scale=0.1)
        torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


def test_a_pool_beyond_two_to_the_31_numbers() -> None:
    # Blocks of 2**20 numbers, 8 KiB of which are one layer's keys: 2100 blocks are 4.4 GB.
    if torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("needs 6 GB of free memory")
    pool = torch.empty((2100, 128, 2, 1, 64, 64), dtype=torch.bfloat16, device=CUDA)
    assert pool.numel() > 2**31
    layer = pool[2090:, 127]
    layer.normal_()
    pages = (pool[:, 127, 0], pool[:, 127, 1])
    query = torch.randn((1, 4, 64), device=CUDA).bfloat16()
    out, expected = torch.empty_like(query), torch.empty_like(query)
    tables = torch.tensor([[2099, 2090]], dtype=torch.int32, device=CUDA)
    lengths = torch.tensor([100], dtype=torch.int32, device=CUDA)
    scratch = DecodeScratch(1024, 64, device=CUDA)
    paged_decode(query, *pages, out, lengths, tables, scratch, scale=0.125, num_units=num_units())
    reference.paged_decode(query, *pages, expected, lengths, tables, scale=0.125)
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


def test_two_lanes_at_once_do_not_disturb_each_other() -> None:
    cache = big_cache([8000, 3000], 4, 128, torch.bfloat16)
    query = torch.randn((2, 28, 128), device=CUDA).bfloat16()
    chunk = torch.randn((512, 28, 128), device=CUDA).bfloat16()
    starts = torch.tensor([0, 256, 512], dtype=torch.int32, device=CUDA)
    pages, tables = (cache.k_pages, cache.v_pages), (cache.kv_lengths, cache.block_tables)
    scratches = [DecodeScratch(1 << 17, 128, device=CUDA) for _ in range(2)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]

    def run(stream: torch.cuda.Stream, lane: int, out: torch.Tensor) -> None:
        with torch.cuda.stream(stream):
            if lane:
                paged_prefill(chunk, *pages, out, starts, *tables, scratches[1], scale=0.1, num_units=64)
            else:
                paged_decode(query, *pages, out, *tables, scratches[0], scale=0.1, num_units=64)

    alone = [torch.empty_like(query), torch.empty_like(chunk)]
    torch.cuda.synchronize()
    for lane in range(2):
        run(streams[0], lane, alone[lane])
    torch.cuda.synchronize()
    for _ in range(20):
        outs = [torch.empty_like(query), torch.empty_like(chunk)]
        torch.cuda.synchronize()
        for lane in range(2):
            run(streams[lane], lane, outs[lane])
        torch.cuda.synchronize()
        assert torch.equal(outs[0], alone[0])
        assert torch.equal(outs[1], alone[1])


def test_sampling_a_real_vocabulary_does_not_synchronize() -> None:
    torch.manual_seed(0)
    logits = torch.randn((32, 152064), device=CUDA) * 3
    temperature = torch.linspace(0.0, 1.5, 32, device=CUDA)
    top_k = torch.tensor([0, 20] * 16, dtype=torch.int32, device=CUDA)
    top_p = torch.tensor([1.0, 0.8, 0.9, 1.0] * 8, dtype=torch.float64, device=CUDA)
    min_p = torch.zeros(32, device=CUDA)
    uniform = torch.rand(32, dtype=torch.float64, device=CUDA)
    tokens = torch.empty(32, dtype=torch.int64, device=CUDA)
    flags = torch.empty(32, dtype=torch.int32, device=CUDA)
    scratch = SampleScratch(32, 152064, device=CUDA)
    arguments = (logits, temperature, top_k, top_p, min_p, uniform, tokens, flags, scratch)
    sample(*arguments, num_candidates=152064)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sample(*arguments, num_candidates=152064)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = [
        reference.draw(row, float(t), int(k), float(p), 0.0, float(u))
        for row, t, k, p, u in zip(logits, temperature, top_k, top_p, uniform, strict=True)
    ]
    assert tokens.tolist() == expected
    assert flags.tolist() == [0] * 32


def test_a_cache_with_nan_around_the_tokens() -> None:
    cache = make_cache([33, 0, 200], num_kv_heads=4, head_dim=128, block_size=16, dtype=torch.bfloat16, device=CUDA)
    query = torch.randn((3, 28, 128), device=CUDA).bfloat16()
    out = torch.empty_like(query)
    scratch = DecodeScratch(1 << 14, 128, device=CUDA)
    tables = (cache.kv_lengths, cache.block_tables)
    paged_decode(query, cache.k_pages, cache.v_pages, out, *tables, scratch, scale=0.1, num_units=num_units())
    assert out.isfinite().all()
