"""Synthetic prompt tokens."""

from __future__ import annotations

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from agentserve.sim.blocks import VOCABULARY, random_tokens


@given(seed=st.text(max_size=8), counts=st.lists(st.integers(0, 50), max_size=4))
def test_random_tokens_are_those_of_the_standard_library(seed: str, counts: list[int]) -> None:
    fast, plain = Random(seed), Random(seed)
    for count in counts:
        assert random_tokens(fast, count) == plain.choices(VOCABULARY, k=count)
    assert fast.getstate() == plain.getstate()
