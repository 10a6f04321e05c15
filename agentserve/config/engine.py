"""What the control plane is built with."""

from __future__ import annotations

from dataclasses import dataclass

from agentserve.config.names import (
    ADMISSION_POLICIES,
    CONTROLLERS,
    DEFAULT_SPECULATE_TOKENS,
    OBJECTIVES,
    ORACLES,
    ORDER_POLICIES,
    PREFILL_ORDERS,
    RETENTION_POLICIES,
    SCHEDULERS,
    SLOTS,
    SPECULATION_POLICIES,
    TIERS,
    WRITE_BACKS,
    is_plugin,
)
from agentserve.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ControlConfig:
    """Constants of the controllers; adr/0006 argues the defaults. Raises ConfigError for what cannot work."""

    controller: str = "predictive"
    slots: str = "auto"
    """`auto`: every partition that the device has. `cap`: decode has the whole device, prefill a part of it. `stream`:
    both lanes on the whole device, the hardware shares it. `off`: never two lanes at once, prompts are computed in the
    batches of the decodes."""
    tpot_target_ns: int | None = None
    """Target time between two tokens of a stream. None until it is known: then twice the isolated time per token."""
    ttft_target_ns: int | None = None
    """Target time to the first token. None: as early as the other target allows."""
    decode_share: float = 0.5
    """Share of the device for decode while both lanes are busy: what `static` keeps and `reactive` starts from."""
    theta_high: float = 1.0
    """`reactive`: above this multiple of the target the reservation rises and the budget shrinks."""
    theta_low: float = 0.75
    """`reactive`: below this multiple both are relaxed. In between lies the dead band."""
    interval_ns: int = 200_000_000
    """`reactive`: at most one change in this time."""
    min_resume_budget: int = 16
    max_resume_budget: int = 512
    resume_budget_step: int = 32
    hysteresis: float = 0.1
    """`predictive`: another partition must promise this much more before it is taken."""
    objective: str = "delay"
    """`predictive`: what decides among the ways to share the device. `delay`: the least time lost by all agents, those
    who wait for a first token and those whose streams are slower. `rate`: the most prompt tokens per second that keep
    the target, when somebody named it."""

    def __post_init__(self) -> None:
        for name, allowed in (("controller", CONTROLLERS), ("slots", SLOTS), ("objective", OBJECTIVES)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        for name in ("tpot_target_ns", "ttft_target_ns"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be positive, not {value}")
        if not 0.0 < self.decode_share < 1.0:
            raise ConfigError(f"decode_share must lie between 0 and 1, not {self.decode_share}")
        if not 0.0 < self.theta_low < self.theta_high:
            raise ConfigError(
                f"theta_low must be positive and below theta_high, not {self.theta_low} and {self.theta_high}"
            )
        if not 1 <= self.min_resume_budget <= self.max_resume_budget or self.resume_budget_step < 1:
            raise ConfigError("the resume budgets must be positive, and the smallest not above the largest")
        if self.interval_ns < 0 or self.hysteresis < 0.0:
            raise ConfigError("interval_ns and hysteresis must not be negative")


@dataclass(frozen=True, slots=True)
class TierConfig:
    """A place for KV blocks under the device pool, and the link to it. Raises ConfigError for what cannot be."""

    name: str
    """One of `TIERS`."""
    num_blocks: int
    read_bytes_per_s: float
    """Towards the device."""
    write_bytes_per_s: float
    """From the device or the tier above."""
    latency_ns: int = 0
    """Of each transfer."""

    def __post_init__(self) -> None:
        if self.name not in TIERS:
            raise ConfigError(f"a tier must be one of {', '.join(TIERS)}, not {self.name!r}")
        if self.num_blocks < 1:
            raise ConfigError(f"the {self.name} tier holds {self.num_blocks} KV blocks; it needs room for one at least")
        if not (0.0 < self.read_bytes_per_s < float("inf") and 0.0 < self.write_bytes_per_s < float("inf")):
            raise ConfigError(f"the link of the {self.name} tier needs a positive bandwidth each way")
        if self.latency_ns < 0:
            raise ConfigError(f"the latency of the {self.name} tier must not be negative")

    def duration_ns(self, num_bytes: int, *, reads: bool) -> int:
        """How long one transfer takes alone on the link."""
        bandwidth = self.read_bytes_per_s if reads else self.write_bytes_per_s
        return self.latency_ns + round(num_bytes * 1e9 / bandwidth)


@dataclass(frozen=True, slots=True)
class TieringConfig:
    """The tiers under the device pool, the nearest one first. Raises ConfigError for what cannot work."""

    block_bytes: int
    """KV of one block, over all layers."""
    tiers: tuple[TierConfig, ...]
    write_back: str = "incremental"
    """`incremental`: cached blocks are copied down while they stay on the device, so that evicting them is free later.
    `on_evict`: only when they have to leave. Whoever needs the place of a block that is not copied yet waits for it."""
    max_transfer_blocks: int = 64
    """Blocks in one transfer at most: how soon an urgent load can go before others."""

    def __post_init__(self) -> None:
        names = [tier.name for tier in self.tiers]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"KV tiers must be named, each once, not: {', '.join(names) or 'nothing'}")
        if self.write_back not in WRITE_BACKS:
            raise ConfigError(f"write_back must be one of {', '.join(WRITE_BACKS)}, not {self.write_back!r}")
        if self.block_bytes < 1 or self.max_transfer_blocks < 1:
            raise ConfigError("block_bytes and max_transfer_blocks must be at least 1")

    def load_ns(self, tier: int, num_blocks: int) -> int:
        """How long it takes to load so many blocks from a tier (by index), one transfer after the other."""
        config = self.tiers[tier]
        num_transfers = -(-num_blocks // self.max_transfer_blocks)
        return num_transfers * config.latency_ns + round(num_blocks * self.block_bytes * 1e9 / config.read_bytes_per_s)


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """A LoRA adapter that requests may name. Raises ConfigError for what cannot be."""

    name: str
    num_bytes: int
    """To be copied when it is loaded."""
    num_parts: int = 1
    """Pieces in which it can be copied, about equally large: layers."""
    fingerprint: str = ""
    """Differs between adapters of the same name at different times."""

    def __post_init__(self) -> None:
        if not self.name or not self.name.isprintable() or self.name != self.name.strip() or "," in self.name:
            raise ConfigError(
                f"an adapter cannot have the name {self.name!r}: printable characters, no comma, no blank at the ends"
            )
        if self.num_bytes < 1 or self.num_parts < 1:
            raise ConfigError(f"the adapter {self.name} has {self.num_bytes} bytes in {self.num_parts} parts")


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """The adapters that are known, how many may be on the device, and the link on which they come there.

    Raises ConfigError for what cannot work.
    """

    adapters: tuple[AdapterConfig, ...]
    max_resident: int = 8
    """Slots on the device, one adapter each. Requests that run at once use at most so many adapters."""
    read_bytes_per_s: float = 25e9
    """Towards the device. What a simulation takes; a real device needs what it needs."""
    latency_ns: int = 10_000
    """Of each copy."""
    max_load_bytes: int = 16 << 20
    """One copy moves so many bytes at most, but at least one part: how soon an urgent load can go before others."""

    def __post_init__(self) -> None:
        names = [adapter.name for adapter in self.adapters]
        twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
        if not names or twice:
            raise ConfigError(f"each adapter needs a name of its own: {', '.join(twice) or 'there is none'}")
        if self.max_resident < 1 or self.max_load_bytes < 1:
            raise ConfigError("max_resident and max_load_bytes must be at least 1")
        if not 0.0 < self.read_bytes_per_s < float("inf") or self.latency_ns < 0:
            raise ConfigError("the link of the adapters needs a positive bandwidth and no negative latency")

    def duration_ns(self, num_bytes: int) -> int:
        """How long one copy takes alone on the link: latency, and bytes over bandwidth."""
        return self.latency_ns + round(num_bytes * 1e9 / self.read_bytes_per_s)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Constants of the control plane. Raises ConfigError for what cannot work."""

    num_blocks: int
    max_model_len: int
    block_size: int = 16
    max_num_seqs: int = 16
    time_slice_ns: int | None = None
    """A request that has run for so long gives its place to one that waits and has run less; each time it goes on, it
    may run twice as long. None: who runs keeps its place until it ends."""
    prefill_chunk: int = 256
    """Prompt tokens in one batch of the prefill lane: how far away a batch boundary can be."""
    resume_budget: int = 64
    """Resume-prefill tokens that may join one batch of the decode lane while decodes are running."""
    resume_max_steps: int = 4
    """A resume that needs more than this many budgets goes to the prefill lane."""
    resume_min_cached_tokens: int = 64
    """A cached prefix shorter than this is not worth the name: the prefill counts as cold."""
    max_num_batched_tokens: int = 2048
    """Tokens in any batch at most; for the scheduler `chunked` the budget that decodes and prompts share."""
    scheduler: str = "lanes"
    """`lanes` is ours; `chunked`, `prefill-first` and `fcfs` are baselines that use no lanes and no controller."""
    prefill_order: str = "shortest"
    """`shortest`: the prompt with the fewest tokens left goes first, with aging. `fcfs`: in order of arrival."""
    aging_tokens_per_s: int = 500
    """`shortest`: a prompt that arrived a second earlier may have this many tokens more left and still goes first."""
    enable_prefix_caching: bool = True
    decode_lookahead: int = 1
    """Batches of the decode lane in flight: with 2 the next one is made before the tokens of this one are known."""
    control: ControlConfig = ControlConfig()
    policy: str = "lru"
    """Which cached blocks are kept; one of `RETENTION_POLICIES`."""
    order: str = "default"
    """Which call goes first within its priority; one of `ORDER_POLICIES`."""
    admission: str = "none"
    """Which calls have to wait although there is memory for them; one of `ADMISSION_POLICIES`."""
    speculate: str = "none"
    """What is computed of a next prompt before it comes, while nobody waits; one of `SPECULATION_POLICIES`."""
    speculate_tokens: int = DEFAULT_SPECULATE_TOKENS
    """Tokens that are computed like this between two calls of a session, at most."""
    protect_anchors: bool | None = None
    """Whether what several sessions use is kept longer than what one of them uses. None: unless the policy is lru."""
    prediction: bool = True
    """Whether a policy that learns which agent comes next uses it; without, it keeps what it protects anyway."""
    prefetch_distance: float = 2.0
    """`invocation_distance`: agents that are nearer than this are loaded before they call; 0: nobody is. Two is what
    the published code has (`load_ahead_step`): those who are next, in applications that count in steps."""
    pin_share: float = 0.8
    """Share of the blocks that pins may keep from others."""
    tiering: TieringConfig | None = None
    """Where KV blocks go that leave the device; None: nowhere."""
    lora: LoraConfig | None = None
    """Adapters that requests may name; None: none."""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("scheduler", SCHEDULERS),
            ("prefill_order", PREFILL_ORDERS),
            ("policy", RETENTION_POLICIES),
            ("order", ORDER_POLICIES),
            ("admission", ADMISSION_POLICIES),
            ("speculate", SPECULATION_POLICIES),
        ):
            is_other = name in {"policy", "order", "admission", "speculate"} and is_plugin(getattr(self, name))
            if getattr(self, name) not in allowed and not is_other:
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        for name in (
            "num_blocks",
            "max_model_len",
            "block_size",
            "max_num_seqs",
            "prefill_chunk",
            "resume_budget",
            "resume_max_steps",
            "max_num_batched_tokens",
            "aging_tokens_per_s",
            "speculate_tokens",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.time_slice_ns is not None and self.time_slice_ns < 1:
            raise ConfigError(f"time_slice_ns must be at least 1, not {self.time_slice_ns}")
        self._check_policies()
        if self.tiering is not None and not self.enable_prefix_caching:
            raise ConfigError("KV tiers keep cached prefixes: they need prefix caching")
        if self.decode_lookahead not in {1, 2}:
            raise ConfigError(f"decode_lookahead must be 1 or 2, not {self.decode_lookahead}")
        if self.max_model_len < 2:
            raise ConfigError("max_model_len must be at least 2: a prompt token and an output token")
        if self.resume_min_cached_tokens < 0:
            raise ConfigError("resume_min_cached_tokens must not be negative")
        if self.num_blocks * self.block_size < self.max_model_len:
            # A request alone on the device must always fit, or it could never finish.
            raise ConfigError(
                f"the KV cache holds {self.num_blocks * self.block_size} tokens, fewer than the window of "
                f"{self.max_model_len}; give it more memory or choose a smaller --max-model-len"
            )

    def _check_policies(self) -> None:
        if self.policy == "continuum" and self.order != "default":
            raise ConfigError(f"continuum has an order of its own; with --order {self.order}, use --policy ttl")
        if self.policy == "invocation_distance" and self.protect_anchors is not None:
            raise ConfigError(
                "invocation_distance rates what several sessions use by their distances: no protect_anchors"
            )
        if self.speculate != "none" and not (self.scheduler == "lanes" and self.enable_prefix_caching):
            raise ConfigError("speculate needs the scheduler lanes, and the prefix cache for what it computes")
        if self.speculate == "none" and self.speculate_tokens != DEFAULT_SPECULATE_TOKENS:
            raise ConfigError("speculate_tokens needs a policy that speculates (speculate)")
        if not 0.0 <= self.prefetch_distance < float("inf"):
            raise ConfigError(f"prefetch_distance must be a number from 0 on, not {self.prefetch_distance}")
        if not 0.0 < self.pin_share <= 1.0:
            raise ConfigError(f"pin_share must be above 0 and at most 1, not {self.pin_share}")

    @property
    def protects_anchors(self) -> bool:
        """Whether what several sessions use is kept longer than what one of them uses."""
        return self.policy != "lru" if self.protect_anchors is None else self.protect_anchors

    @property
    def reads_shortest_first(self) -> bool:
        """Whether prompts are read by their length: an order policy decides about that, too."""
        return self.prefill_order == "shortest" and self.order == "default" and self.policy != "continuum"

    @property
    def needs_foresight(self) -> bool:
        """Whether a policy wants to know the future."""
        return self.policy in ORACLES or self.order in ORACLES
