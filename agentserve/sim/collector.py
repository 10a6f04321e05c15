"""Python's garbage collector while a workload is simulated."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_YOUNG = 100_000
"""Objects between two collections, instead of 700: what a run makes lives as long as the run, or is free at once even
without the collector, since there are hardly any cycles. Looking at it all the time is a tenth of a run."""


@contextmanager
def rare_collections() -> Iterator[None]:
    """Lets the collector run less often, and as before in the end."""
    before = gc.get_threshold()
    gc.set_threshold(max(_YOUNG, before[0]) if before[0] else 0, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
