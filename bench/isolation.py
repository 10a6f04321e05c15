"""How long a decode step takes alone, and beside a cold prefill with and without slots: `python -m bench.isolation`.

It drives the daemon's executor directly, with the calibration's own harness, so that nothing but the lanes takes part.
Cases are repeated in rounds, there and back, so that drift of the machine hits all alike.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from agentserve.build import build_executor
from agentserve.config import ServeConfig
from agentserve.core.batch import Lane
from agentserve.core.costmodel import Sample
from agentserve.core.slots import PartitionTable, SlotPartition
from agentserve.runtime.calibration import measure
from agentserve.runtime.calibration_grid import Case, Grid, Load
from bench.load.results import conditions

_CONTEXT, _CHUNK = 256, 256
_BATCHES = (1, 4)


def main() -> int:
    """Measures, prints a table, writes JSON if `--out` is given."""
    parser = argparse.ArgumentParser(prog="python -m bench.isolation", description=__doc__)
    parser.add_argument("--model", help="as for agentserve serve")
    parser.add_argument("--dtype", default="auto", help="as for agentserve serve")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--out", type=Path, help="directory for isolation.json")
    arguments = parser.parse_args()
    console = Console()
    target = build_executor(ServeConfig(model=arguments.model, dtype=arguments.dtype), console.print)
    try:
        capabilities = target.executor.capabilities()
        table = capabilities.partition_table()
        cases = tuple(case for batch in _BATCHES for case in _cases(table, batch))
        grid = Grid(target.limits, cases, _CONTEXT, arguments.rounds, 5, 20, 500_000_000)
        samples = measure(target.executor, grid)
    finally:
        target.executor.close()
    rows = _rows(samples)
    title = f"{target.model_name} ({target.dtype}) on {capabilities.device}; prompts in chunks of {_CHUNK} tokens"
    _print(rows, title, console)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        record = {"conditions": {**conditions(), "command": _command(), "what": title}, "rows": rows}
        (arguments.out / "isolation.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


def _command() -> str:
    return "python -m bench.isolation " + shlex.join(sys.argv[1:])


def _cases(table: PartitionTable, batch: int) -> list[Case]:
    decode, prefill = Load(batch, _CONTEXT), Load(chunk=_CHUNK)
    half = table.split_nearest(0.5)
    partitions = [table.stream, half]
    partitions += [cap for cap in table.caps if cap.prefill_units == half.prefill_units]
    return [
        Case(table.whole, decode=decode),
        Case(table.whole, prefill=prefill),
        # Alone on the cores that the split gives it: what the smaller share costs without a neighbour.
        Case(half, decode=decode),
        Case(half, prefill=prefill),
        *(Case(partition, decode=decode, prefill=prefill) for partition in partitions),
        Case(table.whole, decode=dataclasses.replace(decode, chunk=_CHUNK)),
    ]


def _rows(samples: list[Sample]) -> list[dict[str, Any]]:
    """One row a number of decodes and way to share; durations are medians."""
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    prefill_alone: dict[SlotPartition, float] = {}
    batch = 0
    for sample in samples:
        shape, label = sample.shape, sample.partition.label
        milliseconds = round(sample.duration_ns / 1e6, 2)
        batch = shape.num_decodes or batch
        if sample.lane is Lane.PREFILL and not sample.co_running:
            prefill_alone[sample.partition] = shape.num_prefill_tokens / sample.duration_ns * 1e9
            continue
        way = f"beside a prefill, {label}" if sample.co_running else f"alone, {label}"
        if shape.num_decodes and shape.num_prefill_tokens:
            way = f"in one batch with the chunk, {label}"
        row = rows.setdefault((batch, way), {"decodes": batch, "how": way})
        if shape.num_decodes:
            row["decode_step_ms"] = milliseconds
        if shape.num_prefill_tokens:
            row["prefill_tokens_per_s"] = round(shape.num_prefill_tokens / sample.duration_ns * 1e9)
    for partition, rate in prefill_alone.items():
        rows[0, partition.label] = {
            "decodes": 0,
            "how": f"prefill alone, {partition.label}",
            "prefill_tokens_per_s": round(rate),
        }
    for (decodes, _), row in rows.items():
        alone = next((r for (n, how), r in rows.items() if n == decodes and how.startswith("alone, whole")), None)
        if alone is not None and "decode_step_ms" in row:
            row["times_alone"] = round(row["decode_step_ms"] / alone["decode_step_ms"], 2)
    return sorted(rows.values(), key=lambda row: row["decodes"])


def _print(rows: list[dict[str, Any]], title: str, console: Console) -> None:
    table = Table(title=title)
    columns = {"decodes": "decodes", "how": "how", "decode_step_ms": "decode step, ms"}
    columns |= {"times_alone": "times alone", "prefill_tokens_per_s": "prefill, tokens/s"}
    for name, heading in columns.items():
        table.add_column(heading, justify="left" if name == "how" else "right")
    for row in rows:
        table.add_row(*(str(row.get(name, "-")) for name in columns))
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
