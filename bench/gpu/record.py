"""What a part leaves behind, written after every value: a part that is stopped loses nothing that it has measured."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Writes a file in full or not at all. Raises OSError."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(value, indent=1, default=str) + "\n", encoding="utf-8")
    temporary.replace(path)


@dataclass(frozen=True, slots=True)
class PartRun:
    """The surroundings of a part that runs."""

    name: str
    scratch: Path
    """A folder of its own; what is to be kept goes through `put` and `png`."""
    deadline_s: float
    """On the clock of `time.monotonic`."""
    model: str
    """What `--model` of the daemon is to be."""
    load_format: str
    shared: Path
    """A folder in which parts leave files for later ones."""
    dry_run: bool = False
    """There need not be a GPU: the CPU and a tiny model stand in, and only that everything runs counts."""
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def executor(self) -> str:
        """What `--executor` of the daemon is to be."""
        return "cpu" if self.dry_run else "cuda"

    @property
    def left_s(self) -> float:
        """Seconds until it is stopped."""
        return self.deadline_s - time.monotonic()

    def put(self, key: str, value: Any) -> None:
        """Keeps a value that JSON can hold."""
        self.result[key] = value
        write_json(self.result_path, self.result)

    def say(self, text: str) -> None:
        """For the log."""
        print(f"[{self.name}] {text}", flush=True)

    def png(self, name: str) -> Path:
        """Where to draw a picture that is to be kept."""
        return self.scratch / f"{name}.png"

    @property
    def result_path(self) -> Path:
        return self.scratch / "result.json"


def spread(values: Iterable[float], digits: int = 4) -> dict[str, float | int]:
    """Median, tenth and ninetieth percentile (nearest rank) and number of values; at least one value."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return {
        "median": round(statistics.median(ordered), digits),
        "p10": round(ordered[round(0.1 * last)], digits),
        "p90": round(ordered[round(0.9 * last)], digits),
        "num": len(ordered),
    }
