"""Figures that are tables: Markdown, for documents and terminals."""

from __future__ import annotations

from typing import Any

from bench.figures.data import CONTROLLER_MEASURES, TOLERANCE, Figure
from bench.figures.variants import VARIANTS


def controllers(figure: Figure) -> str:
    """The table of `bench.figures.data.controllers`; a cell that breaks the rule is bold."""
    rows = [f"{figure['conditions']}", ""]
    heads = [f"{label}{'' if name.endswith('_per_s') else ', ms'}" for name, label in CONTROLLER_MEASURES]
    rows.append("| workload | agents | " + " | ".join(heads) + " | beaten by |")
    rows.append("|---|---|" + "---|" * (len(heads) + 1))
    for panel in figure["panels"]:
        cells = [_cell(panel[name]) for name, _ in CONTROLLER_MEASURES]
        beaten_by = ", ".join(VARIANTS[key].label for key in panel["beaten_by"]) or "none"
        rows.append(f"| {panel['workload']} | {panel['num_agents']} | " + " | ".join(cells) + f" | {beaten_by} |")
    rows += [
        "",
        f"Each cell: predictive / best of the others (which one), difference; bold: worse by over {TOLERANCE:.0%}. The "
        f"best is another one in each column. Beaten by: who is better by over {TOLERANCE:.0%} in one column and not "
        "worse by more than that in any.",
        "",
        "| workload | against | " + " | ".join(heads) + " |",
        "|---|---|" + "---|" * len(heads),
    ]
    for panel in figure["panels"]:
        for key, values in panel["others"].items():
            cells = [_against(panel[name], values[name], name) for name, _ in CONTROLLER_MEASURES]
            rows.append(f"| {panel['workload']} | {VARIANTS[key].label} | " + " | ".join(cells) + " |")
    rows += [
        "",
        "The same against each one: its value, and how much better the predictive controller is (negative: worse).",
    ]
    return "\n".join(rows) + "\n"


def _cell(value: dict[str, Any] | None) -> str:
    if value is None:
        return "-"
    text = f"{value['predictive']:.1f} / {value['best']:.1f} ({VARIANTS[value['of']].label})"
    difference = f"{-value['worse_by']:+.0%}"
    return f"{text}, **{difference}**" if value["worse_by"] > TOLERANCE else f"{text}, {difference}"


def _against(mine: dict[str, Any] | None, theirs: float | None, name: str) -> str:
    if mine is None or not theirs:
        return "-"
    better = mine["predictive"] / theirs - 1.0 if name.endswith("_per_s") else 1.0 - mine["predictive"] / theirs
    return f"{theirs:.1f}, {better:+.0%}"
