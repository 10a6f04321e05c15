"""Runs simulations, many at once, and keeps what is done: a run that was interrupted goes on where it stopped.

A simulation is a function of its plan: the engine's header, the workload, the routing. The digest of the plan and of
this program's code names the file of its result. A result whose file is there already is not computed again; files are
renamed into place when they are complete.
"""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import agentserve
from agentserve.errors import ConfigError
from agentserve.runtime.recording import Header
from agentserve.sim.cells import Cell
from agentserve.sim.cluster import Link
from agentserve.sim.metrics import TurnRecord
from agentserve.sim.programs import Workload

CELLS_NAME = "cells"
"""The directory of finished simulations, below that of the results."""

Result = Mapping[str, Any]
"""What came of a simulation, as JSON takes it; `agentserve.sim.report` makes it."""


@dataclass(frozen=True)
class Plan:
    """All that one simulation depends on."""

    cell: Cell
    header: Header
    """Of each instance."""
    workload: Workload
    title: str
    """Of the workload."""
    conditions: str
    """A line about what is simulated."""
    overload: str
    overload_calls: int
    link: Link
    recorded: tuple[TurnRecord, ...] | None = None
    """How it went in the recording that the workload was taken from."""
    notes: tuple[str, ...] = ()
    """What the user must know."""

    @functools.cached_property
    def digest(self) -> str:
        """The same for the same simulation by the same code, in any process."""
        parts = (code_version(), *(repr(getattr(self, name)) for name in self.__dataclass_fields__))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@functools.cache
def code_version() -> str:
    """A digest of this package's source files."""
    root = Path(agentserve.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def run_sweep(
    plans: Sequence[Plan],
    run: Callable[[Plan], Result],
    *,
    num_jobs: int,
    directory: Path | None = None,
    on_done: Callable[[], None] = lambda: None,
) -> list[Result]:
    """Runs what is not done yet; returns all results in the order of the plans.

    Args:
        plans: what to simulate.
        run: a function of a module, so that other processes find it; its result must survive JSON.
        num_jobs: processes; 1 runs everything in this one. The results are the same.
        directory: where results are kept, in `cells/`; None keeps nothing.
        on_done: called after each of them, also for those that were done before.

    Raises ConfigError if the directory cannot be written, and what `run` raises; what was done by then is kept.
    """
    store = None if directory is None else _Store(directory / CELLS_NAME)
    results: dict[int, Result] = {}
    for index, plan in enumerate(plans):
        kept = None if store is None else store.load(plan)
        if kept is not None:
            results[index] = kept
            on_done()
    left = [index for index in range(len(plans)) if index not in results]

    def keep(index: int, result: Result) -> None:
        # Through text in any case: what was computed now equals what is read from a file.
        text = json.dumps(result, separators=(",", ":")) + "\n"
        if store is not None:
            store.save(plans[index], text)
        results[index] = json.loads(text)
        on_done()

    if min(num_jobs, len(left)) <= 1:
        for index in left:
            keep(index, run(plans[index]))
    else:
        _run_in_processes(plans, left, run, min(num_jobs, len(left)), keep)
    return [results[index] for index in range(len(plans))]


def _run_in_processes(
    plans: Sequence[Plan],
    left: Sequence[int],
    run: Callable[[Plan], Result],
    num_jobs: int,
    keep: Callable[[int, Result], None],
) -> None:
    # Not forked: a bar that is drawn by a thread may hold a lock at that moment.
    with ProcessPoolExecutor(num_jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        indices: dict[Future[Result], int] = {pool.submit(run, plans[index]): index for index in left}
        pending = set(indices)
        try:
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    keep(indices[future], future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class _Store:
    """Finished simulations as files."""

    def __init__(self, directory: Path) -> None:
        """Raises ConfigError if the directory cannot be made."""
        self._directory = directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot write to {directory}: {error.strerror}") from None

    def load(self, plan: Plan) -> Result | None:
        """The result, or None if it is not there or was made by something else."""
        try:
            value = json.loads(self._path(plan).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read {self._path(plan)}, delete it to run it again: {error}") from None
        return value if isinstance(value, dict) and value.get("digest") == plan.digest else None

    def save(self, plan: Plan, text: str) -> None:
        replace_file(self._path(plan), text)

    def _path(self, plan: Plan) -> Path:
        name = re.sub(r"[^a-z0-9]+", "-", Path(plan.title).name.lower()).strip("-")[:60]
        return self._directory / f"{name}-{plan.digest[:16]}.json"


def replace_file(path: Path, text: str) -> None:
    """Writes a file through a temporary name, so that readers never see a part. Raises ConfigError."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None
