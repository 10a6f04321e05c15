"""Options: one table, four sources. Command line > environment > TOML file > default.

`ServeConfig` is the table of `agentserve serve`: the command line, the environment variables `AGENTSERVE_*` and the
keys of the configuration file are all derived from its fields, and each value remembers where it came from.
`EngineConfig` is what the control plane is built with.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any

from agentserve.errors import ConfigError

SCHEDULERS = ("lanes", "chunked", "prefill-first", "fcfs")
CONTROLLERS = ("predictive", "reactive", "static")
SLOTS = ("auto", "cap", "stream", "off")
OBJECTIVES = ("power", "rate")
TOOL_CALL_PARSERS = (
    "auto", "none", "hermes", "qwen3_coder", "llama3_json", "llama_pythonic", "mistral", "mistral_array",
)  # fmt: skip
REASONING_PARSERS = ("auto", "none", "think", "mistral")
ATTENTION_BACKENDS = ("native", "mirror", "flashinfer", "triton", "torch")
PREFILL_ORDERS = ("shortest", "fcfs")
RETENTION_POLICIES = (
    "lru", "anchor", "transition", "invocation_distance", "evict_always", "ttl", "continuum", "min_waste", "lfu_decay",
    "belady",
)  # fmt: skip
"""What stays in the cache; adr/0015 and `agentserve.core.agents.policies` say what each one does."""
ORDER_POLICIES = ("default", "fcfs", "program_fcfs", "plas", "fair_share", "srpt")
"""Which call goes first. `default`: admission by arrival, and prompts by `prefill_order`."""
ADMISSION_POLICIES = ("none", "working_set")
"""Which calls have to wait although there is memory for them."""
SPECULATION_POLICIES = ("none", "next_turn", "lost_context")
"""What is computed of a next prompt before it comes, while a tool runs."""
POLICY_GROUP = "agentserve.policies"
"""Entry points by which installed packages offer policies of their own."""
ORACLES = ("belady", "srpt")
"""Policies that know the future: in the simulator only."""
TIERS = ("host", "cxl", "disk")
WRITE_BACKS = ("incremental", "on_evict")
DEFAULT_SPECULATE_TOKENS = 8192
DEFAULT_FLUSH_TIMEOUT_S = 30.0


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
    objective: str = "power"
    """`predictive`: what it wants most of among the ways to share the device that keep the target. `power`: prompt
    tokens per second over the time between tokens. `rate`: prompt tokens per second, when somebody named the target."""

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


# ---- parsers of values ----


def positive_int(text: str) -> int:
    value = _int(text)
    if value < 1:
        raise ConfigError(f"must be a positive number, not {text!r}")
    return value


def port_number(text: str) -> int:
    value = _int(text)
    if not 0 <= value <= 65535:
        raise ConfigError(f"must be a port from 0 to 65535, not {text!r}")
    return value


def non_negative_int(text: str) -> int:
    value = _int(text)
    if value < 0:
        raise ConfigError(f"must not be negative, but is {text!r}")
    return value


def positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ConfigError(f"must be a number, not {text!r}") from None
    if not 0.0 < value < float("inf"):
        raise ConfigError(f"must be a positive number, not {text!r}")
    return value


def non_negative_float(text: str) -> float:
    return 0.0 if text.strip() in {"0", "0.0"} else positive_float(text)


def share(text: str) -> float:
    value = positive_float(text)
    if value >= 1.0:
        raise ConfigError(f"must lie between 0 and 1, not {text!r}")
    return value


def boolean(text: str) -> bool:
    lowered = text.strip().lower()
    if lowered in {"1", "true", "yes", "on"}:
        return True
    if lowered in {"0", "false", "no", "off"}:
        return False
    raise ConfigError(f"must be true or false, not {text!r}")


def names(text: str) -> tuple[str, ...]:
    """A list separated by commas."""
    return tuple(part for part in (piece.strip() for piece in text.split(",")) if part)


def patterns(text: str) -> tuple[str, ...]:
    """A list separated by line breaks: a regular expression may have commas."""
    return tuple(line for line in text.split("\n") if line)


def allow_rules(text: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """`AGENT=TOOL,TOOL`, one a line."""
    rules = []
    for line in patterns(text):
        agent, equals, tools = line.partition("=")
        if not equals or not agent.strip():
            raise ConfigError(f"must be AGENT=TOOL,TOOL or *=TOOL,TOOL for every agent, not {line!r}")
        rules.append((agent.strip(), names(tools)))
    return tuple(rules)


def plugin(text: str) -> str:
    """`module:Class`, or the name of an entry point."""
    if not is_plugin(text):
        raise ConfigError(f"must be module:Class of a plug-in, or the name under which it is registered, not {text!r}")
    return text


_SEPARATORS: Mapping[Callable[[str], Any], str] = {names: ",", patterns: "\n", allow_rules: "\n"}
"""Of the values of options that may be repeated, by their parser."""
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)


def size_bytes(text: str) -> int:
    """`2GiB`, `512M`, `1.5g` or plain bytes; K, M, G and T are powers of 1024."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"must be a size such as 2GiB or 512MiB, not {text!r}")
    value = int(float(match[1]) * 1024 ** " kmgt".index(match[2].lower() or " "))
    if value < 1:
        raise ConfigError(f"must be a positive size, not {text!r}")
    return value


