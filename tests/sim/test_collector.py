"""The garbage collector runs less often while a workload is simulated, and as before in the end."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from agentserve.sim.collector import rare_collections


@pytest.fixture(autouse=True)
def thresholds() -> Iterator[tuple[int, int, int]]:
    before = gc.get_threshold()
    yield before
    gc.set_threshold(*before)


def test_it_runs_less_often_meanwhile(thresholds: tuple[int, int, int]) -> None:
    with rare_collections():
        assert gc.get_threshold() == (100_000, *thresholds[1:])
        assert gc.isenabled()
    assert gc.get_threshold() == thresholds


def test_an_error_changes_nothing_of_that(thresholds: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="wrong"), rare_collections():
        raise ValueError("wrong")
    assert gc.get_threshold() == thresholds


@pytest.mark.parametrize("wanted", [0, 1_000_000])
def test_who_lets_it_run_never_or_less_often_is_obeyed(wanted: int) -> None:
    gc.set_threshold(wanted)
    with rare_collections():
        assert gc.get_threshold()[0] == wanted
    assert gc.get_threshold()[0] == wanted
