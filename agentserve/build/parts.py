"""The parts of an engine that depend on the kind of executor: executor, text side, shape and profile."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from agentserve.build.adapters import lora_config, read_adapters, slot_bytes
from agentserve.build.tiers import check_tiers, disk_options, measured_tiering, tier_notes
from agentserve.config import LoraConfig, ServeConfig, TieringConfig
from agentserve.core.costmodel import CostModel, DeviceProfile, ModelShape
from agentserve.core.executor import Capabilities, Executor
from agentserve.core.transfers import TierContents
from agentserve.errors import ConfigError, ModelError
from agentserve.executors.pytorch.devices.cuda_driver import driver_library
from agentserve.executors.simulated.constrained import ConstrainedTokens
from agentserve.executors.simulated.executor import SimulatedExecutor
from agentserve.executors.simulated.scripted import ScriptedExecutor
from agentserve.models.config import ModelConfig
from agentserve.models.registry import ModelSource, resolve_model
from agentserve.profiles import load_profile
from agentserve.profiles.links import TierSizes, make_tiering
from agentserve.runtime.live import MonotonicClock
from agentserve.runtime.script import Script, read_script
from agentserve.text.chat import ChatTemplate, load_chat_template
from agentserve.text.grammar.compiler import GrammarCompiler
from agentserve.text.grammar.masks import GrammarMasks
from agentserve.text.output import OutputFormat, choose_output_format
from agentserve.text.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from agentserve.executors.pytorch.executor import TorchExecutor
    from agentserve.models.interface import DecoderModel

logger = logging.getLogger(__name__)

CPU_DEFAULT_MODEL = "smollm2-135m"
CUDA_DEFAULT_MODELS = ("qwen2.5-7b", "llama-3-8b", "qwen2.5-3b", "smollm2-135m")
"""Without `--model` the first of them whose weights are here and fit."""
SIMULATED_DEFAULT_MODEL = "qwen2.5-7b"
_CPU_KV_SHARE, _CPU_KV_LIMIT = 0.25, 4 << 30
_CPU_WEIGHT_SHARE = 0.5
"""A model whose weights need more than this share of the free memory is not loaded on the CPU by `auto`."""
_CPU_MAX_MODEL_LEN = 8192
"""The default window on the CPU: longer prompts take minutes there. --max-model-len overrides it."""

_SIMULATED_TEXT = (
    " The scheduler reads the next prompt in small pieces while the other agents keep writing. Each piece ends at a "
    "boundary, so no stream waits for long. What was read once stays in the cache and is found again in the next turn. "
    "This sentence was made up by the simulated executor, which knows how long a step takes but not what to say."
)


@dataclass(frozen=True, slots=True)
class TextSide:
    """The text side of a model."""

    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    output: OutputFormat
    """How the model writes tool calls and reasoning."""
    grammars: GrammarCompiler
    masks: GrammarMasks
    """Which tokens requests with a grammar may produce: the executor asks it, and the client tells it."""
    notes: tuple[str, ...] = ()

    def close(self) -> None:
        """Ends the threads that compile grammars and compute masks; nobody may be asking for either any more."""
        self.masks.shutdown()
        self.grammars.close()


@dataclass(frozen=True, slots=True)
class Parts:
    """What depends on the kind of executor."""

    executor: Executor
    model_config: ModelConfig
    text: TextSide
    model_shape: ModelShape
    dtype: str
    """Of weights and KV, as torch names it."""
    profile: DeviceProfile | None
    """None: the device has to be measured."""
    sheet: DeviceProfile | None = None
    """Where a fit of the device starts; None for orders of magnitude."""
    notes: tuple[str, ...] = ()
    script: Script | None = None
    """What answers, if it is no model."""
    lora: LoraConfig | None = None
    """The adapters that requests may name."""
    tiering: TieringConfig | None = None
    """Where KV blocks go that leave the device."""
    tier_contents: tuple[TierContents, ...] = ()
    """What is there already."""

    def close(self) -> None:
        """Closes the executor, which asks for masks, and then the text side."""
        self.executor.close()
        self.text.close()


def build_parts(config: ServeConfig, report: Callable[[str], None]) -> tuple[str, Parts]:
    """The model's name and its parts.

    Raises ConfigError or ModelError, each with one clear sentence.
    """
    source, kind, notes = choose(config)
    check_tiers(config, kind)
    build = {"cpu": _build_cpu, "cuda": _build_cuda, "simulated": _build_simulated}[kind]
    parts = build(config, source, report)
    return source.name, replace(parts, notes=(*notes, *parts.notes))


# ---- which executor ----


def choose(config: ServeConfig) -> tuple[ModelSource, str, tuple[str, ...]]:
    """The model, `cuda`, `cpu` or `simulated`, and why if the user did not ask for it."""
    if config.script is not None:
        if config.executor not in {"auto", "simulated"}:
            raise ConfigError(f"--script needs --executor simulated, not {config.executor}")
        return resolve_model(config.model or SIMULATED_DEFAULT_MODEL), "simulated", ()
    if config.executor in {"auto", "cuda"}:
        for name in (config.model,) if config.model else CUDA_DEFAULT_MODELS:
            source = resolve_model(name)
            gpu = _gpu_obstacle(config, source)
            if gpu is None:
                return source, "cuda", ()
        if config.executor == "cuda":
            raise ConfigError(f"cannot serve {source.name} on the GPU: {gpu}")
    if config.slots == "green" and config.executor != "simulated":
        raise ConfigError("--slots green needs a GPU; on a CPU, slots are sets of cores: --slots auto")
    if config.executor == "simulated":
        return resolve_model(config.model or SIMULATED_DEFAULT_MODEL), "simulated", ()
    source = resolve_model(config.model or CPU_DEFAULT_MODEL)
    obstacle = _cpu_obstacle(config, source)
    if obstacle is None:
        return source, "cpu", ()
    if config.executor == "cpu":
        raise ConfigError(f"cannot serve {source.name} on the CPU: {obstacle}")
    if config.model is None:
        source = resolve_model(SIMULATED_DEFAULT_MODEL)
        obstacle += f"; no model was named, so {source.name} is simulated"
    if source.config is None:
        raise ConfigError(f"cannot serve {source.name} on the CPU: {obstacle}")
    return source, "simulated", (f"timing is simulated because {obstacle}",)


def _gpu_obstacle(config: ServeConfig, source: ModelSource) -> str | None:
    """Why no GPU can serve this model, or None if one can."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed (pip install 'agentserve[cuda]')"
    if driver_library() is None:
        return "there is no NVIDIA driver"
    from agentserve.build.cuda import gpu_obstacle

    return gpu_obstacle(config, source)