def choice(*allowed: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in allowed:
            raise ConfigError(f"must be one of {', '.join(allowed)}, not {text!r}")
        return text

    return parse


def _servable(policies: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in policies if name not in ORACLES)


def servable(policies: tuple[str, ...]) -> Callable[[str], str]:
    """One of `policies`, but no oracle: outside the simulator nobody knows the future."""

    def parse(text: str) -> str:
        if text in policies and text in ORACLES:
            raise ConfigError(f"{text} knows the future: only `agentserve simulate` can run it")
        return simulatable(_servable(policies))(text)

    return parse


def simulatable(policies: tuple[str, ...]) -> Callable[[str], str]:
    """One of `policies`, or a plug-in."""

    def parse(text: str) -> str:
        if text not in policies and not is_plugin(text):
            raise ConfigError(f"must be one of {', '.join(policies)}, or module:Class of a plug-in, not {text!r}")
        return text

    return parse


def is_plugin(name: str) -> bool:
    """Whether a policy is somebody else's: `module:Class`, or the name of an entry point. It need not exist."""
    if name == "module:Class":
        return False
    module, _, attribute = name.partition(":")
    parts = [*module.split("."), *attribute.split(".")] if ":" in name else []
    return all(part.isidentifier() for part in parts) if parts else bool(entry_points(group=POLICY_GROUP, name=name))


def _int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"must be a whole number, not {text!r}") from None


# ---- the table of `agentserve serve` ----


