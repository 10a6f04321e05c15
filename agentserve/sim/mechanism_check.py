"""Did the policies do anything? A run in which one never fired says nothing about it (AgentServeSim, section 3.3).

Such a run is as without the policy, whatever its name: it is reported, but not compared and not averaged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from agentserve.config import EngineConfig
from agentserve.core.stats import EngineStats

_EVICTS = ("evictions_unlike_lru", "nothing was evicted that lru would have kept")
_HOLDS = ("admissions_held_back", "its pins held nobody back")
_REORDERS = ("reorders", "no call came before one that had arrived earlier")
_KEEPS_OUT = ("calls_held", "it let every call in at once")
_SPECULATES = ("tokens_speculated_used", "no call used what was computed beforehand")
_ANY = (_EVICTS, _HOLDS, _REORDERS, _KEEPS_OUT, _SPECULATES)
"""What a plug-in may do."""

MEANS: Mapping[str, tuple[tuple[str, str], ...]] = MappingProxyType(
    {
        "lru": (_EVICTS,),
        "anchor": (_EVICTS,),
        "transition": (_EVICTS,),
        "evict_always": (("blocks_dropped", "no session had anything to drop"),),
        "ttl": (_EVICTS, _HOLDS),
        "continuum": (_EVICTS, _HOLDS, _REORDERS),
        "min_waste": (_EVICTS, _HOLDS, ("blocks_demoted", "it swapped nothing out")),
        "lfu_decay": (_EVICTS,),
        "belady": (_EVICTS,),
        "program_fcfs": (_REORDERS,),
        "plas": (_REORDERS,),
        "fair_share": (_REORDERS,),
        "srpt": (_REORDERS,),
        "working_set": (_KEEPS_OUT,),
        "next_turn": (_SPECULATES,),
        "lost_context": (_SPECULATES,),
    }
)
"""What each policy does if it does anything: the counter, and the sentence for zero. `fcfs` is what others depart from,
so it is not asked for anything."""


@dataclass(frozen=True, slots=True)
class Mechanism:
    """What the policies of a run did."""

    policy: str
    order: str
    counts: Mapping[str, int]
    """Over all instances."""
    why_not: str | None
    """Why the run must not be compared, in a sentence; None: it may be."""

    def to_json(self) -> dict[str, Any]:
        """As a part of a result."""
        return {"policy": self.policy, "order": self.order, "counts": dict(self.counts), "why_not": self.why_not}


def mechanism_check(config: EngineConfig, stats: Sequence[EngineStats]) -> Mechanism:
    """Judges a run by what its engines, which are configured alike, counted."""
    counts: Counter[str] = Counter()
    failures: dict[str, str] = {}
    for each in stats:
        if each.policies is not None:
            counts.update(each.policies.counts)
            failures.update(each.policies.failures)
    named = [config.policy] if config.policy != "lru" or config.protects_anchors else []
    named += [config.order] if config.order not in ("default", "fcfs") else []
    named += [name for name in (config.admission, config.speculate) if name != "none"]
    reasons = [f"{name} raised {error}, and the built-in took its place" for name, error in failures.items()]
    for name in named:
        means = MEANS.get(name, _ANY)
        if name not in failures and not any(counts[counter] for counter, _ in means):
            reasons.append(f"{name} never fired: " + ", and ".join(sentence for _, sentence in means))
    used = {name: count for name, count in sorted(counts.items()) if count}
    return Mechanism(config.policy, config.order, used, "; ".join(reasons) or None)
