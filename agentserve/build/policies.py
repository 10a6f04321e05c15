"""Policies of others: `--policy module:Class`, or a name that an installed package has registered.

A package registers its policies as entry points of the group `agentserve.policies`. Such code runs in the daemon with
all its rights; only what the user names is imported, and never what a recording names.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType

from agentserve.config import (
    ADMISSION_POLICIES,
    ORDER_POLICIES,
    POLICY_GROUP,
    RETENTION_POLICIES,
    SPECULATION_POLICIES,
    ServeConfig,
)
from agentserve.core.agents.factory import POLICIES, PolicyContext, PolicyFactory
from agentserve.core.agents.policies.tool_allow import ToolAllowList
from agentserve.core.agents.policy import Policy
from agentserve.core.agents.registry import AgentRegistry
from agentserve.errors import ConfigError


def with_plugins(*names: str) -> Mapping[str, PolicyFactory]:
    """The makers of the built-in policies and of those plug-ins that are among `names`.

    A policy is made with what its class takes: `from_context(PolicyContext)` if it has that, else no arguments.

    Raises ConfigError, which names the plug-in, if it cannot be imported, is no policy or is registered twice.
    """
    known = {*POLICIES, *RETENTION_POLICIES, *ORDER_POLICIES, *ADMISSION_POLICIES, *SPECULATION_POLICIES}
    added = {name: _factory(name, _load(name)) for name in names if name not in known}
    return MappingProxyType({**POLICIES, **added})


def safety_policies(config: ServeConfig) -> list[Policy]:
    """Who may refuse tool calls. Raises ConfigError for a plug-in that cannot be made."""
    policies: list[Policy] = [ToolAllowList(config.tool_allow)] if config.tool_allow else []
    if config.safety is not None:
        context = PolicyContext(config.safety, AgentRegistry(), costs=None, swap_ns=None)
        policies.append(with_plugins(config.safety)[config.safety](context))
    return policies


def _load(name: str) -> object:
    if ":" in name:
        return _imported(name, EntryPoint(name, name, POLICY_GROUP))
    found = {entry.value: entry for entry in entry_points(group=POLICY_GROUP, name=name)}
    if not found:
        raise ConfigError(f"there is no policy {name!r}; there are {', '.join(POLICIES)}, and module:Class")
    if len(found) > 1:
        raise ConfigError(f"the policy {name!r} is registered twice: {', '.join(sorted(found))}")
    return _imported(name, next(iter(found.values())))


def _imported(name: str, entry: EntryPoint) -> object:
    module, _, attribute = entry.value.partition(":")
    if not module or not attribute:
        raise ConfigError(f"the policy {name!r}: expected module:Class, not {entry.value!r}")
    try:
        found: object = importlib.import_module(module)
    except Exception as error:  # what somebody else's module raises while it is imported may be anything
        raise ConfigError(f"the policy {name!r}: cannot import {module}: {type(error).__name__}: {error}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"the policy {name!r}: {module} has no {attribute}")
        found = getattr(found, part)
    return found


def _factory(name: str, found: object) -> PolicyFactory:
    if not (isinstance(found, type) and issubclass(found, Policy)):
        raise ConfigError(f"the policy {name!r} is no subclass of agentserve.core.agents.Policy")
    make: Callable[[PolicyContext], Policy] | None = getattr(found, "from_context", None)

    def factory(context: PolicyContext) -> Policy:
        try:
            return found() if make is None else make(context)
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(f"the policy {name!r} cannot be made: {type(error).__name__}: {error}") from error

    return factory
