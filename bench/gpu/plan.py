"""The parts of a check in the order of their value, and how the time is shared out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from agentserve.errors import AgentServeError

BUDGET_S = 540.0
"""Nine minutes: a machine may be lent for ten minutes at a time, and something always takes longer than planned."""
CLOSING_S = 8.0
"""For the table of targets and the pictures' last moves."""
_LEAST_S = 5.0
MAX_FILES = 8
"""In the folder of results: a machine may give back no more."""


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the check."""

    name: str
    """Of its module in `bench.gpu`, too."""
    what: str
    limit_s: float
    """It is stopped after this; what it has recorded until then is kept."""
    reserve_s: float
    """Earlier parts leave it this much."""
    needs: tuple[str, ...] = ()
    """Modules without which it cannot run, beside torch."""


_ENGINE = ("jinja2", "numpy", "psutil", "safetensors", "tokenizers")
_SERVER = (*_ENGINE, "aiohttp", "prometheus_client", "pydantic", "rich", "transformers")

PARTS = (
    Part("device", "facts, Green Contexts, which SMs a slot runs on, cost of a switch", 75, 30, ("triton",)),
    Part("tests", "pytest -m gpu", 130, 60, ("pytest",)),
    Part("steps", "ceilings of the device; decode steps and prefills of the model against them", 130, 70, _ENGINE),
    Part(
        "sharing", "decode steps beside prefills in every partition; figure 3; profile and residuals", 100, 50, _ENGINE
    ),
    Part("daemon", "victim_attacker and react on the daemon: figures 2, 5 and 7", 215, 110, (*_SERVER, "matplotlib")),
    Part("attention", "attention kernels side by side: FlashInfer, Triton, torch", 60, 15),
    Part("sanitizer", "compute-sanitizer over the tests of the kernels", 120, 0, ("pytest",)),
)


def choose(only: Sequence[str]) -> tuple[Part, ...]:
    """The parts of these names, in the order of their value; all without names. Raises AgentServeError."""
    names = [part.name for part in PARTS]
    unknown = [name for name in only if name not in names]
    if unknown:
        raise AgentServeError(f"there is no part {unknown[0]!r}; there are {', '.join(names)}")
    return tuple(part for part in PARTS if not only or part.name in only)


def time_for(parts: Sequence[Part], index: int, left_s: float) -> float:
    """Seconds that a part gets when `left_s` are left: up to its limit, and what later parts need is not touched.

    What a part does not use is there for the later ones. Nothing if not even a third of its own reserve is left.
    """
    part, later = parts[index], parts[index + 1 :]
    available = left_s - CLOSING_S - sum(other.reserve_s for other in later)
    given = min(part.limit_s, max(available, min(part.reserve_s, left_s - CLOSING_S)))
    return given if given >= min(part.limit_s, max(_LEAST_S, part.reserve_s / 3)) else 0.0
