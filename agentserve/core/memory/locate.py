"""Where the KV of given tokens is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from agentserve.core.memory.answers import Whereabouts
from agentserve.core.memory.radix import RadixTree
from agentserve.core.memory.residency import Residency
from agentserve.core.memory.tiers import child_id, content_id, root_id
from agentserve.core.transfers import Tier


def locate(
    tree: RadixTree, residency: Residency | None, block_size: int, sequences: Iterable[tuple[Sequence[int], str | None]]
) -> Whereabouts:
    """Where the whole blocks of sequences are; `sequences`: token ids and the salt of each. O(their blocks)."""
    num_blocks = {Tier.DEVICE: 0} if residency is None else dict.fromkeys((Tier.DEVICE, *residency.tiers), 0)
    seen: set[bytes] = set()
    pinned_by: set[str] = set()
    num_held = num_pinned = 0
    for token_ids, salt in sequences:
        path = tree.find(token_ids, salt, len(token_ids) // block_size)
        above = root_id(salt)
        for index in range(len(token_ids) // block_size):
            node = path[index] if index < len(path) and path[index].is_ready else None
            if node is not None:
                above = content_id(node)
            else:
                above = child_id(above, token_ids[index * block_size : (index + 1) * block_size])
            if above in seen:
                continue
            seen.add(above)
            for tier in () if residency is None else residency.tiers_with(above):
                num_blocks[tier] += 1
            if node is None:
                continue
            num_blocks[Tier.DEVICE] += 1
            num_held += node.num_refs > 0
            if node.group is not None and node.group.is_pinned:
                num_pinned += 1
                pinned_by.update(() if node.user is None else (node.user.session_id,))
    return Whereabouts(block_size, len(seen), num_blocks, num_held, num_pinned, frozenset(pinned_by))
