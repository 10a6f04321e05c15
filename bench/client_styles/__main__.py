"""Prefix hits of ten-turn sessions, by client style: `python -m bench.client_styles --out DIR`.

A table with a line for each kind of chat template and each style: the share of the possible prefix hits that were had,
and the prompt tokens that were read, with the token history and without. Possible is what the request before has left
in the cache, in whole blocks, if it is no more than the prompt. The model is scripted; tokens are bytes; nothing is
timed. `--out` keeps the table and `client_styles.json`.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from agentserve.server.caching import CacheOptions
from bench.client_styles.daemon import serve
from bench.client_styles.styles import STYLES, TurnUsage, script
from bench.client_styles.templates import FAMILIES, Family
from bench.load.results import conditions

BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Row:
    """One session."""

    family: str
    style: str
    token_history: bool
    num_possible: int
    """Prompt tokens of the second turn and all that follow that could have been found."""
    num_cached: int
    """Those that were."""
    num_read: int
    """Prompt tokens of these turns that had to be computed."""
    turns: tuple[TurnUsage, ...]

    @property
    def hit_ratio(self) -> float:
        return self.num_cached / self.num_possible


async def measure(family: Family, style: str, *, token_history: bool) -> Row:
    """Runs one session on a daemon of its own."""
    cache = (
        CacheOptions(block_size=BLOCK_SIZE)
        if token_history
        else CacheOptions(block_size=BLOCK_SIZE, token_history_bytes=0)
    )
    async with serve(family, script(family), cache) as daemon:
        turns = await STYLES[style](daemon.url)
    pairs = list(itertools.pairwise(turns))
    return Row(
        family.name,
        style,
        token_history,
        sum(_num_possible(before, turn) for before, turn in pairs),
        sum(turn.num_cached for _, turn in pairs),
        sum(turn.num_prompt - turn.num_cached for _, turn in pairs),
        tuple(turns),
    )


def _num_possible(before: TurnUsage, turn: TurnUsage) -> int:
    # The token that was sampled last is never computed, and the last one of a prompt always is.
    num_left = before.num_prompt + before.num_output - 1
    return min(num_left, turn.num_prompt - 1) // BLOCK_SIZE * BLOCK_SIZE


async def measure_all() -> list[Row]:
    return [
        await measure(family, style, token_history=token_history)
        for family in FAMILIES.values()
        for style in STYLES
        for token_history in (True, False)
    ]


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        "| template | client | hits, history on | hits, history off | tokens read, on | tokens read, off |",
        "|---|---|---|---|---|---|",
    ]
    for on, off in zip(rows[::2], rows[1::2], strict=True):
        assert on.token_history and not off.token_history and (on.family, on.style) == (off.family, off.style)
        lines.append(
            f"| {on.family} | {on.style} | {on.hit_ratio:.1%} | {off.hit_ratio:.1%} | {on.num_read} | {off.num_read} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; 0 unless a session with the token history has less than 95 % of the possible hits."""
    parser = argparse.ArgumentParser(prog="python -m bench.client_styles", description=__doc__)
    parser.add_argument("--out", type=Path, help="directory for the table and client_styles.json")
    arguments = parser.parse_args(argv)
    rows = asyncio.run(measure_all())
    text = table(rows)
    print(text, end="")
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "README.md").write_text(_README + text, encoding="utf-8")
        document: dict[str, Any] = {
            "conditions": conditions() | {"command": "python -m bench.client_styles --out DIR"},
            "block_size": BLOCK_SIZE,
            "rows": [asdict(row) | {"hit_ratio": row.hit_ratio} for row in rows],
        }
        (arguments.out / "client_styles.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0 if all(row.hit_ratio >= 0.95 for row in rows if row.token_history) else 1


_README = """# Prefix hits by client style

Ten-turn sessions through the real HTTP server and the real control plane; the model is scripted, a token is a byte, and
nothing is timed. Hits are a share of the possible ones: what the request before has left in the cache, in whole blocks.
Tokens read are those of the prompts of turns 2 to 10 that had to be computed.

"""

if __name__ == "__main__":
    sys.exit(main())
