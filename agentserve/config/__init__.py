"""Options: one table, four sources. Command line > environment > TOML file > default.

`ServeConfig` is the table of `agentserve serve`: the command line, the environment variables `AGENTSERVE_*` and the
keys of the configuration file are all derived from its fields, and each value remembers where it came from.
`EngineConfig` is what the control plane is built with.
"""

from __future__ import annotations

from agentserve.config.engine import AdapterConfig, ControlConfig, EngineConfig, LoraConfig, TierConfig, TieringConfig
from agentserve.config.names import (
    ADMISSION_POLICIES,
    CONTROLLERS,
    DEFAULT_FLUSH_TIMEOUT_S,
    OBJECTIVES,
    ORDER_POLICIES,
    POLICY_GROUP,
    PREFILL_ORDERS,
    REASONING_PARSERS,
    RETENTION_POLICIES,
    SCHEDULERS,
    SLOTS,
    SPECULATION_POLICIES,
    TOOL_CALL_PARSERS,
    WRITE_BACKS,
    is_plugin,
)
from agentserve.config.parsers import (
    allow_rules,
    boolean,
    choice,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
    simulatable,
    size_bytes,
)
from agentserve.config.serve import ServeConfig
from agentserve.config.sources import Resolved, env_name, resolve

__all__ = [
    "ADMISSION_POLICIES",
    "CONTROLLERS",
    "DEFAULT_FLUSH_TIMEOUT_S",
    "OBJECTIVES",
    "ORDER_POLICIES",
    "POLICY_GROUP",
    "PREFILL_ORDERS",
    "REASONING_PARSERS",
    "RETENTION_POLICIES",
    "SCHEDULERS",
    "SLOTS",
    "SPECULATION_POLICIES",
    "TOOL_CALL_PARSERS",
    "WRITE_BACKS",
    "AdapterConfig",
    "ControlConfig",
    "EngineConfig",
    "LoraConfig",
    "Resolved",
    "ServeConfig",
    "TierConfig",
    "TieringConfig",
    "allow_rules",
    "boolean",
    "choice",
    "env_name",
    "is_plugin",
    "non_negative_float",
    "non_negative_int",
    "positive_float",
    "positive_int",
    "resolve",
    "simulatable",
    "size_bytes",
]
