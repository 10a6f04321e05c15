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
from typing import Any

from agentserve.errors import ConfigError

SCHEDULERS = ("lanes", "chunked", "prefill-first", "fcfs")
CONTROLLERS = ("predictive", "reactive", "static")
SLOTS = ("auto", "cap", "stream", "off")
OBJECTIVES = ("power", "rate")
ATTENTION_BACKENDS = ("mirror", "flashinfer", "triton", "torch")
PREFILL_ORDERS = ("shortest", "fcfs")


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

    def __post_init__(self) -> None:
        for name, allowed in (("scheduler", SCHEDULERS), ("prefill_order", PREFILL_ORDERS)):
            if getattr(self, name) not in allowed:
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
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
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
        "repeatable": parse is names,
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
    accept_any_model: bool = _option(
        False, boolean, "answer requests for any model name with the served model", section="model"
    )
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
                flat[name] = ",".join(str(item) for item in value)
            elif isinstance(value, bool):
                flat[name] = "true" if value else "false"
            elif isinstance(value, (str, int, float)):
                flat[name] = str(value)
            else:
                raise ConfigError(f"{file_name}: {section}.{key} must be a string, a number, a boolean or a list")
    return flat
