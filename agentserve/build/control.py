"""What the controller is told: its options, and what is measured of the device for it at start-up."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import psutil

from agentserve.build.parts import Parts
from agentserve.config import ControlConfig, ServeConfig
from agentserve.core.controllers.factory import TARGET_FACTOR
from agentserve.core.costmodel import Contention, DeviceProfile, ModelShape
from agentserve.core.executor import Capabilities, Executor
from agentserve.errors import ConfigError
from agentserve.profiles.sheets import cpu_sheet
from agentserve.runtime.calibration import calibrate, measure_isolated_tpot_ns
from agentserve.runtime.calibration_grid import Grid, Limits
from agentserve.runtime.recording import Header

logger = logging.getLogger(__name__)

_MOST_SPLIT, _MOST_SHARED = 1.25, 2.0
"""Lanes on disjoint units meet only in memory; on shared units each gets about half."""


def calibrated(header: Header, parts: Parts, report: Callable[[str], None]) -> Header:
    """The header with what its controller needs to know of the device: measured now where nobody said it."""
    config, control = header.config, header.config.control
    if config.scheduler != "lanes" or control.controller == "static":
        return header
    executor = parts.executor
    limits = Limits.of(executor.capabilities(), config.max_model_len, config.max_num_seqs)
    device = header.device
    if device is None and control.controller == "predictive":
        report("measuring the device for the predictive controller, a few seconds (--profile FILE does without)")
        device = _measured(executor, limits, parts.model_shape, parts.sheet)
    if control.tpot_target_ns is None:
        isolated_ns = measure_isolated_tpot_ns(executor, limits)
        control = replace(control, tpot_target_ns=TARGET_FACTOR * isolated_ns)
        report(
            f"a stream alone has {isolated_ns / 1e6:.1f} ms between tokens; the target is {TARGET_FACTOR} times that "
            "(--tpot-target-ms sets it)"
        )
    return replace(header, device=device, config=replace(config, control=control))


def _measured(executor: Executor, limits: Limits, shape: ModelShape, sheet: DeviceProfile | None) -> DeviceProfile:
    capabilities = executor.capabilities()
    table = capabilities.partition_table()
    start = sheet or device_sheet(capabilities)
    fit = calibrate(
        executor, Grid.quick(table, limits), start, shape, provenance="measured: quickly, when the daemon started"
    )
    logger.debug("the fit of the device's profile:\n%s", fit)
    return replace(fit.profile, contention=_hopeful(fit.profile.contention))


def _hopeful(measured: Contention) -> Contention:
    """Contention of a quick measurement, bounded from above.

    A way to share the device that looks too slow is not taken, so it is not measured again: one interruption at the
    wrong moment would rule it out for good. What looks too fast is corrected within a few batches.
    """
    return Contention(
        decode_split=min(measured.decode_split, _MOST_SPLIT),
        prefill_split=min(measured.prefill_split, _MOST_SPLIT),
        decode_shared=min(measured.decode_shared, _MOST_SHARED),
        prefill_shared=min(measured.prefill_shared, _MOST_SHARED),
        decode_cap=min(measured.decode_cap, _MOST_SHARED),
        prefill_cap=min(measured.prefill_cap, _MOST_SHARED),
    )


def control_config(config: ServeConfig) -> ControlConfig:
    """Raises ConfigError for options of a controller beside a scheduler that has none."""
    if config.scheduler != "lanes":
        for name in ("controller", "slots", "tpot_target_ms", "ttft_target_ms"):
            if getattr(config, name) is not None:
                option = "--" + name.replace("_", "-")
                raise ConfigError(f"{option} needs --scheduler lanes: {config.scheduler} has no controller")
    return ControlConfig(
        controller=config.controller or "predictive",
        # Where there are Green Contexts, they are what the table is made of.
        slots="auto" if config.slots in {None, "green"} else config.slots,
        tpot_target_ns=nanoseconds(config.tpot_target_ms),
        objective="delay" if config.tpot_target_ms is None else "rate",
        ttft_target_ns=nanoseconds(config.ttft_target_ms),
        decode_share=config.decode_share,
        theta_high=config.theta_high,
        theta_low=config.theta_low,
        interval_ns=round(config.control_interval_ms * 1e6),
        min_resume_budget=config.min_resume_budget,
        max_resume_budget=config.max_resume_budget,
        resume_budget_step=config.resume_budget_step,
        hysteresis=config.hysteresis,
    )


def nanoseconds(milliseconds: float | None) -> int | None:
    """At least one; None stays None."""
    return None if milliseconds is None else max(1, round(milliseconds * 1e6))


def device_sheet(capabilities: Capabilities) -> DeviceProfile:
    return cpu_sheet(
        capabilities.name,
        capabilities.device,
        compute_units=capabilities.compute_units,
        memory_bytes=psutil.virtual_memory().total,
    )
