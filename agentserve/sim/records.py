"""Lines of a workload file and checked access to their fields: every message names the file, the line and the field."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentserve.errors import WorkloadError

_GZIP_MAGIC = b"\x1f\x8b"
_MAX_SHOWN = 80


def shown(value: object) -> str:
    """The value as a message shows it: its `repr`, shortened if it is long."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 3]}..."


@dataclass(frozen=True, slots=True)
class Source:
    """Lines of text and what messages call them."""

    name: str
    path: Path | None
    """None: the lines are in `text`."""
    text: tuple[str, ...] = ()

    @classmethod
    def of(cls, source: Path | Iterable[str]) -> Source:
        """A file, plain or gzip, or lines that are there already."""
        return cls(str(source), source) if isinstance(source, Path) else cls("lines", None, tuple(source))

    @property
    def stem(self) -> str:
        """The file's name without its endings."""
        return self.name if self.path is None else self.path.name.partition(".")[0] or self.path.name

    @property
    def is_compressed(self) -> bool:
        """Raises WorkloadError if the file cannot be read."""
        if self.path is None:
            return False
        try:
            with self.path.open("rb") as file:
                return file.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
        except OSError as error:
            raise WorkloadError(f"cannot read {self.name}: {error}") from None

    def lines(self) -> Iterator[tuple[int, str]]:
        """The lines that are not empty, with their numbers from 1. Raises WorkloadError if they cannot be read."""
        lines = enumerate(self.text if self.path is None else self._file_lines(self.path), start=1)
        return ((number, line) for number, line in lines if line.strip())

    def _file_lines(self, path: Path) -> Iterator[str]:
        try:
            if self.is_compressed:
                with gzip.open(path, "rt", encoding="utf-8-sig") as file:
                    yield from file
            else:
                with path.open(encoding="utf-8-sig") as file:
                    yield from file
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise WorkloadError(f"cannot read {self.name}: {error}") from None


def json_records(source: Source) -> Iterator[Record]:
    """Each line as a JSON object. Raises WorkloadError for a line that is none."""
    for number, line in source.lines():
        where = f"{source.name}:{number}"
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise WorkloadError(f"{where}: expected a JSON object: {error}") from None
        yield Record.of(value, where)


