"""Anchors alone: system prompts and tools outlive private history, and nothing is predicted.

The replication of CacheScout found that this carries most of the gain.
"""

from __future__ import annotations

from typing import ClassVar

from agentserve.core.agents.policy import Policy


class Anchor(Policy):
    """Least recently used, block by block, but what several sessions have used goes after what one has used."""

    name: ClassVar[str] = "anchor"
    scores_blocks: ClassVar[bool] = True
