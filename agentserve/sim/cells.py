"""What one simulation is asked for, as options of the command line, and the cross product of lists of them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from agentserve.config import (
    ADMISSION_POLICIES,
    CONTROLLERS,
    ORDER_POLICIES,
    RETENTION_POLICIES,
    SCHEDULERS,
    SLOTS,
    SPECULATION_POLICIES,
    WRITE_BACKS,
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
from agentserve.errors import ConfigError
from agentserve.sim.router import OVERLOADS, ROUTERS
from agentserve.sim.specs import split_list


def _option(
    parse: Callable[[str], Any], section: str, help_text: str, default: Any = None, *, is_list: bool = True
) -> Any:
    """`is_list`: whether commas separate values, each of which is simulated."""
    return field(default=default, metadata={"parse": parse, "section": section, "help": help_text, "is_list": is_list})


@dataclass(frozen=True, slots=True)
class Cell:
    """The options of one simulation. None: what the recording says, else what the daemon or the workload does."""

    workload: str = _option(
        str,
        "workload",
        "a name, with options as in react:agents=4,scale=0.3, or a file: programs or a recording",
        "react",
    )
    format: str | None = _option(str, "workload", "format of a file of programs (default: its content tells)")
    agents: int | None = _option(positive_int, "workload", "programs that run at once")
    programs: int | None = _option(positive_int, "workload", "number of programs of a named workload")
    scale: float | None = _option(positive_float, "workload", "factor on the prompt lengths of a named workload")
    rate: float | None = _option(positive_float, "workload", "programs a second, Poisson, instead of a closed loop")
    tools: str | None = _option(str, "workload", "profile of tool times that replaces those of the workload")
    tool_allow: tuple[tuple[str, tuple[str, ...]], ...] | None = _option(
        allow_rules,
        "workload",
        "AGENT=TOOL,TOOL: the only tools that an agent may call, as in `serve`; may be repeated, and is no list: all "
        "rules hold in all simulations. A program ends with a call that is stopped",
        is_list=False,
    )
    seed: int = _option(non_negative_int, "workload", "of the workload, its prompts and tool times", 0)
    gpu: str | None = _option(str, "device", "GPU whose timing is simulated (default: rtx-5090)")
    profile: str | None = _option(str, "device", "profile written by `agentserve profile`, instead of --gpu")
    model: str | None = _option(str, "device", "model that is served (default: qwen2.5-7b)")
    dtype: str | None = _option(
        choice("bfloat16", "float16", "float32"), "device", "data type of weights and KV (default: bfloat16)"
    )
    kv_cache_memory: int | None = _option(size_bytes, "device", "memory for the KV cache of each instance")
    block_size: int | None = _option(positive_int, "device", "tokens in a KV block (default: 16)")
    max_model_len: int | None = _option(positive_int, "device", "window in tokens (default: the model's, if it fits)")
    max_loras: int | None = _option(
        positive_int, "device", "LoRA adapters that are on the device at once (default: 8); programs name them"
    )
    lora_rank: int | None = _option(positive_int, "device", "rank of the LoRA adapters (default: 16)")
    kv_offloading_size: float | None = _option(
        non_negative_float, "device", "GiB of host memory below the KV cache of each instance (default: none)"
    )
    cxl_size: float | None = _option(
        non_negative_float, "device", "GiB of CXL memory below the KV cache and host memory (default: none)"
    )
    host_link_gb_per_s: float | None = _option(
        positive_float, "device", "gigabytes a second to host memory, each way (default: the card's PCI Express)"
    )
    cxl_link_gb_per_s: float | None = _option(
        positive_float, "device", "gigabytes a second to CXL memory, each way (default: 25)"
    )
    kv_write_back: str | None = _option(
        choice(*WRITE_BACKS),
        "device",
        "when blocks are copied to lower tiers: incremental, before they have to leave (default), or on_evict",
    )
    instances: int = _option(positive_int, "instances", "engines behind the router, each on a device of its own", 1)
    router: str = _option(choice(*ROUTERS), "instances", "which instance gets a call", "session_affinity")
    overload: str | None = _option(
        choice(*OVERLOADS),
        "instances",
        "session_affinity: what to do when a session's home is overloaded (default: wait)",
    )
    overload_calls: int | None = _option(
        positive_int, "instances", "session_affinity: calls in flight that are an overload (default: --max-num-seqs)"
    )
    link_gb_per_s: float | None = _option(
        positive_float, "instances", "move: gigabytes a second between instances (default: 12)"
    )
    scheduler: str | None = _option(choice(*SCHEDULERS), "engine", "as in `serve` (default: lanes)")
    controller: str | None = _option(choice(*CONTROLLERS), "engine", "as in `serve` (default: predictive)")
    slots: str | None = _option(choice(*SLOTS), "engine", "as in `serve` (default: auto)")
    tpot_target_ms: float | None = _option(
        positive_float, "engine", "target time between tokens (default: twice that of a stream alone)"
    )
    policy: str | None = _option(
        simulatable(RETENTION_POLICIES), "policies", "what stays in the cache (default: lru); belady knows the future"
    )
    order: str | None = _option(
        simulatable(ORDER_POLICIES),
        "policies",
        "which call goes first (default: by arrival, and the shortest prompt); srpt knows the future",
    )
    admission: str | None = _option(
        simulatable(ADMISSION_POLICIES),
        "policies",
        "which calls wait although there is memory for them: none (default), or working_set, those of new programs",
    )
    speculate: str | None = _option(
        simulatable(SPECULATION_POLICIES),
        "policies",
        "what is computed of a next prompt while its tool runs and nobody waits: none (default), next_turn, all that "
        "is missing, or lost_context, what was evicted",
    )
    speculate_tokens: int | None = _option(
        positive_int, "policies", "speculate: tokens between two calls of a session at most (default: 8192)"
    )
    prefetch_distance: float | None = _option(
        non_negative_float, "policies", "invocation_distance: agents nearer than this are loaded early (default: 2)"
    )
    protect_anchors: bool | None = _option(
        boolean, "policies", "keep what several sessions use longer (default: true for all policies but lru)"
    )
    prediction: bool | None = _option(
        boolean, "policies", "transition: rate memory by which agent is likely to come next (default: true)"
    )
    max_num_seqs: int | None = _option(positive_int, "engine", "requests that run at once (default: 16)")
    time_slice_ms: float | None = _option(
        positive_float, "engine", "a request that has run so long gives its place to one that waits (default: never)"
    )
    max_num_batched_tokens: int | None = _option(positive_int, "engine", "tokens in one batch at most (default: 2048)")
    prefill_chunk: int | None = _option(
        positive_int, "engine", "static, reactive: prompt tokens in one batch of the prefill lane (default: 256)"
    )

    def to_json(self) -> dict[str, Any]:
        """All options by name."""
        return dataclasses.asdict(self)


_ANY = "NAME"
"""Any value but `none`."""
_NEEDS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "controller": ("scheduler", "lanes"),
        "slots": ("scheduler", "lanes"),
        "tpot_target_ms": ("scheduler", "lanes"),
        "overload": ("router", "session_affinity"),
        "overload_calls": ("router", "session_affinity"),
        "link_gb_per_s": ("overload", "move"),
        "prefetch_distance": ("policy", "invocation_distance"),
        "prediction": ("policy", "transition"),
        "speculate_tokens": ("speculate", _ANY),
    }
)
"""Options that mean something only beside a value of another one."""


def flag(name: str) -> str:
    """The option as it is typed."""
    return "--" + name.replace("_", "-")


def expand(texts: Mapping[str, str]) -> tuple[Cell, ...]:
    """The cross product of all lists, the last option changing fastest, each combination once.

    Args:
        texts: option name to what was typed: a value, or several with commas between them.

    An option that means nothing beside a value of another one, such as a controller beside a scheduler without one, is
    left out of those combinations. Raises ConfigError that names the option for a wrong value, for a value that occurs
    twice, and for an option that means nothing in any combination.
    """
    values = {
        option.name: _values(option, texts[option.name]) for option in dataclasses.fields(Cell) if option.name in texts
    }
    cells = [Cell(**dict(zip(values, combination, strict=True))) for combination in itertools.product(*values.values())]
    kept = tuple(dict.fromkeys(_without_idle(cell) for cell in cells))
    for name in values:
        if name in _NEEDS and all(getattr(cell, name) is None for cell in kept):
            other, value = _NEEDS[name]
            raise ConfigError(f"{flag(name)} needs {flag(other)} {value}")
    return kept


def varying(cells: Sequence[Cell]) -> tuple[str, ...]:
    """Names of the options in which the cells differ, in the order of the options."""
    return tuple(
        option.name for option in dataclasses.fields(Cell) if len({getattr(cell, option.name) for cell in cells}) > 1
    )


def _values(option: dataclasses.Field[Any], text: str) -> list[Any]:
    values = []
    for item in split_list(text) if option.metadata["is_list"] else [text]:
        try:
            values.append(option.metadata["parse"](item.strip()))
        except ConfigError as error:
            raise ConfigError(f"{flag(option.name)}: {error}") from None
        if not item.strip():
            raise ConfigError(f"{flag(option.name)}: there is an empty value in {text!r}")
    if len(set(values)) < len(values):
        raise ConfigError(f"{flag(option.name)}: a value occurs twice in {text!r}")
    return values


def _without_idle(cell: Cell) -> Cell:
    for name, (other, value) in _NEEDS.items():
        found = getattr(cell, other)
        # The scheduler may come from a recording: whether it has a controller is seen when that is read.
        is_there = found not in (None, "none") if value == _ANY else found == value
        if not is_there and not (other == "scheduler" and found is None):
            changes: dict[str, Any] = {name: None}
            cell = dataclasses.replace(cell, **changes)
    # The one policy with an order of its own.
    return dataclasses.replace(cell, order=None) if cell.policy == "continuum" else cell
