"""Policies by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from agentserve.config import EngineConfig
from agentserve.core.agents.costs import ForwardCosts
from agentserve.core.agents.policies.anchor import Anchor
from agentserve.core.agents.policies.evict_always import EvictAlways
from agentserve.core.agents.policies.fair_share import FairShare
from agentserve.core.agents.policies.invocation_distance import InvocationDistance
from agentserve.core.agents.policies.lfu_decay import LfuDecay
from agentserve.core.agents.policies.min_waste import MinWaste
from agentserve.core.agents.policies.next_turn import LostContext, NextTurn
from agentserve.core.agents.policies.oracles import Belady, ShortestRemainingProgram
from agentserve.core.agents.policies.plas import Plas
from agentserve.core.agents.policies.program_order import Fcfs, ProgramFcfs
from agentserve.core.agents.policies.transition import Transition
from agentserve.core.agents.policies.ttl import Continuum, Ttl
from agentserve.core.agents.policies.working_set import WorkingSet
from agentserve.core.agents.policy import Policy
from agentserve.core.agents.registry import AgentRegistry
from agentserve.errors import ConfigError


@dataclass(frozen=True, slots=True)
class PolicyContext:
    """What a policy is made with."""

    name: str
    """By which it was asked for."""
    registry: AgentRegistry
    costs: ForwardCosts | None
    """None: there is no profile of the device."""
    swap_ns: Callable[[int], float] | None
    """Time for which so many tokens of KV are copied to the next tier and back. None: there is no tier."""
    predicts: bool = True
    """Whether a policy that can predict does."""
    prefetch_distance: float = 2.0
    """Agents that are nearer than this are loaded beforehand."""
    capacity_tokens: int = 0
    """Tokens whose KV fits the device."""

    def known_costs(self) -> ForwardCosts:
        """Raises ConfigError if there are none."""
        if self.costs is None:
            raise ConfigError(
                f"{self.name} weighs memory against computing again, so it needs to know how fast the device is: "
                "--profile FILE or --controller predictive tells"
            )
        return self.costs


PolicyFactory = Callable[[PolicyContext], Policy]


class AnchoredLru(Policy):
    """Least recently used, block by block; for `lru` with protected anchors."""

    scores_blocks = True


POLICIES: Mapping[str, PolicyFactory] = MappingProxyType(
    {
        "lru": lambda _: AnchoredLru(),
        "anchor": lambda _: Anchor(),
        "transition": lambda context: Transition(
            predicts=context.predicts, prefetches=context.prefetch_distance > 0 and context.swap_ns is not None
        ),
        "invocation_distance": lambda context: InvocationDistance(context.prefetch_distance, context.costs),
        "evict_always": lambda _: EvictAlways(),
        "ttl": lambda context: Ttl(context.registry, context.known_costs()),
        "continuum": lambda context: Continuum(context.registry, context.known_costs()),
        "min_waste": lambda context: MinWaste(context.registry, context.known_costs(), context.swap_ns),
        "lfu_decay": lambda _: LfuDecay(),
        "belady": lambda _: Belady(),
        "fcfs": lambda _: Fcfs(),
        "program_fcfs": lambda _: ProgramFcfs(),
        "plas": lambda _: Plas(),
        "fair_share": lambda _: FairShare(),
        "srpt": lambda context: ShortestRemainingProgram(context.known_costs()),
        "next_turn": lambda context: NextTurn(context.costs),
        "lost_context": lambda context: LostContext(context.costs),
        "working_set": lambda context: WorkingSet(context.registry, context.capacity_tokens),
    }
)
"""Makers of the built-in policies, for all seats."""


@dataclass(frozen=True, slots=True)
class Seats:
    """Who decides what. A policy may have several. None: nobody, it is as without policies."""

    registry: AgentRegistry
    retention: Policy | None = None
    order: Policy | None = None
    admission: Policy | None = None
    speculation: Policy | None = None
    shaping: Policy | None = None


def build_policies(
    config: EngineConfig, costs: ForwardCosts | None, factories: Mapping[str, PolicyFactory] = POLICIES
) -> Seats:
    """The policies that the configuration names.

    Raises ConfigError if one of them is not in `factories`, or needs a profile of the device and there is none.
    """
    registry, tiering = AgentRegistry(), config.tiering

    def swap_ns(num_tokens: int) -> float:
        assert tiering is not None
        num_blocks = -(-num_tokens // config.block_size)
        load_ns = tiering.load_ns(0, num_blocks)
        if tiering.write_back == "incremental":
            return load_ns  # it is below already when it leaves
        return load_ns + tiering.tiers[0].duration_ns(num_blocks * tiering.block_bytes, reads=False)

    made: dict[str, Policy] = {}

    def make(name: str) -> Policy:
        """One policy of each name, whatever its seats."""
        if name not in factories:
            raise ConfigError(f"there is no policy {name!r}; there are {', '.join(factories)}")
        if name not in made:
            swap = None if tiering is None else swap_ns
            capacity = config.num_blocks * config.block_size
            context = PolicyContext(
                name, registry, costs, swap, config.prediction, config.prefetch_distance, capacity_tokens=capacity
            )
            made[name] = factories[name](context)
        return made[name]

    retention = make(config.policy) if config.policy != "lru" or config.protects_anchors else None
    order = retention if config.policy in {"continuum", "invocation_distance"} else None
    return Seats(
        registry,
        retention,
        order if config.order == "default" else make(config.order),
        None if config.admission == "none" else make(config.admission),
        None if config.speculate == "none" else make(config.speculate),
        retention if retention is not None and type(retention).batch_tokens is not Policy.batch_tokens else None,
    )
