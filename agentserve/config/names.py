"""What may be chosen: the names of schedulers, policies and formats. Adding one starts here."""

from __future__ import annotations

from importlib.metadata import entry_points

SCHEDULERS = ("lanes", "chunked", "prefill-first", "fcfs")
CONTROLLERS = ("predictive", "reactive", "static")
SLOTS = ("auto", "cap", "stream", "off")
OBJECTIVES = ("delay", "rate")
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


def is_plugin(name: str) -> bool:
    """Whether a policy is somebody else's: `module:Class`, or the name of an entry point. It need not exist."""
    if name == "module:Class":
        return False
    module, _, attribute = name.partition(":")
    parts = [*module.split("."), *attribute.split(".")] if ":" in name else []
    return all(part.isidentifier() for part in parts) if parts else bool(entry_points(group=POLICY_GROUP, name=name))
