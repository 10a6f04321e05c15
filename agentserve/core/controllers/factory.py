"""Controllers by name."""

from __future__ import annotations

from agentserve.config import EngineConfig
from agentserve.core.batch import Lane
from agentserve.core.controllers import Controller
from agentserve.core.controllers.predictive import PredictiveController
from agentserve.core.controllers.reactive import ReactiveController
from agentserve.core.controllers.static import StaticController, static_decision
from agentserve.core.costmodel import BatchShape, CostModel
from agentserve.core.slots import PartitionTable
from agentserve.errors import ConfigError

ISOLATED_CONTEXT = 256
"""Tokens of context at which the isolated time per token is taken."""
TARGET_FACTOR = 2
"""The default target is this multiple of the isolated time per token (the constant of OneKV's evaluation)."""


def build_controller(config: EngineConfig, table: PartitionTable, cost_model: CostModel | None) -> Controller:
    """The controller that `config.control` names.

    Raises ConfigError for one that needs a cost model or a target without either.
    """
    name = config.control.controller
    if name == "static":
        return StaticController(static_decision(config, table))
    target_ns = tpot_target_ns(config, table, cost_model)
    if name == "reactive":
        return ReactiveController(config, table, target_ns)
    if cost_model is None:
        raise ConfigError("the predictive controller needs a profile of the device")
    return PredictiveController(config, table, cost_model, target_ns)


def tpot_target_ns(config: EngineConfig, table: PartitionTable, cost_model: CostModel | None) -> int:
    """The configured target, else twice what the cost model says of one decode that has the device to itself."""
    if config.control.tpot_target_ns is not None:
        return config.control.tpot_target_ns
    if cost_model is None:
        raise ConfigError(f"the {config.control.controller} controller needs a target for the time per token")
    alone = BatchShape(num_decodes=1, num_decode_context=ISOLATED_CONTEXT, num_samples=1)
    return TARGET_FACTOR * cost_model.duration_ns(alone, Lane.DECODE, table.whole, False)
