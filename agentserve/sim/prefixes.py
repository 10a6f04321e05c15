"""Groups of prompts that begin alike, from their token ids."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Sequence

MIN_PREFIX_TOKENS = 16
"""Prompts that begin alike for fewer tokens share nothing that a cache of usual block size could keep."""


def num_common_tokens(first: Sequence[int], second: Sequence[int]) -> int:
    """For how many tokens two sequences are equal from their beginning."""
    if first == second[: len(first)]:
        return len(first)  # the usual case, a conversation that goes on, without a loop
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def group_prefixes(prompts: Iterable[tuple[Hashable, Sequence[int]]]) -> list[tuple[str | None, int]]:
    """For each prompt (scope, token ids) the group that it begins like, and for how many tokens; (None, 0) alone.

    Prompts of different scopes, such as their cache salts, have nothing in common. Each prompt is compared
    with the first one of its group only: that is linear, and exact for one system prompt.
    """
    leaders: dict[tuple[Hashable, tuple[int, ...]], tuple[int, Sequence[int]]] = {}
    groups: list[int] = []
    shared: list[int] = []
    for index, (scope, prompt) in enumerate(prompts):
        leader, first = leaders.setdefault((scope, tuple(prompt[:MIN_PREFIX_TOKENS])), (index, prompt))
        groups.append(leader)
        shared.append(0)
        if leader != index and len(prompt) >= MIN_PREFIX_TOKENS:
            shared[index] = num_common_tokens(first, prompt)
            shared[leader] = max(shared[leader], shared[index])
    return [(f"prefix-{g:04d}", n) if n else (None, 0) for g, n in zip(groups, shared, strict=True)]