def _option(
    default: Any, parse: Callable[[str], Any], help_text: str, *, flags: tuple[str, ...] = (), section: str
) -> Any:
    metadata = {
        "parse": parse,
        "help": help_text,
        "flags": flags,
        "section": section,
        "separator": _SEPARATORS.get(parse),
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """Every option of `agentserve serve`. None means: chosen at start-up from the model and the machine."""

    model: str | None = _option(
        None, str, "alias, directory, GGUF file or cached hub id; without it the largest default that fits",
        section="model",
    )  # fmt: skip
    load_format: str = _option("auto", choice("auto", "dummy"), "dummy: random weights, for measuring", section="model")
    dtype: str = _option(
        "auto", choice("auto", "float32", "bfloat16", "float16"), "data type of weights and KV", section="model"
    )
    served_model_name: str | None = _option(None, str, "model name in the API", section="model")
    alias: tuple[str, ...] = _option((), names, "further model names, separated by commas", section="model")
    accept_any_model: bool | None = _option(
        None, boolean, "answer requests for any model name with the served model; default on loopback, but not with "
        "adapters",
        section="model",
    )  # fmt: skip
    claude_alias: bool = _option(
        True, boolean, "every model name that starts with claude means the served model", section="model"
    )
    tool_call_parser: str = _option(
        "auto", choice(*TOOL_CALL_PARSERS), "how the model writes tool calls; auto: what its chat template shows",
        section="model",
    )  # fmt: skip
    reasoning_parser: str = _option(
        "auto", choice(*REASONING_PARSERS), "how the model marks its thinking; auto: what its chat template shows",
        section="model",
    )  # fmt: skip
    lora: tuple[str, ...] = _option(
        (), names, "LoRA adapter as NAME=DIRECTORY, in the format of PEFT; its name is a model name in the API",
        section="model",
    )  # fmt: skip
    lora_dir: str | None = _option(
        None, str, "directory of LoRA adapters: each directory in it is one, by its name", section="model"
    )
    max_loras: int = _option(8, positive_int, "LoRA adapters that are on the device at once", section="model")
    max_lora_rank: int = _option(16, positive_int, "largest rank of a LoRA adapter", section="model")
    max_model_len: int | None = _option(
        None, positive_int, "window in tokens, prompt and output together", flags=("-c", "--ctx-size"),
        section="model",
    )  # fmt: skip
    executor: str = _option(
        "auto", choice("auto", "cpu", "cuda", "simulated"), "what computes; auto takes the best that works here",
        section="device",
    )  # fmt: skip
    gpu_memory_utilization: float = _option(
        0.9, share, "share of the GPU's memory that may be used, weights and KV cache together", section="device"
    )
    attention_backend: str = _option(
        "auto", choice("auto", *ATTENTION_BACKENDS), "what computes attention; auto: the fastest that runs here",
        section="device",
    )  # fmt: skip
    script: str | None = _option(
        None, str, "simulated executor: answer with the lines of this JSONL file, to test clients", section="device"
    )
    gpu: str = _option("rtx-5090", str, "GPU whose timing the simulated executor has", section="device")
    profile: str | None = _option(
        None, str, "profile of the device, written by `agentserve profile`; without it a real device is measured "
        "quickly at start-up", section="device",
    )  # fmt: skip
    host: str = _option("127.0.0.1", str, "address to listen on", section="network")
    port: int = _option(8177, port_number, "port to listen on; 0 takes a free one", section="network")
    api_key: str | None = _option(None, str, "key that clients must send", section="network")
    insecure: bool = _option(False, boolean, "listen beyond loopback without a key", section="network")
    max_body_size: int = _option(32 << 20, size_bytes, "largest request body", section="network")
    sse_ping_interval: float = _option(
        5.0, positive_float, "seconds of silence after which a stream gets a keep-alive", section="network"
    )
    write_timeout: float = _option(
        300.0, positive_float, "seconds that a client may read nothing of its answer before it is cut off",
        section="network",
    )  # fmt: skip
    drain_timeout: float = _option(
        30.0, positive_float, "seconds that running requests get at shutdown", section="network"
    )
    max_num_seqs: int = _option(
        16, positive_int, "requests that run at once", flags=("-np", "--parallel"), section="scheduler"
    )
    max_num_queued_reqs: int = _option(512, positive_int, "requests that may wait", section="scheduler")
    scheduler: str = _option(
        "lanes", choice(*SCHEDULERS), "lanes: ours; the others are baselines that run one batch at a time",
        section="scheduler",
    )  # fmt: skip
    max_num_batched_tokens: int = _option(2048, positive_int, "tokens in one batch at most", section="scheduler")
    prefill_order: str = _option(
        "shortest", choice(*PREFILL_ORDERS), "which prompt is read first; shortest: with aging", section="scheduler"
    )
    aging_tokens_per_s: int = _option(
        500, positive_int, "tokens that a prompt may be longer by for each second that it came earlier",
        section="scheduler",
    )  # fmt: skip
    prefill_chunk: int = _option(
        256, positive_int, "static, reactive: prompt tokens in one batch of the prefill lane", section="scheduler"
    )
    resume_budget: int = _option(
        64, positive_int, "resume-prefill tokens that may join one decode step (reactive: at first)",
        section="scheduler",
    )  # fmt: skip
    controller: str | None = _option(
        None, choice(*CONTROLLERS), "how the device is shared while prompts and decodes are present; default "
        "predictive", section="controller",
    )  # fmt: skip
    slots: str | None = _option(
        None, choice(*SLOTS, "green"), "auto: all partitions that there are; green: the same, but no start without "
        "Green Contexts; cap: only prefill is confined; stream: both lanes on everything; off: lanes take turns",
        section="controller",
    )  # fmt: skip
    tpot_target_ms: float | None = _option(
        None, positive_float, "target time between tokens; default twice that of a stream alone", section="controller"
    )
    ttft_target_ms: float | None = _option(
        None, positive_float, "target time to the first token; default as soon as possible", section="controller"
    )
    decode_share: float = _option(
        0.5, share, "share of the device for decode: static keeps it, reactive starts from it", section="controller"
    )
    theta_high: float = _option(
        1.0, positive_float, "reactive: tightens above this multiple of the target", section="controller"
    )
    theta_low: float = _option(
        0.75, positive_float, "reactive: relaxes below this multiple of the target", section="controller"
    )
    control_interval_ms: float = _option(
        200.0, positive_float, "reactive: least time between two changes", section="controller"
    )
    min_resume_budget: int = _option(16, positive_int, "least resume budget", section="controller")
    max_resume_budget: int = _option(512, positive_int, "largest resume budget", section="controller")
    resume_budget_step: int = _option(32, positive_int, "reactive: step of the resume budget", section="controller")
    hysteresis: float = _option(
        0.1, share, "predictive: gain that another partition must promise", section="controller"
    )
    block_size: int = _option(16, positive_int, "tokens in a KV block", section="cache")
    kv_cache_memory: int | None = _option(
        None, size_bytes, "memory for the KV cache, such as 2GiB; the CPU may use as much again", section="cache"
    )
    prefix_caching: bool = _option(True, boolean, "reuse the KV of shared prefixes", section="cache")
    kv_offloading_size: float = _option(
        0.0, non_negative_float, "GiB of host memory for KV blocks that leave the device; 0: none", section="cache"
    )
    kv_disk_path: str | None = _option(
        None, str, "directory for KV blocks that leave the device, or the host memory; they outlive the daemon",
        section="cache",
    )  # fmt: skip
    kv_disk_size: float = _option(0.0, non_negative_float, "GiB of files in it at most; 0: none", section="cache")
    kv_write_back: str = _option(
        "incremental", choice(*WRITE_BACKS), "when blocks are copied to the first tier: incremental, before they have "
        "to leave the device, or on_evict", section="cache",
    )  # fmt: skip
    kv_flush_timeout: float = _option(
        DEFAULT_FLUSH_TIMEOUT_S, non_negative_float, "seconds for writing cached KV blocks to --kv-disk-path when the "
        "daemon ends; 0: what is not there by then is lost", section="cache",
    )  # fmt: skip
    policy: str = _option(
        "lru", servable(RETENTION_POLICIES), "what stays in the cache: " + ", ".join(_servable(RETENTION_POLICIES))
        + ", or a plug-in, module:Class",
        section="cache",
    )  # fmt: skip
    prefetch_distance: float = _option(
        2.0, non_negative_float, "policy invocation_distance: agents nearer than this are loaded from the tiers before "
        "they call; 0: none", section="cache",
    )  # fmt: skip
    protect_anchors: bool | None = _option(
        None, boolean, "keep what several sessions use longer; default for all policies but lru", section="cache"
    )
    prediction: bool = _option(
        True, boolean, "policy transition: rate memory by which agent is likely to come next", section="cache"
    )
    order: str = _option(
        "default", servable(ORDER_POLICIES), "which call goes first: " + ", ".join(_servable(ORDER_POLICIES))
        + ", or a plug-in, module:Class",
        section="scheduler",
    )  # fmt: skip
    admission: str = _option(
        "none", servable(ADMISSION_POLICIES), "which calls wait although there is memory for them: none, or "
        "working_set, those of new programs while the contexts of others fill the cache; or a plug-in, module:Class",
        section="scheduler",
    )  # fmt: skip
    speculate: str = _option(
        "none", servable(SPECULATION_POLICIES), "while a tool runs and nobody waits, compute what the next prompt of "
        "its session begins with: none, next_turn (all that is missing), lost_context (what was evicted or is written "
        "anew), or a plug-in, module:Class",
        section="scheduler",
    )  # fmt: skip
    speculate_tokens: int = _option(
        DEFAULT_SPECULATE_TOKENS, positive_int, "speculate: tokens between two calls of a session at most",
        section="scheduler",
    )  # fmt: skip
    token_history: bool = _option(
        True, boolean, "read answers again with the token ids that were generated, so that no prefix breaks there",
        section="cache",
    )  # fmt: skip
    token_history_size: int = _option(64 << 20, size_bytes, "memory for the token ids of answers", section="cache")
    stabilize: tuple[str, ...] = _option(
        (), patterns, "freeze what this regular expression matches in system prompts and descriptions of tools to its "
        "first value in the session", section="cache",
    )  # fmt: skip
    tool_allow: tuple[tuple[str, tuple[str, ...]], ...] = _option(
        (), allow_rules, "AGENT=TOOL,TOOL: the only tools that an agent may call, or *=TOOL,TOOL for every agent; "
        "without a rule it may call all. Patterns such as fs_* are allowed",
        section="safety",
    )  # fmt: skip
    safety: str | None = _option(
        None, plugin, "plug-in, module:Class, that may refuse tool calls beside --tool-allow", section="safety"
    )
    seed: int = _option(0, non_negative_int, "seed of dummy weights", section="model")
    record: str | None = _option(None, str, "write the input log of the control plane to FILE", section="logging")
    log_level: str = _option("info", choice("debug", "info", "warning", "error"), "how much to log", section="logging")


@dataclass(frozen=True, slots=True)
class Resolved:
    """A configuration and where each of its values came from."""

    config: ServeConfig
    sources: Mapping[str, str]


def env_name(option: str) -> str:
    return "AGENTSERVE_" + option.upper()


def resolve(
    cli: Mapping[str, str], env: Mapping[str, str], file: Mapping[str, Any], file_name: str = "file"
) -> Resolved:
    """Merges the sources.

    Args:
        cli: option name to text, only those that were given.
        env: the process environment; `AGENTSERVE_*` variables that are no option are errors.
        file: parsed TOML: one table a section, keys as the command line spells them.
        file_name: for error messages.

    Raises ConfigError that names the option and its source.
    """
    options = {f.name: f for f in dataclasses.fields(ServeConfig)}
    from_file = _flatten(file, options, file_name)
    known = {env_name(name) for name in options} | {"AGENTSERVE_CONFIG"}
    for variable in sorted(env):
        if variable.startswith("AGENTSERVE_") and variable not in known:
            raise ConfigError(f"environment variable {variable} is no option of agentserve")
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for name, option in options.items():
        if name in cli:
            text, source = cli[name], "--" + name.replace("_", "-")
        elif env_name(name) in env:
            text, source = env[env_name(name)], env_name(name)
        elif name in from_file:
            text, source = from_file[name], f"{file_name}: {option.metadata['section']}.{name}"
        else:
            sources[name] = "default"
            continue
        try:
            values[name] = option.metadata["parse"](text)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None
        sources[name] = source
    return Resolved(ServeConfig(**values), sources)


def _flatten(file: Mapping[str, Any], options: Mapping[str, dataclasses.Field[Any]], file_name: str) -> dict[str, str]:
    flat: dict[str, str] = {}
    sections = sorted({option.metadata["section"] for option in options.values()})
    for section, table in file.items():
        if section not in sections or not isinstance(table, Mapping):
            raise ConfigError(f"{file_name}: unknown section [{section}]; there are {', '.join(sections)}")
        for key, value in table.items():
            name = key.replace("-", "_")
            if name not in options or options[name].metadata["section"] != section:
                raise ConfigError(f"{file_name}: [{section}] has no option {key!r}")
            if isinstance(value, list):
                separator = options[name].metadata["separator"] or ","
                flat[name] = separator.join(str(item) for item in value)
            elif isinstance(value, bool):
                flat[name] = "true" if value else "false"
            elif isinstance(value, (str, int, float)):
                flat[name] = str(value)
            else:
                raise ConfigError(f"{file_name}: {section}.{key} must be a string, a number, a boolean or a list")
    return flat
