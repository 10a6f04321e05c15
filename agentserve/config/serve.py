"""The table of `agentserve serve`: command line, environment and configuration file are derived from its fields."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from agentserve.config.names import (
    ADMISSION_POLICIES,
    ATTENTION_BACKENDS,
    CONTROLLERS,
    DEFAULT_FLUSH_TIMEOUT_S,
    DEFAULT_SPECULATE_TOKENS,
    ORDER_POLICIES,
    PREFILL_ORDERS,
    REASONING_PARSERS,
    RETENTION_POLICIES,
    SCHEDULERS,
    SLOTS,
    SPECULATION_POLICIES,
    TOOL_CALL_PARSERS,
    WRITE_BACKS,
)
from agentserve.config.parsers import (
    SEPARATORS,
    allow_rules,
    boolean,
    choice,
    names,
    non_negative_float,
    non_negative_int,
    patterns,
    plugin,
    port_number,
    positive_float,
    positive_int,
    servable,
    share,
    size_bytes,
    without_oracles,
)


def _option(
    default: Any, parse: Callable[[str], Any], help_text: str, *, flags: tuple[str, ...] = (), section: str
) -> Any:
    metadata = {
        "parse": parse,
        "help": help_text,
        "flags": flags,
        "section": section,
        "separator": SEPARATORS.get(parse),
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
    time_slice_ms: float | None = _option(
        None, positive_float, "a request that has run so long gives its place to one that waits and has run less; "
        "default: it keeps its place until it ends", section="scheduler",
    )  # fmt: skip
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
        "lru", servable(RETENTION_POLICIES),
        f"what stays in the cache: {', '.join(without_oracles(RETENTION_POLICIES))}, or a plug-in, module:Class",
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
        "default", servable(ORDER_POLICIES), "which call goes first: " + ", ".join(without_oracles(ORDER_POLICIES))
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
