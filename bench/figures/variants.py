"""The configurations that figures compare: one table for the simulator and for a live daemon."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from agentserve.config import EngineConfig


@dataclass(frozen=True, slots=True)
class Variant:
    """A way to run the engine."""

    key: str
    """Its name in files and on the command line."""
    label: str
    """Its name in figures."""
    color: str
    marker: str
    options: tuple[str, ...]
    """Of `agentserve serve`."""
    engine: Mapping[str, Any]
    """The same as fields of EngineConfig."""
    control: Mapping[str, Any]
    """The same as fields of ControlConfig."""

    def configure(self, config: EngineConfig) -> EngineConfig:
        """The configuration with this variant's values. Raises ConfigError for values that cannot work."""
        control = dataclasses.replace(config.control, **self.control)
        return dataclasses.replace(config, control=control, **self.engine)


_CHUNKED_BUDGET = 512


def _variant(
    key: str,
    label: str,
    style: str,
    options: str = "",
    *,
    engine: dict[str, Any] | None = None,
    control: dict[str, Any] | None = None,
) -> Variant:
    color, marker = style.split()
    empty: dict[str, Any] = {}
    return Variant(
        key,
        label,
        color,
        marker,
        tuple(options.split()),
        MappingProxyType(engine or empty),
        MappingProxyType(control or empty),
    )


_TABLE = (
    _variant("predictive", "ours: predictive", "#c1121f o"),
    _variant("reactive", "ours: reactive", "#f4845f s", "--controller reactive", control={"controller": "reactive"}),
    _variant("static", "static split", "#edae49 D", "--controller static", control={"controller": "static"}),
    _variant(
        "stream",
        "stream (no slots)",
        "#588157 ^",
        "--controller static --slots stream",
        control={"controller": "static", "slots": "stream"},
    ),
    _variant(
        "cap",
        "cap (prefill confined)",
        "#9c6644 <",
        "--controller static --slots cap",
        control={"controller": "static", "slots": "cap"},
    ),
    _variant(
        "chunked",
        f"chunked ({_CHUNKED_BUDGET})",
        "#30638e v",
        f"--scheduler chunked --max-num-batched-tokens {_CHUNKED_BUDGET}",
        engine={"scheduler": "chunked", "max_num_batched_tokens": _CHUNKED_BUDGET},
    ),
    _variant(
        "prefill-first",
        "prefill first",
        "#7b6d8d P",
        "--scheduler prefill-first",
        engine={"scheduler": "prefill-first"},
    ),
    _variant("fcfs", "fcfs", "#6c757d X", "--scheduler fcfs", engine={"scheduler": "fcfs"}),
    _variant("no-slots", "no slots", "#588157 ^", "--slots stream", control={"slots": "stream"}),
)
VARIANTS: Mapping[str, Variant] = MappingProxyType({variant.key: variant for variant in _TABLE})

COMPARED = ("predictive", "reactive", "static", "stream", "chunked", "prefill-first", "fcfs")
"""Figures 5 and 6."""
TIMELINE = ("fcfs", "chunked", "predictive")
"""Figure 2."""
TIMELINE_AGENTS = 3
ABLATION = ("predictive", "static", "no-slots")
"""Figure 7: everything, without the algorithm, without slots."""
ABLATION_AGENTS = 4
SIMPLE = ("static", "stream", "chunked")
"""What the predictive controller must not lose to."""
