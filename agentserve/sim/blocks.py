"""Tokens for the block ids of a trace: equal ids are equal tokens, different ids differ within a few tokens."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

VOCABULARY = range(1000, 33_000)
"""Synthetic prompt tokens; so many that two prompts do not begin alike by chance."""
_NUM_DIGITS = 4
MAX_BLOCK_ID = len(VOCABULARY) ** _NUM_DIGITS - 1


def random_tokens(random: Random, count: int) -> list[int]:
    """What `random.choices(VOCABULARY, k=count)` gives, in less time."""
    draw, size, first = random.random, len(VOCABULARY), VOCABULARY.start
    return [int(draw() * size) + first for _ in range(count)]


def tokens_of_blocks(block_ids: Sequence[int], block_tokens: int, num_tokens: int) -> list[int]:
    """The first `num_tokens` tokens of these blocks of `block_tokens` tokens each.

    A block repeats the four digits of its id to the base of the vocabulary, lowest digit first. So two different ids
    differ in the first four tokens, surely and not only probably: no cache whose blocks have at least four tokens can
    take one for the other, and what a prefix cache finds is exactly what the trace says.
    """
    base, first = len(VOCABULARY), VOCABULARY.start
    num_repeats = -(-block_tokens // _NUM_DIGITS)
    tokens: list[int] = []
    for block_id in block_ids:
        digits, rest = [], block_id
        for _ in range(_NUM_DIGITS):
            rest, digit = divmod(rest, base)
            digits.append(first + digit)
        tokens += (digits * num_repeats)[:block_tokens]
    del tokens[num_tokens:]
    return tokens