def _cpu_obstacle(config: ServeConfig, source: ModelSource) -> str | None:
    """Why the CPU cannot really serve this model, or None if it can."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed (pip install 'agentserve[cpu]')"
    if config.load_format != "dummy" and source.path is None:
        return f"no weights of {source.name} were found on this machine"
    if source.config is None:
        return None  # the loader says what is wrong with the files
    weight_bytes = source.config.num_parameters * 4
    free_bytes = psutil.virtual_memory().available
    if config.executor == "auto" and weight_bytes > free_bytes * _CPU_WEIGHT_SHARE:
        return (
            f"{source.name} needs {weight_bytes / 2**30:.1f} GiB for float32 weights and only "
            f"{free_bytes / 2**30:.1f} GiB of memory are free"
        )
    return None


def window(config: ServeConfig, model_config: ModelConfig, capabilities: Capabilities) -> int:
    """The run-time context window: what was asked for, or what model, device and cache allow."""
    trained = model_config.max_position_embeddings
    if config.max_model_len is not None:
        # A script knows no positions: it can pretend to any window.
        if config.max_model_len > trained and config.script is None:
            raise ConfigError(f"--max-model-len {config.max_model_len} exceeds the {trained} tokens of the model")
        return config.max_model_len
    limit = trained if capabilities.simulated else min(trained, _CPU_MAX_MODEL_LEN)
    return min(limit, capabilities.num_blocks * capabilities.block_size)


def _num_blocks(pool_bytes: int, block_bytes: int) -> int:
    if pool_bytes < block_bytes:
        raise ConfigError(
            f"the KV cache needs at least {block_bytes} bytes for one block, but --kv-cache-memory is {pool_bytes}"
        )
    return pool_bytes // block_bytes


# ---- the CPU ----


def _build_cpu(config: ServeConfig, source: ModelSource, report: Callable[[str], None]) -> Parts:
    from agentserve.executors.pytorch.devices.cpu import CpuDevice
    from agentserve.executors.pytorch.executor import TorchExecutor, kv_bytes_per_block
    from agentserve.executors.pytorch.lora import make_store
    from agentserve.models.loader import load_model

    # First what can be refused: loading a model takes a while.
    profile = load_profile(config.profile) if config.profile is not None else None
    adapters = read_adapters(config, source)
    model: DecoderModel = load_model(
        source, dtype=config.dtype, load_format=config.load_format, seed=config.seed, report=report
    )
    text = _text_side(config, source, report)
    block_bytes = kv_bytes_per_block(model.config, model.dtype, config.block_size)
    pool_bytes = config.kv_cache_memory
    if pool_bytes is None:
        pool_bytes = min(_CPU_KV_LIMIT, int(psutil.virtual_memory().available * _CPU_KV_SHARE))
    device = CpuDevice()
    tiering = measured_tiering(config, device, block_bytes)
    executor = TorchExecutor(
        model,
        device,
        num_blocks=_num_blocks(pool_bytes, block_bytes),
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        clock=MonotonicClock(),
        token_masks=text.masks,
        attention=config.attention_backend,
        lora=make_store(model, adapters, device, max_slots=config.max_loras, max_rank=config.max_lora_rank),
        tiering=tiering,
        disk=disk_options(config, source),
    )
    report(executor.attention.reason)
    dtype = str(model.dtype).removeprefix("torch.")
    shape = model_shape(model.config, model.dtype.itemsize)
    lora = lora_config(adapters, model.config, config.max_loras, "")
    parts = Parts(executor, model.config, text, shape, dtype, profile, lora=lora)
    return _with_tiers(parts, executor)


# ---- a GPU ----


def _build_cuda(config: ServeConfig, source: ModelSource, report: Callable[[str], None]) -> Parts:
    from agentserve.build.cuda import build_cuda_executor

    # First what can be refused: loading a model takes a while.
    profile = load_profile(config.profile) if config.profile is not None else None
    text = _text_side(config, source, report)
    adapters = read_adapters(config, source)
    executor, model, sheet = build_cuda_executor(config, source, report, text.masks, adapters)
    dtype = str(model.dtype).removeprefix("torch.")
    shape = model_shape(model.config, model.dtype.itemsize)
    lora = lora_config(adapters, model.config, config.max_loras, "" if profile is None else profile.name)
    parts = Parts(executor, model.config, text, shape, dtype, profile, sheet, lora=lora)
    return _with_tiers(parts, executor)


def _with_tiers(parts: Parts, executor: TorchExecutor) -> Parts:
    contents = executor.tier_contents
    notes = tier_notes(executor.tiering, sum(len(tier.blocks) for tier in contents))
    return replace(parts, tiering=executor.tiering, tier_contents=contents, notes=(*parts.notes, *notes))


# ---- simulated timing ----


def _build_simulated(config: ServeConfig, source: ModelSource, report: Callable[[str], None]) -> Parts:
    if source.config is None:
        raise ConfigError(f"the shape of {source.name} is not known, so its timing cannot be simulated")
    if config.attention_backend != "auto":
        raise ConfigError(f"--attention-backend {config.attention_backend}: simulated timing computes no attention")
    profile = load_profile(config.profile or config.gpu)
    dtype = "bfloat16" if config.dtype == "auto" else config.dtype
    shape = model_shape(source.config, 4 if dtype == "float32" else 2)
    pool_bytes = (
        config.kv_cache_memory or int(profile.memory_bytes * config.gpu_memory_utilization) - shape.weight_bytes
    )
    lora = lora_config(read_adapters(config, source), source.config, config.max_loras, profile.name)
    if lora is not None and config.kv_cache_memory is None:
        pool_bytes -= slot_bytes(source.config, config.max_lora_rank, lora.max_resident, 4 if dtype == "float32" else 2)
    if pool_bytes <= 0:
        raise ConfigError(
            f"{source.name} ({shape.weight_bytes / 2**30:.1f} GiB of weights) does not fit a {profile.description} "
            f"with {profile.memory_bytes / 2**30:.0f} GiB"
        )
    text = _text_side(config, source, report)
    options: dict[str, Any] = {
        "num_blocks": _num_blocks(pool_bytes, shape.kv_bytes_per_token * config.block_size),
        "block_size": config.block_size,
        "vocabulary": text.tokenizer.encode(_SIMULATED_TEXT),
        "constrained": ConstrainedTokens(text.masks, _closing_tokens(text.tokenizer)),
    }
    tiering, link_notes = tiering_of(config, profile, shape)
    options["tiering"] = tiering
    options["lora"] = lora
    cost_model = CostModel(profile, shape)
    notes = [f"timing of {profile.description} is {profile.provenance}", *link_notes]
    script = None
    if config.script is None:
        executor = SimulatedExecutor(cost_model, **options)
    else:
        script = Script(read_script(Path(config.script)), text.tokenizer)
        executor = ScriptedExecutor(cost_model, next_token=script.next_token, **options)
        notes.insert(0, f"SCRIPTED: every answer is a line of {config.script}")
    parts = Parts(executor, source.config, text, shape, dtype, profile, notes=tuple(notes), script=script, lora=lora)
    return replace(parts, tiering=tiering)


def tiering_of(
    config: ServeConfig, profile: DeviceProfile | None, shape: ModelShape
) -> tuple[TieringConfig | None, tuple[str, ...]]:
    """The simulated tiers below the device's pool that the options ask for, and a note about each link."""
    sizes = TierSizes(host_gib=config.kv_offloading_size, disk_gib=config.kv_disk_size, write_back=config.kv_write_back)
    return make_tiering(sizes, "" if profile is None else profile.name, shape.kv_bytes_per_token * config.block_size)


