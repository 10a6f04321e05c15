"""The composition root: the only package that names a concrete executor.

It turns a `ServeConfig` into a running engine. What needs torch is imported where it is used, so that the command line
and simulated timing start without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from agentserve.build.control import calibrated, control_config, device_sheet, nanoseconds
from agentserve.build.parts import Parts, build_parts, model_shape, window
from agentserve.build.policies import with_plugins
from agentserve.config import ControlConfig, EngineConfig, ServeConfig
from agentserve.core.costmodel import DeviceProfile, ModelShape
from agentserve.core.executor import Capabilities, Executor, require_tiers
from agentserve.models.config import ModelConfig
from agentserve.runtime.calibration_grid import Limits
from agentserve.runtime.client import EngineClient, EventBridge
from agentserve.runtime.live import LiveDriver, MonotonicClock
from agentserve.runtime.recording import Header, Recorder, require_recordable
from agentserve.runtime.replay import build_core
from agentserve.runtime.script import ScriptDriver
from agentserve.text.chat import ChatTemplate
from agentserve.text.grammar.compiler import GrammarCompiler
from agentserve.text.output import OutputFormat
from agentserve.text.tokenizer import Tokenizer

__all__ = ["Engine", "Measurable", "build_engine", "build_executor", "model_shape"]


@dataclass(frozen=True, slots=True)
class Engine:
    """A ready engine and what the server says about it. Start the driver after binding the bridge."""

    model_name: str
    model_config: ModelConfig
    dtype: str
    """Of weights and KV."""
    capabilities: Capabilities
    engine_config: EngineConfig
    client: EngineClient
    driver: LiveDriver
    bridge: EventBridge
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    output_format: OutputFormat
    grammars: GrammarCompiler
    notes: tuple[str, ...]
    """What the user must know: why timing is simulated, which tokenizer stands in, and the like."""
    close_text: Callable[[], None]
    """Ends the threads of the text side, which the executor uses."""

    def stop(self) -> None:
        """Stops the driver, closes the executor and ends every thread of the engine.

        Requests that still run are abandoned: end them first.
        """
        self.driver.stop()
        self.close_text()


def build_engine(config: ServeConfig, report: Callable[[str], None]) -> Engine:
    """Loads the model and puts the engine together.

    Args:
        config: the resolved options.
        report: called with a line for each step that takes a while.

    Raises ConfigError or ModelError, each with one clear sentence.
    """
    control = control_config(config)
    if config.record:
        require_recordable(Path(config.record))
    name, parts = build_parts(config, report)
    try:
        return _assemble(config, control, name, parts, report)
    except BaseException:
        parts.close()
        raise


def _assemble(
    config: ServeConfig,
    control: ControlConfig,
    name: str,
    parts: Parts,
    report: Callable[[str], None],
) -> Engine:
    capabilities = parts.executor.capabilities()
    engine_config = EngineConfig(
        num_blocks=capabilities.num_blocks,
        block_size=capabilities.block_size,
        max_model_len=window(config, parts.model_config, capabilities),
        max_num_seqs=config.max_num_seqs,
        time_slice_ns=nanoseconds(config.time_slice_ms),
        max_num_batched_tokens=config.max_num_batched_tokens,
        scheduler=config.scheduler,
        prefill_order=config.prefill_order,
        policy=config.policy,
        order=config.order,
        admission=config.admission,
        speculate=config.speculate,
        speculate_tokens=config.speculate_tokens,
        protect_anchors=config.protect_anchors,
        prefetch_distance=config.prefetch_distance,
        prediction=config.prediction,
        aging_tokens_per_s=config.aging_tokens_per_s,
        prefill_chunk=config.prefill_chunk,
        resume_budget=config.resume_budget,
        enable_prefix_caching=config.prefix_caching,
        decode_lookahead=min(2, capabilities.lookahead),
        control=control,
        lora=parts.lora,
        tiering=parts.tiering,
    )
    require_tiers(capabilities, engine_config.tiering)
    header = Header(
        config=engine_config,
        compute_units=capabilities.compute_units,
        unit_granularity=capabilities.unit_granularity,
        min_units=capabilities.min_units,
        unused_units=capabilities.unused_units,
        model=name,
        executor=capabilities.name,
        device=parts.profile,
        model_shape=parts.model_shape,
    )
    header = calibrated(header, parts, report)
    bridge = EventBridge()
    driver = LiveDriver(
        build_core(header, with_plugins(config.policy, config.order, config.admission, config.speculate)),
        parts.executor,
        MonotonicClock(),
        on_events=bridge.on_events,
        on_failure=bridge.on_failure,
        tier_contents=parts.tier_contents,
        recorder=Recorder(Path(config.record), header) if config.record else None,
        flush_timeout_s=0.0 if config.kv_disk_path is None else config.kv_flush_timeout,
    )
    client = EngineClient(
        driver if parts.script is None else ScriptDriver(driver, parts.script),
        max_model_len=engine_config.max_model_len,
        max_queued_requests=config.max_num_queued_reqs,
        masks=parts.text.masks,
    )
    return Engine(
        model_name=config.served_model_name or name,
        model_config=parts.model_config,
        dtype=parts.dtype,
        capabilities=capabilities,
        engine_config=engine_config,
        client=client,
        driver=driver,
        bridge=bridge,
        tokenizer=parts.text.tokenizer,
        chat_template=parts.text.chat_template,
        output_format=parts.text.output,
        grammars=parts.text.grammars,
        notes=(*parts.notes, *parts.text.notes),
        close_text=parts.text.close,
    )


# ---- measuring instead of serving ----


@dataclass(frozen=True, slots=True)
class Measurable:
    """An executor that nobody uses yet, to be closed by whoever asked for it, and what a calibration needs of it."""

    executor: Executor
    limits: Limits
    model_name: str
    model_shape: ModelShape
    dtype: str
    sheet: DeviceProfile
    """Where the fit starts."""
    notes: tuple[str, ...]


def build_executor(config: ServeConfig, report: Callable[[str], None]) -> Measurable:
    """Loads the model as `build_engine` does, and stops there. Raises what that raises."""
    name, parts = build_parts(config, report)
    try:
        capabilities = parts.executor.capabilities()
        limits = Limits.of(capabilities, window(config, parts.model_config, capabilities), config.max_num_seqs)
    except BaseException:
        parts.close()
        raise
    parts.text.close()
    sheet = parts.profile or parts.sheet or device_sheet(capabilities)
    return Measurable(parts.executor, limits, name, parts.model_shape, parts.dtype, sheet, parts.notes)
