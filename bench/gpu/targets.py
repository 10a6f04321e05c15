"""What the project wants of a GPU, held against what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Results = Mapping[str, Mapping[str, Any]]
"""What each part has recorded, by its name; a part that did not run is empty."""


@dataclass(frozen=True, slots=True)
class Target:
    """One of them. `measure` gives None where it was not measured."""

    name: str
    part: str
    """That measures it."""
    limit: float
    unit: str
    measure: Callable[[Mapping[str, Any]], float | None]
    at_least: bool = False
    """Larger is better."""

    def row(self, results: Results) -> dict[str, Any]:
        """`held` is None where it was not measured."""
        value = self.measure(results.get(self.part, {}))
        held = None if value is None else value >= self.limit if self.at_least else value <= self.limit
        sign = ">=" if self.at_least else "<="
        return {
            "name": self.name,
            "wanted": f"{sign} {self.limit:g} {self.unit}".rstrip(),
            "measured": None if value is None else round(value, 4),
            "held": held,
        }


def evaluate(results: Results) -> list[dict[str, Any]]:
    """A row for each target."""
    return [target.row(results) for target in TARGETS]


def render(rows: Sequence[Mapping[str, Any]]) -> str:
    """A plain-text table."""
    signs = {True: "held", False: "MISSED"}
    width = max(len(row["name"]) for row in rows)
    lines = [f"{'target':{width}}  {'wanted':>12}  {'measured':>10}"]
    for row in rows:
        sign = signs.get(row["held"], "not measured" if row["measured"] is None else "not judged")
        measured = "-" if row["measured"] is None else f"{row['measured']:g}"
        lines.append(f"{row['name']:{width}}  {row['wanted']:>12}  {measured:>10}  {sign}")
    return "\n".join(lines)


def _largest(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _decode(smallest: int, largest: int) -> Callable[[Mapping[str, Any]], float | None]:
    def measure(result: Mapping[str, Any]) -> float | None:
        rows = result.get("decode", ())
        return _largest(row.get("over_floor") for row in rows if smallest <= row["batch"] <= largest)

    return measure


def _prefill(result: Mapping[str, Any]) -> float | None:
    rows = result.get("prefill", ())
    return next((row.get("share_of_matrix_rate") for row in rows if (row["chunk"], row["start"]) == (4096, 0)), None)


def _gap_ms(result: Mapping[str, Any]) -> float | None:
    gaps_us = [row["gap_us"]["median"] for row in result.get("gaps", ()) if "gap_us" in row]
    return max(gaps_us) / 1e3 if gaps_us else None


def _stall(result: Mapping[str, Any]) -> float | None:
    """The longest gap of the victim's stream during the attack over its median gap before and after it."""
    for figure in result.get("figures", ()):
        for panel in figure["panels"]:
            if figure["figure"] == "fig2" and panel["key"] == "predictive" and panel["quiet_ms"]:
                return float(panel["worst_ms"] / panel["quiet_ms"])
    return None


def _cold_ttft(result: Mapping[str, Any]) -> float | None:
    """Of the attackers, over that of `chunked`."""
    found = {
        row["variant"]: row["cold_ttft_ms"]
        for row in result.get("runs", ())
        if row["workload"].startswith("victim_attacker")
    }
    ours, theirs = found.get("predictive"), found.get("chunked")
    return ours / theirs if ours and theirs else None


def _proofs(result: Mapping[str, Any]) -> float | None:
    slots = result.get("slots")
    if not slots:
        return None
    return float(sum(not (split["disjoint"] and split["complete"]) for split in slots["splits"]))


def _graph(result: Mapping[str, Any]) -> float | None:
    found = result.get("graph_affinity")
    return float(not found["keeps_the_slot_of_its_capture"]) if found else None


def _failures(result: Mapping[str, Any]) -> float | None:
    outcomes = result.get("outcomes")
    if not outcomes or not outcomes["counts"].get("passed", 0) + len(outcomes["failures"]):
        return None
    return float(len(outcomes["failures"]))


def _sanitizer(result: Mapping[str, Any]) -> float | None:
    found = result.get("num_errors")
    return None if found is None else float(found)


def _switch(result: Mapping[str, Any]) -> float | None:
    found = result.get("switch_us")
    # Without slots there is nothing to switch.
    return float(found["total"]) if found and len(set(found["slots"])) > 1 else None


TARGETS = (
    Target("decode step / floor, up to 8 sequences", "steps", 1.15, "", _decode(1, 8)),
    Target("decode step / floor, 9 to 32 sequences", "steps", 1.25, "", _decode(9, 32)),
    Target("prefill of 4096 tokens / matrix rate", "steps", 0.6, "", _prefill, at_least=True),
    Target("gap between decode steps", "steps", 0.3, "ms", _gap_ms),
    Target("worst stall / quiet gap, predictive", "daemon", 2.0, "", _stall),
    Target("cold TTFT / that of chunked, predictive", "daemon", 1.3, "", _cold_ttft),
    Target("change of partition", "device", 50.0, "us", _switch),
    Target("splits that overlap or lack SMs", "device", 0.0, "", _proofs),
    Target("graphs that leave the slot of their capture", "device", 0.0, "", _graph),
    Target("tests that fail", "tests", 0.0, "", _failures),
    Target("errors that compute-sanitizer finds", "sanitizer", 0.0, "", _sanitizer),
)
