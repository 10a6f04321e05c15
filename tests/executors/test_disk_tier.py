"""The directory of the disk tier: what is kept, what is thrown away, and what is left alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agentserve.core.transfers import StoredBlock
from agentserve.errors import ConfigError, EngineError
from agentserve.executors.pytorch.devices.cpu import CpuDevice
from agentserve.executors.pytorch.tiers import block_file
from agentserve.executors.pytorch.tiers.block_file import HEADER_BYTES, BlockHeader
from agentserve.executors.pytorch.tiers.disk import DiskTier, make_signature
from agentserve.executors.pytorch.tiers.memory import runs_of_pairs
from agentserve.executors.pytorch.tiers.rates import measure_disk_link, measure_host_link

SIZE = 1000
SIGNATURE = make_signature("weights", "float32")
ROOT = bytes(16)


def content(number: int) -> bytes:
    return bytes([number]) * 16


def payload(number: int) -> memoryview:
    return memoryview(bytes([number, 255 - number]) * (SIZE // 2))


def tier(directory: Path, num_blocks: int = 4, signature: bytes = SIGNATURE) -> DiskTier:
    return DiskTier(directory, num_blocks=num_blocks, block_bytes=SIZE, signature=signature)


def write(store: DiskTier, slot: int, number: int) -> None:
    store.write(slot, content(number), ROOT, payload(number))
    os.utime(store._path(content(number)), ns=(number, number))  # the smaller the number, the longer ago


def read(store: DiskTier, number: int) -> bytes:
    into = bytearray(SIZE)
    store.read(content(number), ROOT, memoryview(into))
    return bytes(into)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("*.kv*"))


def test_what_is_written_is_read_here_and_by_the_next_process(tmp_path: Path) -> None:
    store = tier(tmp_path)
    for number in (2, 1):
        write(store, number, number)
    assert read(store, 2) == bytes(payload(2))
    os.utime(store._path(content(2)), ns=(2, 2))
    store.close()
    again = tier(tmp_path)
    # By last use: 1 was used before 2. Slots are given anew.
    assert again.found == (StoredBlock(0, content(1), ROOT), StoredBlock(1, content(2), ROOT))
    assert read(again, 1) == bytes(payload(1))
    again.close()


def test_a_slot_takes_its_former_file_with_it(tmp_path: Path) -> None:
    store = tier(tmp_path)
    write(store, 0, 1)
    write(store, 0, 2)
    assert names(tmp_path) == [f"{content(2).hex()}.kv"]
    with pytest.raises(EngineError, match="No such file"):
        read(store, 1)
    store.close()


def test_a_content_that_moves_to_another_slot_stays_when_the_old_slot_is_used(tmp_path: Path) -> None:
    store = tier(tmp_path)
    write(store, 0, 1)
    write(store, 3, 1)
    write(store, 0, 2)
    assert (read(store, 1), read(store, 2)) == (bytes(payload(1)), bytes(payload(2)))
    write(store, 3, 2)
    assert names(tmp_path) == [f"{content(2).hex()}.kv"]
    assert store.num_files == 1
    store.close()


def test_what_was_used_least_recently_is_removed_where_less_room_is_allowed(tmp_path: Path) -> None:
    store = tier(tmp_path)
    for number in range(4):
        write(store, number, number + 1)
    store.close()
    again = tier(tmp_path, num_blocks=2)
    assert [block.content_id for block in again.found] == [content(3), content(4)]
    assert len(names(tmp_path)) == 2
    again.close()


def cut(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def rename(path: Path) -> None:
    path.rename(path.with_name(f"{content(9).hex()}.kv"))


USELESS: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: cut(path, 0),
    "header only": lambda path: cut(path, HEADER_BYTES),
    "cut off": lambda path: cut(path, -1),
    "too long": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "no magic": lambda path: flip(path, 0),
    "other version": lambda path: flip(path, 8),
    "other size": lambda path: flip(path, 16),
    "other model": lambda path: flip(path, 24),
    "other content": lambda path: flip(path, 40),
    "other name": rename,
    "half written": lambda path: path.rename(path.with_name(path.name + ".tmp")),
}


@pytest.mark.parametrize("spoil", USELESS.values(), ids=list(USELESS))
def test_files_that_cannot_be_used_are_removed_at_the_start(tmp_path: Path, spoil: Callable[[Path], Any]) -> None:
    store = tier(tmp_path)
    write(store, 0, 1)
    write(store, 1, 2)
    store.close()
    spoil(tmp_path / f"{content(1).hex()}.kv")
    again = tier(tmp_path)
    assert [block.content_id for block in again.found] == [content(2)]
    assert names(tmp_path) == [f"{content(2).hex()}.kv"]
    again.close()


@pytest.mark.parametrize("place", [12, 60, HEADER_BYTES, HEADER_BYTES + SIZE - 1])
def test_a_damaged_file_is_a_miss_and_removed_when_it_is_read(tmp_path: Path, place: int) -> None:
    store = tier(tmp_path)
    write(store, 0, 1)
    flip(tmp_path / f"{content(1).hex()}.kv", place)
    with pytest.raises(EngineError, match=r"damaged|another block"):
        read(store, 1)
    assert (names(tmp_path), store.num_files) == ([], 0)
    write(store, 0, 1)
    assert read(store, 1) == bytes(payload(1))
    store.close()


def test_kv_of_another_model_is_not_found(tmp_path: Path) -> None:
    store = tier(tmp_path)
    write(store, 0, 1)
    store.close()
    other = tier(tmp_path, signature=make_signature("other weights", "float32"))
    assert (other.found, names(tmp_path)) == ((), [])
    other.close()


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    strangers = ["notes.txt", "x.kv", f"{content(1).hex()}.kv.bak", f"{content(1).hex()[:-1]}Z.kv"]
    for name in strangers:
        (tmp_path / name).write_text("mine")
    (tmp_path / f"{content(3).hex()}.kv").mkdir()
    store = tier(tmp_path)
    write(store, 0, 1)
    store.close()
    assert all((tmp_path / name).read_text() == "mine" for name in strangers)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    store = tier(tmp_path)
    with pytest.raises(ConfigError, match="another process"):
        tier(tmp_path)
    store.close()
    tier(tmp_path).close()


def test_a_place_that_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--kv-disk-path .*file"):
        tier(tmp_path / "file")


def test_what_cannot_be_written_leaves_nothing_and_is_not_tried_again(tmp_path, monkeypatch, caplog) -> None:
    store = tier(tmp_path)
    write(store, 0, 1)
    num_writes = 0

    def full(file: Any, data: memoryview) -> None:
        nonlocal num_writes
        num_writes += 1
        file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(block_file, "write_all", full)
    for slot in (1, 2):
        with pytest.raises(EngineError, match=r"stopped writing .* No space left"):
            store.write(slot, content(slot + 1), ROOT, payload(2))
    assert num_writes == 1
    assert names(tmp_path) == [f"{content(1).hex()}.kv"]
    assert read(store, 1) == bytes(payload(1))
    assert len(caplog.records) == 1
    store.close()


def test_a_header_says_all() -> None:
    header = BlockHeader(7, SIGNATURE, content(1), content(2))
    assert len(header.pack()) == 8 + 3 * 16
    assert len({make_signature("a", 16), make_signature("a", "1", 6), make_signature("a1", 6)}) == 3


def test_neighbours_are_copied_together() -> None:
    pairs = [(3, 7), (4, 8), (5, 9), (6, 11), (7, 12), (2, 13)]
    # Slabs of 4: the run is cut before slot 4.
    assert list(runs_of_pairs(pairs, 4)) == [(3, 7, 1), (4, 8, 2), (6, 11, 2), (2, 13, 1)]
    assert list(runs_of_pairs([], 4)) == []


def test_links_are_measured_and_leave_nothing(tmp_path: Path) -> None:
    rates = [measure_disk_link(tmp_path, 1 << 22), measure_host_link(CpuDevice(), 1 << 22)]
    assert all(rate.read_bytes_per_s > 0 and rate.write_bytes_per_s > 0 for rate in rates)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="--kv-disk-path"):
        measure_disk_link(tmp_path / "nowhere", 1 << 22)
