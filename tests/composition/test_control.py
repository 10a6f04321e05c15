"""What the controller is told at start-up."""

from __future__ import annotations

import pytest

from agentserve.build.control import _hopeful, control_config
from agentserve.config import ServeConfig
from agentserve.core.costmodel import Contention
from agentserve.errors import ConfigError


def test_a_quick_measurement_cannot_rule_a_partition_out() -> None:
    assert _hopeful(Contention(7.0, 3.0, 9.0, 5.0)) == Contention(1.25, 1.25, 2.0, 2.0, 2.0, 2.0)
    plausible = Contention(1.05, 1.1, 1.6, 1.4, 1.5, 1.3)
    assert _hopeful(plausible) == plausible


def test_options_of_the_controller_reach_it() -> None:
    control = control_config(ServeConfig(tpot_target_ms=50.0, ttft_target_ms=900.0, slots="stream", theta_low=0.5))
    assert (control.tpot_target_ns, control.ttft_target_ns) == (50_000_000, 900_000_000)
    assert (control.controller, control.slots, control.theta_low) == ("predictive", "stream", 0.5)


def test_a_scheduler_without_a_controller_takes_none_of_its_options() -> None:
    assert control_config(ServeConfig(scheduler="fcfs")).controller == "predictive"  # the default, asked by nobody
    with pytest.raises(ConfigError, match="--slots needs --scheduler lanes"):
        control_config(ServeConfig(scheduler="fcfs", slots="off"))
