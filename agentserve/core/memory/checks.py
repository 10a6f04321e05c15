"""What must hold between requests, locks and the tree at any time. For tests: it looks at everything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from agentserve.core.memory.holding import NEVER, Holding
from agentserve.core.memory.radix import RadixNode, RadixTree


def check_holdings(
    tree: RadixTree, holdings: Mapping[str, Holding], locks: Sequence[list[RadixNode]], block_size: int, caching: bool
) -> list[int]:
    """Returns the blocks in use. Raises AssertionError if a count, link or state is wrong."""
    tree.check_invariants()
    nodes = list(tree.nodes())
    ends: Counter[RadixNode] = Counter(path[-1] for path in locks if path)
    for path in locks:
        assert all(node.is_ready for node in path), "a lock holds a pending block"
    used = [node.block_id for node in nodes]
    num_pending = 0
    for request_id, holding in holdings.items():
        num_pending += _check_path(tree, request_id, holding)
        _check_counts(request_id, holding, block_size, caching)
        ends.update(holding.path[-1:])
        used += [block_id for index, block_id in enumerate(holding.block_ids) if holding.is_private(index)]
    for node in nodes:
        num_refs = ends.pop(node, 0) + sum(child.num_refs > 0 for child in node.children.values())
        assert node.num_refs == num_refs, f"block {node.block_id}: wrong reference count"
    assert not ends, "a node is held that is not in the tree"
    assert num_pending == sum(not node.is_ready for node in nodes), "a pending block has no living owner"
    return used


def _check_path(tree: RadixTree, request_id: str, holding: Holding) -> int:
    """Checks the nodes of one request; returns how many of them are pending."""
    parent: RadixNode | None = None
    num_pending = 0
    for index, node in enumerate(holding.path):
        assert tree.child(parent, holding.salt, node.key) is node, f"{request_id!r} holds a broken path"
        assert node.owner in (None, request_id), f"{request_id!r} holds a block that {node.owner!r} computes"
        if node.owner is not None:
            num_pending += 1
            assert index >= holding.num_ready_blocks, f"{request_id!r} committed a block that is pending"
            assert node.num_refs == 1, f"pending block {node.block_id} is shared"
            assert node.block_id == holding.block_ids[index], f"pending block {node.block_id} is not its owner's"
        parent = node
    return num_pending


def _check_counts(request_id: str, holding: Holding, block_size: int, caching: bool) -> None:
    assert len(holding.path) <= len(holding.block_ids), f"{request_id!r} holds more nodes than blocks"
    if caching:
        num_full = holding.num_computed_tokens // block_size
        assert holding.num_ready_blocks == num_full <= len(holding.path), f"{request_id!r}: blocks not published"
    assert holding.capacity == len(holding.block_ids) * block_size, f"{request_id!r}: wrong capacity"
    publish_at = (holding.num_ready_blocks + 1) * block_size if caching else NEVER
    assert holding.publish_at == publish_at, f"{request_id!r}: would publish a block too early or too late"
    if holding.block_ids_tuple is not None:
        assert holding.block_ids_tuple == tuple(holding.block_ids), f"{request_id!r}: outdated tuple of block ids"
