"""Ten-turn sessions of four client styles, with the official SDKs, find what they could find in the cache."""

from __future__ import annotations

import pytest

from bench.client_styles.__main__ import measure, table
from bench.client_styles.styles import NUM_TURNS, STYLES
from bench.client_styles.templates import FAMILIES


@pytest.mark.parametrize("style", STYLES)
async def test_sessions_keep_their_prefix(style: str) -> None:
    """The template that hides old thinking is the hardest: every question changes what was rendered before."""
    on = await measure(FAMILIES["late-thinking"], style, token_history=True)
    assert len(on.turns) == NUM_TURNS
    assert on.turns[0].num_cached == 0
    # Not one block is lost: all that the turn before has computed, in whole blocks.
    assert on.num_cached == on.num_possible


async def test_without_the_history_prefixes_break() -> None:
    on = await measure(FAMILIES["headers"], "langchain", token_history=True)
    off = await measure(FAMILIES["headers"], "langchain", token_history=False)
    assert on.num_cached == on.num_possible
    assert off.hit_ratio < 0.95
    assert off.num_read > on.num_read
    assert table([on, off]).splitlines()[2].startswith("| headers | langchain | 100.0% | ")
