"""Engines on simulated hardware: for `agentserve simulate`, for figures and for tests. Needs no torch."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection
from typing import Any

from agentserve.build.adapters import recorded_lora, simulated_lora
from agentserve.build.control import nanoseconds
from agentserve.build.parts import SIMULATED_DEFAULT_MODEL, model_shape
from agentserve.build.policies import with_plugins
from agentserve.config import ControlConfig, EngineConfig, LoraConfig, is_plugin
from agentserve.core.agents.policies.tool_allow import EVERYBODY, ToolAllowList
from agentserve.core.costmodel import CostModel
from agentserve.errors import ConfigError, WorkloadError
from agentserve.executors.simulated.executor import SimulatedExecutor
from agentserve.models.registry import resolve_model
from agentserve.profiles import load_profile
from agentserve.profiles.links import TierSizes, make_tiering
from agentserve.runtime.recording import Header
from agentserve.runtime.replay import build_core
from agentserve.runtime.virtual import VirtualDriver
from agentserve.sim.cells import Cell, flag
from agentserve.sim.cluster import Cluster, Instance, Link
from agentserve.sim.formats import FORMATS, detect_format, load_workload
from agentserve.sim.hardware import Hardware
from agentserve.sim.orchestrator import simulate
from agentserve.sim.programs import Workload
from agentserve.sim.recorded import RecordedTraffic, read_recording
from agentserve.sim.report import result_of
from agentserve.sim.router import build_router
from agentserve.sim.specs import WorkloadSpec
from agentserve.sim.sweep import Plan, Result
from agentserve.sim.vetoes import agents_of, without_vetoed_calls
from agentserve.sim.workloads import WORKLOADS

DEFAULT_GPU = "rtx-5090"
_VOCABULARY = range(100, 1000)
"""Synthetic outputs; prompts are made of other tokens."""
_MAX_BATCHES = 2000
"""Batches that a result keeps: more than a figure can show."""
_ELEMENT_SIZES = {"bfloat16": 2, "float16": 2, "float32": 4}
_CONTROL = ("controller", "slots", "tpot_target_ms")
_ENGINE = (
    "scheduler",
    "max_num_seqs",
    "max_num_batched_tokens",
    "prefill_chunk",
    "policy",
    "order",
    "admission",
    "speculate",
    "speculate_tokens",
    "protect_anchors",
    "prefetch_distance",
    "prediction",
)
_LINK_GB_PER_S = 12.0
_LORA_RANK, _MAX_LORAS = 16, 8


# ---- engines ----


def load_hardware(
    profile: str = DEFAULT_GPU, model: str = SIMULATED_DEFAULT_MODEL, dtype: str = "bfloat16"
) -> Hardware:
    """A device and a model on it. Raises ConfigError or ModelError if either is not known."""
    device = load_profile(profile)
    source = resolve_model(model)
    if source.config is None:
        raise ConfigError(f"the shape of {model} is not known, so its timing cannot be simulated")
    shape = model_shape(source.config, _ELEMENT_SIZES[dtype])
    return Hardware(device, shape, source.name, source.config.max_position_embeddings)


def build_instance(header: Header) -> Instance:
    """A core as the header says, on simulated hardware of its own.

    Raises ConfigError if the header has no profile of the device or no shape of the model.
    """
    if header.device is None or header.model_shape is None:
        raise ConfigError("there is no profile of the device and the model, so timing cannot be simulated")
    config = header.config
    executor = SimulatedExecutor(
        CostModel(header.device, header.model_shape),
        num_blocks=config.num_blocks,
        block_size=config.block_size,
        vocabulary=_VOCABULARY,
        lookahead=config.decode_lookahead,
        tiering=config.tiering,
        lora=config.lora,
    )
    policies = with_plugins(config.policy, config.order, config.admission, config.speculate)
    return Instance(build_core(header, policies), executor)


def build_driver(header: Header) -> VirtualDriver:
    """One such engine on a clock of its own. Raises what `build_instance` raises."""
    return VirtualDriver(*build_instance(header))


# ---- plans ----


def make_plans(cells: tuple[Cell, ...]) -> list[Plan]:
    """What each cell simulates; everything that can be refused is refused here.

    Raises ConfigError, ModelError, WorkloadError or RecordingError.
    """
    planner = _Planner()
    return [planner.plan(cell) for cell in cells]


class _Planner:
    """Reads each file once."""

    def __init__(self) -> None:
        self._recording = functools.cache(_read_recording)
        self._workload = functools.cache(_make_workload)

    def plan(self, cell: Cell) -> Plan:
        spec = _spec(cell)
        traffic = self._recording(spec, cell.format, cell.seed)
        workload = traffic.workload if traffic is not None else self._workload(spec, cell.format, cell.seed)
        if cell.tools is not None:
            workload = _with_tools(workload, cell.tools, cell.seed)
        if cell.tool_allow is not None:
            workload = _with_allowed_tools(workload, cell.tool_allow)
        title = cell.workload if spec.path is None else spec.path.name
        if traffic is not None and cell.gpu is None and cell.profile is None and cell.model is None:
            header = _recorded_header(cell, traffic.header)
            assert header.device is not None
            conditions = f"simulated timing, {header.device.description} as recorded, {header.model}"
        else:
            hardware = _hardware(cell, None if traffic is None else traffic.header)
            config = _engine_config(cell, hardware, None if traffic is None else traffic.header.config)
            header, conditions = hardware.header(config), hardware.conditions
        _check_control(cell, header.config)
        _check_plugins(cell, header.config)
        shape = header.model_shape
        assert shape is not None
        header, tier_notes = _with_tiers(cell, _with_adapters(cell, header, workload))
        return Plan(
            cell=cell,
            header=header,
            workload=workload,
            title=title,
            conditions=conditions,
            overload=cell.overload or "wait",
            overload_calls=cell.overload_calls or header.config.max_num_seqs,
            link=Link((cell.link_gb_per_s or _LINK_GB_PER_S) * 1e9, kv_bytes_per_token=shape.kv_bytes_per_token),
            recorded=None if traffic is None else traffic.records,
            notes=(*_notes(workload, header), *tier_notes),
        )


def _spec(cell: Cell) -> WorkloadSpec:
    """The workload with the options of the cell. Raises ConfigError for one that is said twice or does not apply."""
    spec = WorkloadSpec.parse(cell.workload)
    values = {}
    for name in ("agents", "programs", "scale", "rate"):
        value = getattr(cell, name)
        if value is not None and getattr(spec, name) is not None:
            raise ConfigError(f"{flag(name)} {value}: {cell.workload} says {name}, too")
        values[name] = getattr(spec, name) if value is None else value
    spec = dataclasses.replace(spec, **values)
    if spec.path is None:
        if cell.format is not None:
            raise ConfigError(f"--format is for files, and {spec.name} is a named workload")
        return spec
    if not spec.path.is_file():
        raise WorkloadError(f"{spec.name} is neither a file nor a workload; there are {', '.join(WORKLOADS)}")
    if any(value is not None for value in (spec.programs, spec.scale, spec.rate)):
        raise ConfigError(f"{spec.name}: programs, scale and rate are for named workloads; a file says it all")
    if cell.format is not None and cell.format not in FORMATS:
        raise ConfigError(f"--format: must be one of {', '.join(FORMATS)}, not {cell.format!r}")
    return spec


def _read_recording(spec: WorkloadSpec, file_format: str | None, seed: int) -> RecordedTraffic | None:
    """None for what is no recording."""
    path = spec.path
    if path is None or (file_format or detect_format(path)) != "recording":
        return None
    if spec.agents is not None:
        raise ConfigError(f"{path}: a recording has arrival times; leave the number of agents out")
    return read_recording(path, seed=seed)


def _make_workload(spec: WorkloadSpec, file_format: str | None, seed: int) -> Workload:
    path = spec.path
    if path is None:
        return spec.make(seed)
    workload = load_workload(path, format=file_format or "auto", num_agents=spec.agents, seed=seed)
    is_timed = any(program.arrival_ms is not None for program in workload.programs)
    # Programs that all start at once are hardly what a file without times means.
    return workload if is_timed or spec.agents is not None else dataclasses.replace(workload, num_agents=1)


def _with_tools(workload: Workload, profile: str, seed: int) -> Workload:
    from agentserve.sim.tools import load_tool_profile, with_tool_times

    return with_tool_times(workload, load_tool_profile(profile), seed)


def _with_allowed_tools(workload: Workload, rules: tuple[tuple[str, tuple[str, ...]], ...]) -> Workload:
    """The workload with the calls stopped that the rules do not allow. Raises ConfigError for a rule for nobody."""
    agents = {EVERYBODY, *agents_of(workload)}
    unknown = next((agent for agent, _ in rules if agent not in agents), None)
    if unknown is not None:
        raise ConfigError(f"--tool-allow: no agent of the workload is called {unknown!r}; * means all")
    return without_vetoed_calls(workload, [ToolAllowList(rules)])


def _hardware(cell: Cell, recorded: Header | None) -> Hardware:
    """The device and model of the cell; what it does not say is as in the recording."""
    if cell.gpu is not None and cell.profile is not None:
        raise ConfigError("--gpu and --profile are two devices; give one of them")
    model = cell.model or (recorded.model if recorded else SIMULATED_DEFAULT_MODEL)
    hardware = load_hardware(cell.profile or cell.gpu or DEFAULT_GPU, model, cell.dtype or "bfloat16")
    if recorded is None:
        return hardware
    if cell.gpu is None and cell.profile is None:
        if recorded.device is None:
            raise ConfigError("the recording has no profile of its device: --gpu or --profile gives one")
        hardware = dataclasses.replace(hardware, profile=recorded.device)
    if cell.model is None and cell.dtype is None and recorded.model_shape is not None:
        hardware = dataclasses.replace(hardware, shape=recorded.model_shape)
    return hardware


def _engine_config(cell: Cell, hardware: Hardware, recorded: EngineConfig | None) -> EngineConfig:
    """The configuration of the cell on this hardware; what it does not say is as recorded, else as in the daemon."""
    block_size = cell.block_size or (recorded.block_size if recorded else 16)
    num_blocks = hardware.num_blocks(block_size, cell.kv_cache_memory)
    window = cell.max_model_len or (recorded.max_model_len if recorded else hardware.trained_window)
    base = recorded or EngineConfig(num_blocks=num_blocks, max_model_len=2)
    if recorded is not None:
        # The target was set for the device that was recorded.
        base = dataclasses.replace(
            base, control=dataclasses.replace(base.control, tpot_target_ns=None, objective="delay")
        )
    if cell.max_model_len is None:
        window = min(window, num_blocks * block_size)
    return dataclasses.replace(
        base, num_blocks=num_blocks, block_size=block_size, max_model_len=window, **_engine_options(cell, base.control)
    )


def _recorded_header(cell: Cell, header: Header) -> Header:
    """The header of a recording with the options of the cell."""
    if header.device is None or header.model_shape is None:
        raise ConfigError("the recording has no profile of its device: --gpu or --profile gives one")
    if cell.dtype is not None:
        raise ConfigError("--dtype needs --model: the recording has the sizes of its model only")
    config = header.config
    block_size, num_blocks = cell.block_size or config.block_size, config.num_blocks
    if cell.kv_cache_memory is not None:
        num_blocks = cell.kv_cache_memory // (header.model_shape.kv_bytes_per_token * block_size)
    elif block_size != config.block_size:
        num_blocks = config.num_blocks * config.block_size // block_size
    changes: dict[str, Any] = _engine_options(cell, config.control)
    if cell.max_model_len is not None:
        changes["max_model_len"] = cell.max_model_len
    changed = dataclasses.replace(config, num_blocks=num_blocks, block_size=block_size, **changes)
    return dataclasses.replace(header, config=changed, executor="simulated")


def _with_adapters(cell: Cell, header: Header, workload: Workload) -> Header:
    """The header with the adapters that the programs name: those of the recording, if there is one and nothing is said
    of their size, else made up.

    Raises ConfigError for options about adapters without any.
    """
    names = sorted({program.adapter for program in workload.programs if program.adapter is not None})
    if not names:
        for name in ("max_loras", "lora_rank"):
            if getattr(cell, name) is not None:
                raise ConfigError(f"{flag(name)}: no program of {cell.workload} names an adapter")
        return header
    assert header.device is not None
    lora = header.config.lora
    if lora is not None and cell.model is None and cell.dtype is None and cell.lora_rank is None:
        is_same_device = cell.gpu is None and cell.profile is None
        lora = recorded_lora(lora, cell.max_loras, None if is_same_device else header.device.name)
    else:
        lora = _made_up_adapters(cell, header, names)
    return dataclasses.replace(header, config=dataclasses.replace(header.config, lora=lora))


def _made_up_adapters(cell: Cell, header: Header, names: Collection[str]) -> LoraConfig | None:
    model = resolve_model(header.model).config
    if model is None:
        raise ConfigError(f"the shape of {header.model} is not known, so its adapters have no size")
    assert header.device is not None
    return simulated_lora(
        names,
        model,
        rank=cell.lora_rank or _LORA_RANK,
        max_loras=cell.max_loras or _MAX_LORAS,
        element_size=_ELEMENT_SIZES[cell.dtype or "bfloat16"],
        profile_name=header.device.name,
    )


def _with_tiers(cell: Cell, header: Header) -> tuple[Header, tuple[str, ...]]:
    """The header with the tiers of the cell, and notes about their links. Raises ConfigError for a link to nothing."""
    for size, link in (("kv_offloading_size", "host_link_gb_per_s"), ("cxl_size", "cxl_link_gb_per_s")):
        if getattr(cell, link) is not None and getattr(cell, size) is None:
            raise ConfigError(f"{flag(link)} needs {flag(size)}")
    says_sizes = cell.kv_offloading_size is not None or cell.cxl_size is not None
    if cell.kv_write_back is not None and not says_sizes:
        raise ConfigError("--kv-write-back needs --kv-offloading-size or --cxl-size")
    assert header.device is not None and header.model_shape is not None
    block_bytes = header.model_shape.kv_bytes_per_token * header.config.block_size
    sizes = TierSizes(
        cell.kv_offloading_size,
        cell.cxl_size,
        cell.host_link_gb_per_s and cell.host_link_gb_per_s * 1e9,
        cell.cxl_link_gb_per_s and cell.cxl_link_gb_per_s * 1e9,
        cell.kv_write_back,
    )
    tiering, notes = make_tiering(sizes, header.device.name, block_bytes)
    recorded = header.config.tiering
    if not says_sizes and recorded is not None:
        if recorded.block_bytes != block_bytes:
            raise ConfigError("the recorded tiers are for other blocks: say --kv-offloading-size (0: none)")
        tiering = recorded
    return dataclasses.replace(header, config=dataclasses.replace(header.config, tiering=tiering)), notes


def _engine_options(cell: Cell, control: ControlConfig) -> dict[str, Any]:
    """What the cell says of the engine, as fields of EngineConfig."""
    changes: dict[str, Any] = {}
    if cell.controller is not None:
        changes["controller"] = cell.controller
    if cell.slots is not None:
        changes["slots"] = cell.slots
    if cell.tpot_target_ms is not None:
        changes["tpot_target_ns"] = nanoseconds(cell.tpot_target_ms)
        changes["objective"] = "rate"
    options = {name: getattr(cell, name) for name in _ENGINE if getattr(cell, name) is not None}
    if cell.time_slice_ms is not None:
        options["time_slice_ns"] = nanoseconds(cell.time_slice_ms)
    return {**options, "control": dataclasses.replace(control, **changes)}


def _check_control(cell: Cell, config: EngineConfig) -> None:
    for name in _CONTROL:
        if getattr(cell, name) is not None and config.scheduler != "lanes":
            raise ConfigError(f"{flag(name)} needs --scheduler lanes: {config.scheduler} has no controller")


def _check_plugins(cell: Cell, config: EngineConfig) -> None:
    """Raises ConfigError for a plug-in that only a recording names: reading a file must not run code that it names."""
    for name in ("policy", "order", "admission", "speculate"):
        value = getattr(config, name)
        if is_plugin(value) and getattr(cell, name) != value:
            raise ConfigError(f"it was recorded with the plug-in {value}: {flag(name)} {value} uses it, or another one")


def _notes(workload: Workload, header: Header) -> tuple[str, ...]:
    notes = list(workload.notes)
    window = header.config.max_model_len
    num_long = sum(program.num_context_tokens > window for program in workload.programs)
    if num_long:
        notes.append(
            f"{num_long} of {len(workload.programs)} programs need more than the window of {window} tokens: calls that "
            "do not fit fail, as in the daemon (--max-model-len widens it)"
        )
    return tuple(notes)


# ---- runs ----


def run_plan(plan: Plan, on_turn: Callable[[], None] = lambda: None) -> Result:
    """Simulates a plan. The same plan gives the same result, in any process. Raises EngineError if the engine stops."""
    cell = plan.cell
    router = build_router(cell.router, overload=plan.overload, overload_calls=plan.overload_calls)
    instances = [build_instance(plan.header) for _ in range(cell.instances)]
    cluster = Cluster(instances, router, plan.link)
    run = simulate(plan.workload, cluster, max_batches=_MAX_BATCHES, on_turn=on_turn)
    return result_of(plan, run, cluster.counts)
