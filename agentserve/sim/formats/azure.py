"""Traces of lengths only, as CSV with a header: the Azure LLM inference traces, and the form that Vidur gave them.

TIMESTAMP,ContextTokens,GeneratedTokens          Azure (Splitwise, ISCA '24; DynamoLLM, HPCA '25)
arrived_at,num_prefill_tokens,num_decode_tokens  processed, seconds from the start
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any

from agentserve.errors import WorkloadError
from agentserve.sim.formats.interface import Trace, output_tokens
from agentserve.sim.programs import Program, Turn
from agentserve.sim.records import Notes, Record, Source

SPLITWISE_COLUMNS = ("arrived_at", "num_prefill_tokens", "num_decode_tokens")
AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


def read_splitwise(source: Source, limit: int | None) -> Trace:
    """Each row is a program of one turn that arrives at its time. Prompts have nothing in common."""
    return _read(source, limit, SPLITWISE_COLUMNS, lambda record: 1e3 * record.number("arrived_at", "seconds"))


def read_azure(source: Source, limit: int | None) -> Trace:
    """Each row is a program of one turn; times count from the earliest row, to the microsecond. Prompts have nothing in
    common."""
    return _read(source, limit, AZURE_COLUMNS, _timestamp_ms, relative=True)


def _read(
    source: Source,
    limit: int | None,
    columns: tuple[str, str, str],
    arrival_ms: Callable[[Record], float],
    relative: bool = False,
) -> Trace:
    notes = Notes()
    rows = []
    for record in islice(_csv_records(source, columns), limit):
        rows.append((arrival_ms(record), record.integer(columns[1], 1), output_tokens(record, columns[2], notes)))
        notes.add_unused(record)
    start_ms = min((row[0] for row in rows), default=0.0) if relative else 0.0
    programs = (
        Program(f"request-{index:05d}", (Turn(num_tokens, num_outputs),), arrival_ms=round(at_ms - start_ms, 3))
        for index, (at_ms, num_tokens, num_outputs) in enumerate(rows)
    )
    return Trace(tuple(programs), notes.lines())


def _timestamp_ms(record: Record) -> float:
    """Milliseconds since 1970 of a time with or without a zone; without one it is taken as UTC."""
    text = record.name("TIMESTAMP")
    try:
        time = datetime.fromisoformat(text or "")
    except ValueError:
        raise record.error("TIMESTAMP", "a time such as 2023-11-16 18:15:46.680590") from None
    if time.tzinfo is None:
        time = time.replace(tzinfo=UTC)
    return (time - datetime(1970, 1, 1, tzinfo=UTC)) / timedelta(milliseconds=1)


def _csv_records(source: Source, columns: tuple[str, ...]) -> Iterator[Record]:
    """The rows with the numbers in them parsed; lines are numbered as in the file."""
    header: list[str] | None = None
    for number, line in source.lines():
        where = f"{source.name}:{number}"
        cells = [cell.strip() for cell in next(csv.reader([line]))]
        if header is None:
            header = cells
            missing = [column for column in columns if column not in header]
            if missing:
                raise WorkloadError(f"{where}: expected a header with the column {missing[0]}, not {','.join(cells)}")
        elif len(cells) != len(header):
            raise WorkloadError(f"{where}: expected {len(header)} values as in the header, not {len(cells)}")
        else:
            yield Record(dict(zip(header, map(_number, cells), strict=True)), where)


def _number(cell: str) -> Any:
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            continue  # the next kind; what is no number stays a text, and the field's check says so
    return cell
