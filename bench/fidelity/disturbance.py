"""How much of the processor others used during a run: what they take, a measurement of the daemon does not have."""

from __future__ import annotations

import time

import psutil

DISTURBED_SHARE = 0.04
"""Of all cores. More is no background noise: it is about half of the error that is to be seen."""


class Others:
    """All processes but this one and a tree of others; the hypervisor's stolen time counts as theirs."""

    def __init__(self, pid: int | None) -> None:
        """Starts counting. `pid`: the root of the tree of the daemon, if it is known."""
        self._processes = [psutil.Process()]
        if pid is not None:
            daemon = psutil.Process(pid)
            self._processes += [daemon, *daemon.children(recursive=True)]
        self._started_s, self._busy_s = time.monotonic(), self._others_s()

    def share(self) -> float:
        """Of the time of all cores since this was made, from 0 to 1. The processes must still run."""
        elapsed_s = max(1e-3, time.monotonic() - self._started_s)
        share = (self._others_s() - self._busy_s) / elapsed_s / (psutil.cpu_count() or 1)
        # The system counts in ticks, so that little use may come out negative.
        return min(1.0, max(0.0, share))

    def _others_s(self) -> float:
        total = psutil.cpu_times()
        # Where time of niced processes and stolen time is not told apart, it is part of the others.
        busy = total.user + total.system + getattr(total, "nice", 0.0) + getattr(total, "steal", 0.0)
        ours = [process.cpu_times() for process in self._processes]
        return float(busy - sum(times.user + times.system for times in ours))
