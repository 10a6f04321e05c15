"""The C++ kernels for CPUs, against the same references as the Triton kernels."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from agentserve_kernels import reference
from agentserve_kernels.checks import KernelArgumentError
from agentserve_kernels.native import compiler, launch, library
from agentserve_kernels.native.library import NativeBuildError
from tests.kernels.builders import Cache, assert_near, make_cache, randn

OBSTACLE = library.cpu_obstacle() or (None if compiler.find() else "no C++ compiler")
CPU, BF16 = torch.device("cpu"), torch.bfloat16

requires_amx = pytest.mark.skipif(OBSTACLE is not None, reason=str(OBSTACLE))

SHAPES = pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "block_size"),
    [
        (9, 3, 64, 16),  # SmolLM2-135M
        (28, 4, 128, 16),  # Qwen2.5-7B
        (4, 4, 96, 32),  # no sharing of KV heads
        (16, 1, 64, 64),  # the largest group
        (4, 2, 256, 128),
    ],
)


def cache_of(lengths: list[int], num_kv_heads: int, head_dim: int, block_size: int) -> Cache:
    """What belongs to no sequence is NaN, and so is what follows the last token of a block."""
    return make_cache(
        lengths, num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=block_size, dtype=BF16, device=CPU
    )


def decode(cache: Cache, query: torch.Tensor) -> torch.Tensor:
    out = torch.full_like(query, torch.nan)
    launch.paged_decode(
        query, cache.k_pages, cache.v_pages, out, cache.kv_lengths, cache.block_tables, scale=query.shape[-1] ** -0.5
    )
    return out


def prefill(cache: Cache, query: torch.Tensor, chunks: list[int]) -> torch.Tensor:
    starts = torch.tensor([0, *chunks]).cumsum(0).int()
    out = torch.full_like(query, torch.nan)
    pages = (cache.k_pages, cache.v_pages)
    launch.paged_prefill(
        query, *pages, out, starts, cache.kv_lengths, cache.block_tables, scale=query.shape[-1] ** -0.5
    )
    return out


@requires_amx
@SHAPES
def test_decode(num_heads: int, num_kv_heads: int, head_dim: int, block_size: int) -> None:
    # Padding, one token, the borders of blocks and of what is read at once, and more than one piece.
    lengths = [0, 1, 15, 16, 17, block_size + 1, 511, 512, 513, 1100]
    cache = cache_of(lengths, num_kv_heads, head_dim, block_size)
    query = randn((len(lengths), num_heads, head_dim), BF16, CPU)
    expected = torch.empty_like(query)
    reference.paged_decode(
        query, cache.k_pages, cache.v_pages, expected, cache.kv_lengths, cache.block_tables, scale=head_dim**-0.5
    )
    assert_near(decode(cache, query)[1:], expected[1:], BF16)


@requires_amx
def test_a_row_does_not_depend_on_the_others() -> None:
    cache = cache_of([700, 3, 1300], 2, 64, 16)
    query = randn((3, 4, 64), BF16, CPU)
    together = decode(cache, query)
    for row in range(3):
        own = slice(row, row + 1)
        alone = Cache(cache.pool, cache.k_pages, cache.v_pages, cache.kv_lengths[own], cache.block_tables[own])
        assert torch.equal(decode(alone, query[own]), together[own])


@requires_amx
@SHAPES
@pytest.mark.parametrize(
    ("starts", "chunks"),
    [([0], [2]), ([0], [200]), ([31], [33]), ([128, 0, 500], [5, 65, 32])],
    ids=["two", "cold", "odd", "several"],
)
def test_prefill(
    num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, starts: list[int], chunks: list[int]
) -> None:
    lengths = [start + chunk for start, chunk in zip(starts, chunks, strict=True)]
    cache = cache_of(lengths, num_kv_heads, head_dim, block_size)
    query = randn((sum(chunks), num_heads, head_dim), BF16, CPU)
    expected = torch.empty_like(query)
    ends = torch.tensor([0, *chunks]).cumsum(0).int()
    pages = (cache.k_pages, cache.v_pages)
    reference.paged_prefill(query, *pages, expected, ends, cache.kv_lengths, cache.block_tables, scale=head_dim**-0.5)
    assert_near(prefill(cache, query, chunks), expected, BF16)


@requires_amx
def test_large_scores_neither_overflow_nor_vanish() -> None:
    """A softmax that is one key: exponents of the others are far below what a float holds."""
    cache = cache_of([300], 1, 64, 16)
    query = torch.full((40, 2, 64), 30.0, dtype=BF16)
    expected = torch.empty_like(query)
    starts = torch.tensor([0, 40], dtype=torch.int32)
    pages = (cache.k_pages, cache.v_pages)
    reference.paged_prefill(query, *pages, expected, starts, cache.kv_lengths, cache.block_tables, scale=0.125)
    assert_near(prefill(cache, query, [40]), expected, BF16)
    assert_near(decode(cache, query[-1:]), expected[-1:], BF16)


@requires_amx
def test_lanes_compute_at_the_same_time() -> None:
    """Each thread has a workspace of its own."""
    cache = cache_of([900], 3, 64, 16)
    queries = [randn((64, 9, 64), BF16, CPU, seed=seed) for seed in range(2)]
    alone = [prefill(cache, query, [64]) for query in queries]
    results: list[list[torch.Tensor]] = [[], []]

    def work(index: int) -> None:
        for _ in range(20):
            results[index].append(prefill(cache, queries[index], [64]))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        assert all(torch.equal(result, alone[index]) for result in results[index])
        assert len(results[index]) == 20


@requires_amx
@pytest.mark.parametrize("num_rows", [1, 3, 40])
@pytest.mark.parametrize("width", [64, 576, 1000])
def test_add_rms_norm(num_rows: int, width: int) -> None:
    x, residual = randn((num_rows, width), BF16, CPU) * 3, randn((num_rows, width), BF16, CPU, seed=2)
    weight = randn((width,), BF16, CPU, seed=3)
    expected, total = reference.add_rms_norm(x, residual, weight, 1e-6)
    launch.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(residual, total)
    assert_near(x, expected, BF16)


@requires_amx
@pytest.mark.parametrize("width", [40, 1536])
def test_silu_mul(width: int) -> None:
    gate_up = randn((9, 2 * width), BF16, CPU) * 4
    gate_up[0, :8] = torch.tensor([0.0, -0.0, 88.0, -88.0, 1e30, -1e30, 1e-30, -1e-30])
    expected = reference.silu_mul(gate_up)
    out = torch.empty((9, width), dtype=BF16)
    launch.silu_mul(gate_up, out)
    assert_near(out, expected, BF16)
    launch.silu_mul(gate_up, gate_up[:, :width])  # into the gates
    assert torch.equal(gate_up[:, :width], out)


@requires_amx
@SHAPES
@pytest.mark.parametrize("has_norm", [False, True])
def test_rope_and_write(num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, has_norm: bool) -> None:
    num_tokens, num_all = 7, num_heads + 2 * num_kv_heads
    wide = randn((num_tokens, num_all * head_dim + 8), BF16, CPU)
    qkv = wide[:, : num_all * head_dim]
    angles = torch.rand((50, head_dim // 2)) * 6
    cos, sin = angles.cos(), angles.sin()
    positions = torch.tensor([0, 49, 3, 4, 5, 6, 20])
    slots = torch.tensor([2 * block_size, 5, -1, 6, block_size - 1, block_size, 0])
    weights = {"q_weight": randn((head_dim,), BF16, CPU, 4), "k_weight": randn((head_dim,), BF16, CPU, 5)}
    values = {"positions": positions, "eps": 1e-6, **(weights if has_norm else {})}
    results = []
    for function in (reference.rope_and_write, launch.rope_and_write):
        pool = torch.zeros((3, 2, num_kv_heads, block_size, head_dim), dtype=BF16)
        query = torch.zeros((num_tokens, num_heads, head_dim), dtype=BF16)
        function(qkv, cos, sin, pool[:, 0], pool[:, 1], slots, query, **values)
        results.append((query, pool))
    for expected, actual in zip(*results, strict=True):
        assert_near(actual, expected, BF16)
    assert torch.equal(results[0][1][:, 1], results[1][1][:, 1]), "values are copied as they are"


@requires_amx
def test_wrong_arguments_are_refused() -> None:
    cache = cache_of([20], 2, 64, 16)
    query = randn((1, 4, 64), BF16, CPU)
    with pytest.raises(KernelArgumentError, match=r"query is torch\.float32"):
        decode(cache, query.float())
    with pytest.raises(KernelArgumentError, match="k_pages has shape"):
        decode(cache, query[..., :32])
    with pytest.raises(KernelArgumentError, match="cannot share"):
        decode(cache, query[:, :3].contiguous())
    with pytest.raises(KernelArgumentError, match="differ in length"):
        decode(cache, query.expand(2, 4, 64).contiguous())
    with pytest.raises(KernelArgumentError, match="query_starts"):
        prefill(cache, query, [1, 1])
    x = torch.zeros((2, 8), dtype=BF16)
    with pytest.raises(KernelArgumentError, match=r"weight has shape \[7\]"):
        launch.add_rms_norm(x, x.clone(), x[0, :7], 1e-5)
    with pytest.raises(KernelArgumentError, match="gate_up has shape"):
        launch.silu_mul(x, x)
    with pytest.raises(KernelArgumentError, match="slots is"):
        launch.rope_and_write(
            torch.zeros((1, 512), dtype=BF16), torch.ones((4, 32)), torch.ones((4, 32)), cache.k_pages, cache.v_pages,
            torch.zeros(1), torch.zeros((1, 4, 64), dtype=BF16), positions=torch.zeros(1, dtype=torch.int64),
        )  # fmt: skip


@requires_amx
@pytest.mark.parametrize("num_rows", [0, 1, 3, 16, 17, 32, 33, 70])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(64, 64), (80, 96), (960, 576)])
def test_linear(num_rows: int, num_outputs: int, num_inputs: int) -> None:
    """Few rows and many, whole blocks of rows and outputs and incomplete ones; with bias and without; both dtypes."""
    wide = randn((num_rows, num_inputs + 8), BF16, CPU)
    x, weight = wide[:, :num_inputs], randn((num_outputs, num_inputs), BF16, CPU, 2)
    bias = randn((num_outputs,), BF16, CPU, 3)
    packed = launch.pack_linear(weight)
    expected = x.double() @ weight.double().T
    out = torch.full((num_rows, num_outputs), torch.nan)
    launch.linear(x, packed, out, num_outputs=num_outputs, bias=bias)
    # Products of bfloat16 are exact in float32; what is rounded is their sum.
    torch.testing.assert_close(out.double(), expected + bias.double(), rtol=1e-5, atol=1e-4)
    rounded = torch.full((num_rows, num_outputs), torch.nan, dtype=BF16)
    launch.linear(x, packed, rounded, num_outputs=num_outputs)
    assert_near(rounded, expected, BF16)


@requires_amx
@pytest.mark.parametrize("num_rows", [1, 40])
def test_gated_linear(num_rows: int) -> None:
    x, weight = randn((num_rows, 64), BF16, CPU), randn((192, 64), BF16, CPU, 2)
    packed = launch.pack_linear(weight, is_gated=True)
    expected = x.double() @ weight.double().T
    plain = torch.full((num_rows, 192), torch.nan, dtype=BF16)
    launch.linear(x, packed, plain, num_outputs=192, is_gated=True)
    assert_near(plain, expected, BF16)
    activated = torch.full((num_rows, 96), torch.nan, dtype=BF16)
    launch.linear(x, packed, activated, num_outputs=192, is_gated=True, activates=True)
    assert_near(activated, reference.silu_mul(expected), BF16)


@requires_amx
def test_wrong_arguments_of_linear() -> None:
    x, weight = torch.zeros((2, 64), dtype=BF16), torch.zeros((96, 64), dtype=BF16)
    packed, out = launch.pack_linear(weight), torch.zeros((2, 96), dtype=BF16)
    with pytest.raises(KernelArgumentError, match="no multiple of 32"):
        launch.pack_linear(weight[:, :40].contiguous())
    with pytest.raises(KernelArgumentError, match="not blocks of 32"):
        launch.pack_linear(weight[:80], is_gated=True)
    with pytest.raises(KernelArgumentError, match="packed has shape"):
        launch.linear(x[:, :32], packed, out, num_outputs=96)
    with pytest.raises(KernelArgumentError, match="out has shape"):
        launch.linear(x, packed, out[:1], num_outputs=96)
    with pytest.raises(KernelArgumentError, match="only gated weights"):
        launch.linear(x, packed, out[:, :48].contiguous(), num_outputs=96, activates=True)
    with pytest.raises(KernelArgumentError, match="bias has shape"):
        launch.linear(x, packed, out, num_outputs=96, bias=weight[0])


# ---- the library ----


def fake_compiler(directory: Path, body: str) -> str:
    path = directory / "compiler"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_it_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = tmp_path / "runs"
    body = f'[ "$1" = --version ] && echo 12 && exit\necho run >> {runs}\nfor last; do :; done\necho code > "$last"'
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, body))
    first = library.compiled(tmp_path / "cache")
    assert first.read_text() == "code\n"
    assert library.compiled(tmp_path / "cache") == first
    assert runs.read_text() == "run\n"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [first.name], "nothing unfinished stays"


def test_the_compilers_message_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = '[ "$1" = --version ] && exit\necho "note: here" >&2\necho "error: unknown option" >&2\nexit 3'
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, body))
    with pytest.raises(NativeBuildError, match="ended with 3: error: unknown option"):
        library.compiled(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(NativeBuildError, match=r"no C\+\+ compiler \(g\+\+, c\+\+, clang\+\+\)"):
        library.compiled(tmp_path)


def test_without_a_place_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, "exit"))
    (tmp_path / "file").touch()
    with pytest.raises(NativeBuildError, match="no place for compiled kernels"):
        library.compiled(tmp_path / "file" / "cache")


def test_what_is_no_library_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = '[ "$1" = --version ] && exit\nfor last; do :; done\necho code > "$last"'
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, body))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(library, "cpu_obstacle", lambda: None)
    library.load.cache_clear()
    try:
        with pytest.raises(NativeBuildError, match="cannot load"):
            library.load()
    finally:
        library.load.cache_clear()


@requires_amx
def test_kernels_have_the_threads_of_the_calling_thread() -> None:
    kernels = library.load()
    seen: list[int] = []

    def count(num_threads: int) -> None:
        torch.get_num_threads()  # the first call sets it to what any thread set last
        torch.set_num_threads(num_threads)
        seen.append(kernels.num_threads())

    before = torch.get_num_threads()
    try:
        for num_threads in (1, 3):
            thread = threading.Thread(target=count, args=(num_threads,))
            thread.start()
            thread.join()
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 3]
    assert kernels.num_threads() == before


def test_machines_that_it_is_not_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library.platform, "machine", lambda: "aarch64")
    assert library.cpu_obstacle() is not None and "aarch64" in str(library.cpu_obstacle())
    monkeypatch.undo()
    monkeypatch.setattr(library.torch.cpu, "get_capabilities", dict)
    if library.sys.platform == "linux" and library.platform.machine() == "x86_64":
        assert library.cpu_obstacle() == f"the CPU has no {' and no '.join(library._NEEDED)}"
