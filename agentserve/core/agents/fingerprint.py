"""Who asks, if nobody says so: agents are told apart by how their prompts begin."""

from __future__ import annotations

from collections.abc import Sequence

NUM_TOKENS = 128
"""Of a prompt's beginning, its system prompt, that make the fingerprint. Shorter prompts have none: they would get
another one as their history grows."""


def fingerprint(token_ids: Sequence[int]) -> str | None:
    """A name for the agent whose prompts begin like this; None for a prompt that is too short.

    Chat templates put system prompt and tools first, so prompts of one agent begin alike and those of two agents
    hardly ever do. The same in each process.
    """
    if len(token_ids) < NUM_TOKENS:
        return None
    # Hashes of numbers do not depend on the process, unlike those of texts.
    return f"#{hash(tuple(token_ids[:NUM_TOKENS])) & 0xFFFF_FFFF_FFFF_FFFF:016x}"
