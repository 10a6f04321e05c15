"""What a forward pass takes with our C++ kernels and without them: `python -m bench.forward`.

Without them a CPU has torch's attention over dense mirrors and oneDNN's products. Each way has an executor of its own
over the same weights; rounds alternate between them, so that drift of the machine hits both alike. Nothing runs beside.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from rich.console import Console
from rich.table import Table

from agentserve.build import build_executor
from agentserve.config import ServeConfig
from agentserve.core.slots import PartitionTable
from agentserve.models.layers import native_kernels
from agentserve.runtime.calibration import measure
from agentserve.runtime.calibration_grid import Case, Grid, Load
from agentserve_kernels.native import library
from bench.load.results import conditions

_DECODES = ((1, 512), (4, 512), (8, 512), (1, 4096))
"""Sequences, and tokens of context of each."""
_CHUNKS = ((64, 512), (128, 512), (256, 512), (512, 0), (512, 512), (512, 3072))
"""Tokens of a chunk, and tokens before it."""


def main() -> int:
    """Measures, prints a table, writes JSON if `--out` is given."""
    parser = argparse.ArgumentParser(prog="python -m bench.forward", description=__doc__)
    parser.add_argument("--model", help="as for agentserve serve")
    parser.add_argument("--dtype", default="auto", help="as for agentserve serve")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="directory for forward.json")
    arguments = parser.parse_args()
    console = Console()
    config = ServeConfig(model=arguments.model, dtype=arguments.dtype)
    with _without_kernels():
        targets = {"torch": build_executor(config, console.print)}
    targets["native"] = build_executor(dataclasses.replace(config, attention_backend="native"), console.print)
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    first = next(iter(targets.values()))
    title = f"{first.model_name} ({first.dtype}) on {first.executor.capabilities().device}, ms"
    try:
        for index in range(arguments.rounds):
            for name, target in list(targets.items())[:: -1 if index % 2 else 1]:
                table = target.executor.capabilities().partition_table()
                cases = _cases(table)
                samples = measure(target.executor, Grid(target.limits, cases, 1024, 1, 5, 20, 500_000_000))
                for case, sample in zip(cases, samples, strict=True):
                    found[case.label][name].append(sample.duration_ns / 1e6)
    finally:
        for target in targets.values():
            target.executor.close()
    rows: list[dict[str, Any]] = [
        {"batch": what, **{name: round(statistics.median(times), 2) for name, times in by_name.items()}}
        for what, by_name in found.items()
    ]
    _print(rows, title, console)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        command = "python -m bench.forward " + shlex.join(sys.argv[1:])
        record = {"conditions": {**conditions(), "command": command, "what": title}, "rows": rows}
        (arguments.out / "forward.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


@contextmanager
def _without_kernels() -> Iterator[None]:
    """As on a machine that has no compiler."""
    with mock.patch.dict(os.environ, {"CXX": "none"}):
        _forget_kernels()
        yield
    _forget_kernels()


def _forget_kernels() -> None:
    library.load.cache_clear()
    native_kernels.cache_clear()


def _cases(table: PartitionTable) -> tuple[Case, ...]:
    """Each batch alone on the whole device, then the chunks on the share that a split gives prompts."""
    share = table.split_nearest(0.5)
    chunks = [Load(chunk=chunk, start=start) for chunk, start in _CHUNKS]
    return (
        *(Case(table.whole, decode=Load(num_decodes, context)) for num_decodes, context in _DECODES),
        *(Case(partition, prefill=load) for partition in (table.whole, share) for load in chunks),
    )


def _print(rows: list[dict[str, Any]], title: str, console: Console) -> None:
    names = [name for name in rows[0] if name != "batch"]
    table = Table("batch", title=title)
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(row["batch"], *(f"{row[name]:.1f}" for name in names))
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