class Record:
    """A JSON object whose fields are checked when they are read. It remembers which ones were asked for."""

    def __init__(self, fields: Mapping[str, Any], where: str, prefix: str = "") -> None:
        self.where = where
        """File and line."""
        self._fields = fields
        self._prefix = prefix
        self._used: set[str] = set()

    @classmethod
    def of(cls, value: Any, where: str, prefix: str = "") -> Record:
        """Raises WorkloadError if the value is no JSON object."""
        if not isinstance(value, Mapping):
            raise WorkloadError(f"{where}: {prefix}{': ' if prefix else ''}expected a JSON object, not {shown(value)}")
        return cls(value, where, f"{prefix}." if prefix else "")

    def __contains__(self, name: str) -> bool:
        return name in self._fields

    @property
    def names(self) -> tuple[str, ...]:
        """All its fields."""
        return tuple(self._fields)

    @property
    def unused(self) -> tuple[str, ...]:
        """Fields that nobody asked for."""
        return tuple(f"{self._prefix_without_index}{name}" for name in self._fields if name not in self._used)

    @property
    def _prefix_without_index(self) -> str:
        return f"{self._prefix.partition('[')[0]}." if self._prefix else ""

    def error(self, name: str, expected: str) -> WorkloadError:
        """The error for a field: where it is, what was expected and what is there."""
        found = f"not {shown(self._fields[name])}" if name in self._fields else "but it is missing"
        return WorkloadError(f"{self.where}: {self._prefix}{name}: expected {expected}, {found}")

    def integer(self, name: str, minimum: int, default: int | None = None) -> int:
        """A whole number. Without a default the field must be there."""
        value = self._get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise self.error(name, f"a whole number of at least {minimum}")
        return value

    def number(self, name: str, unit: str, default: float | None = None) -> float:
        """A finite number, 0 or more; `unit` is for the message."""
        value = self._get(name, default)
        if not _is_number(value):
            raise self.error(name, f"{unit}, 0 or more")
        return float(value)

    def name(self, *names: str, default: str | None = None) -> str | None:
        """The first of these fields that is there and not null, as text. A whole number is a name, too."""
        for name in names:
            value = self._get(name, None)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
                raise self.error(name, "a name")
            return str(value)
        return default

    def integers(self, name: str, limit: int) -> tuple[int, ...]:
        """A list of whole numbers from 0 to below `limit`."""
        value = self._get(name, None)
        if not isinstance(value, list):
            raise self.error(name, "a list of whole numbers")
        for index, item in enumerate(value):
            if type(item) is not int or not 0 <= item < limit:
                raise WorkloadError(
                    f"{self.where}: {self._prefix}{name}[{index}]: expected a whole number from 0 to {limit - 1}, "
                    f"not {shown(item)}"
                )
        return tuple(value)

    def records(self, name: str) -> tuple[Record, ...]:
        """A list of at least one JSON object."""
        value = self._get(name, None)
        if not isinstance(value, list) or not value:
            raise self.error(name, "a list of at least one object")
        return tuple(Record.of(item, self.where, f"{self._prefix}{name}[{i}]") for i, item in enumerate(value))

    def numbers(self, name: str) -> list[float]:
        """A list of finite numbers, each 0 or more."""
        value = self._get(name, None)
        if not isinstance(value, list) or not all(map(_is_number, value)):
            raise self.error(name, "a list of numbers, each 0 or more")
        return [float(item) for item in value]

    def pairs(self, name: str) -> tuple[tuple[float, float], ...]:
        """A list of pairs of finite numbers, each 0 or more."""
        value = self._get(name, None)
        is_list = isinstance(value, list)
        if not is_list or not all(isinstance(p, list) and len(p) == 2 and all(map(_is_number, p)) for p in value):
            raise self.error(name, "a list of pairs of numbers, each 0 or more")
        return tuple((float(first), float(second)) for first, second in value)

    def child(self, name: str) -> Record:
        """A JSON object."""
        if name not in self._fields:
            raise self.error(name, "a JSON object")
        return Record.of(self._get(name, None), self.where, f"{self._prefix}{name}")

    def children(self, name: str) -> dict[str, Record]:
        """A JSON object of at least one JSON object, by their names."""
        outer = self.child(name)
        if not outer.names:
            raise self.error(name, "at least one entry")
        return {inner: outer.child(inner) for inner in outer.names}

    def refuse_unused(self) -> None:
        """Raises WorkloadError for a field that nobody asked for."""
        for name in self._fields:
            if name not in self._used:
                raise WorkloadError(f"{self.where}: {self._prefix}{name}: expected no such field")

    def located(self, error: WorkloadError) -> WorkloadError:
        """The error with file, line and place in front, if it does not say so itself."""
        return error if str(error).startswith(self.where) else WorkloadError(f"{self.where}: {self._prefix}{error}")

    def _get(self, name: str, default: Any) -> Any:
        self._used.add(name)
        return self._fields.get(name, default)


def _is_number(value: Any) -> bool:
    """Finite and not negative."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


class Notes:
    """What could not be taken over as it was, counted."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def add(self, what: str, count: int = 1) -> None:
        """`what`: a text behind a number, such as `requests without ...`."""
        if count:
            self._counts[what] += count

    def add_unused(self, record: Record) -> None:
        """Notes the fields that were not read."""
        for name in record.unused:
            self._counts[f"values of the field {name!r} are not used"] += 1

    def lines(self) -> tuple[str, ...]:
        """In the order in which they came up first."""
        return tuple(f"{count} {what}" for what, count in self._counts.items())
