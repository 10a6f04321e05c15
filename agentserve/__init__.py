"""agentserve: a serving daemon for local agents."""

from __future__ import annotations

__version__ = "0.1.0"