def model_shape(config: ModelConfig, element_size: int = 2) -> ModelShape:
    """What the cost model needs of a model whose weights and KV have `element_size` bytes an element."""
    head = config.vocab_size * config.hidden_size
    embeddings = head * (1 if config.tie_word_embeddings else 2)
    return ModelShape(
        num_linear_parameters=config.num_parameters - embeddings,
        num_head_parameters=head,
        # The embedding table is looked up, not read, unless it is the head as well.
        weight_bytes=(config.num_parameters - embeddings + head) * element_size,
        kv_bytes_per_token=config.kv_bytes_per_token(element_size),
        # Query times key and weight times value: two multiply-adds of head_dim each.
        attention_flops_per_pair=4 * config.num_layers * config.num_heads * config.head_dim,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
    )


_CLOSING = ('"', "}", "]", '"}', ")", "</", ">", "\n", ",", ":")
"""What brings a made-up text to an end that follows a grammar, the best first."""


def _closing_tokens(tokenizer: Tokenizer) -> list[int]:
    return [token_ids[0] for text in _CLOSING if len(token_ids := tokenizer.encode(text)) == 1]


def _text_side(config: ServeConfig, source: ModelSource, report: Callable[[str], None]) -> TextSide:
    """Tokenizer and template of the model; for one without files a stand-in, and a note that says so."""
    if source.path is not None:
        report(f"loading the tokenizer of {source.name}")
        tokenizer = load_tokenizer(source)
        return _put_together(config, tokenizer, load_chat_template(source, tokenizer))
    try:
        stand_in = resolve_model(CPU_DEFAULT_MODEL)
        if stand_in.path is not None:
            tokenizer = load_tokenizer(stand_in)
            note = f"there is no tokenizer of {source.name} here: that of {stand_in.name} stands in"
            return _put_together(config, tokenizer, load_chat_template(stand_in, tokenizer), note)
    except ModelError as error:
        logger.warning("the tokenizer of %s cannot be used: %s", CPU_DEFAULT_MODEL, error)
    byte_tokenizer = ByteTokenizer()
    note = f"there is no tokenizer of {source.name} here: each byte counts as a token"
    return _put_together(config, byte_tokenizer, load_chat_template(None, byte_tokenizer), note)


def _put_together(
    config: ServeConfig, tokenizer: Tokenizer, chat_template: ChatTemplate | None, *notes: str
) -> TextSide:
    output = choose_output_format(
        None if chat_template is None else chat_template.text,
        tokenizer,
        tool_parser=config.tool_call_parser,
        reasoning_parser=config.reasoning_parser,
    )
    return TextSide(tokenizer, chat_template, output, GrammarCompiler(tokenizer, output), GrammarMasks(), notes)
