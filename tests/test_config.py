"""Options: precedence, sources, and clear errors."""

from __future__ import annotations

import dataclasses

import pytest

from agentserve.config import EngineConfig, ServeConfig, resolve, size_bytes
from agentserve.core.slots import PartitionKind, build_partition_table
from agentserve.errors import ConfigError


def test_precedence_and_sources() -> None:
    resolved = resolve(
        {"port": "1"},
        {"AGENTSERVE_PORT": "2", "AGENTSERVE_HOST": "::1", "PATH": "/bin"},
        {"network": {"port": 3, "host": "localhost", "max-body-size": "1MiB"}, "cache": {"prefix_caching": False}},
        "c.toml",
    )
    config = resolved.config
    assert (config.port, config.host, config.max_body_size, config.prefix_caching) == (1, "::1", 1 << 20, False)
    assert {name: resolved.sources[name] for name in ("port", "host", "max_body_size", "model")} == {
        "port": "--port",
        "host": "AGENTSERVE_HOST",
        "max_body_size": "c.toml: network.max_body_size",
        "model": "default",
    }


def test_lists_and_numbers_from_a_file() -> None:
    resolved = resolve({}, {}, {"model": {"alias": ["a", "b"]}, "network": {"sse_ping_interval": 0.5}})
    assert resolved.config.alias == ("a", "b")
    assert resolved.config.sse_ping_interval == 0.5


def test_rules_about_tools_come_from_everywhere_in_one_form() -> None:
    rules = (("reviewer", ("read_file", "grep")), ("*", ("ls",)), ("mute", ()))
    lines = ["reviewer=read_file, grep", "*=ls", "mute="]
    for given in (
        resolve({"tool_allow": "\n".join(lines)}, {}, {}),
        resolve({}, {"AGENTSERVE_TOOL_ALLOW": "\n".join(lines)}, {}),
        resolve({}, {}, {"safety": {"tool_allow": lines}}),
    ):
        assert given.config.tool_allow == rules


@pytest.mark.parametrize(
    ("cli", "env", "file", "message"),
    [
        ({"tool_allow": "read_file"}, {}, {}, "--tool-allow: must be AGENT=TOOL,TOOL"),
        ({"tool_allow": "=read_file"}, {}, {}, "--tool-allow: must be AGENT=TOOL,TOOL"),
        ({"safety": "nobody"}, {}, {}, "--safety: must be module:Class"),
        ({"admission": "first"}, {}, {}, "--admission: must be one of none, working_set"),
        ({"port": "70000"}, {}, {}, "--port: must be a port"),
        ({"port": "x"}, {}, {}, "--port: must be a whole number"),
        ({"max_model_len": "0"}, {}, {}, "--max-model-len: must be a positive number"),
        ({"max_num_seqs": "-3"}, {}, {}, "--max-num-seqs: must be a positive number"),
        ({"sse_ping_interval": "nan"}, {}, {}, "--sse-ping-interval: must be a positive number"),
        ({"decode_share": "1"}, {}, {}, "--decode-share: must lie between 0 and 1"),
        ({"executor": "tpu"}, {}, {}, "--executor: must be one of auto, cpu, cuda, simulated"),
        ({"kv_cache_memory": "much"}, {}, {}, "--kv-cache-memory: must be a size"),
        ({}, {"AGENTSERVE_PORT": "-1"}, {}, "AGENTSERVE_PORT: must be a port"),
        ({}, {"AGENTSERVE_PROT": "1"}, {}, "AGENTSERVE_PROT is no option"),
        ({}, {}, {"network": {"prot": 1}}, r"\[network\] has no option 'prot'"),
        ({}, {}, {"model": {"port": 1}}, r"\[model\] has no option 'port'"),
        ({}, {}, {"net": {"port": 1}}, r"unknown section \[net\]"),
        ({}, {}, {"port": 1}, r"unknown section \[port\]"),
        ({}, {}, {"network": {"port": {}}}, "network.port must be a string"),
    ],
)
def test_bad_values_name_their_source(
    cli: dict[str, str], env: dict[str, str], file: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(cli, env, file, "c.toml")


@pytest.mark.parametrize(
    ("text", "value"), [("2GiB", 2 << 30), ("512m", 512 << 20), ("1.5K", 1536), ("100", 100), ("3 MB", 3 << 20)]
)
def test_sizes(text: str, value: int) -> None:
    assert size_bytes(text) == value


def test_every_option_has_a_section_and_help() -> None:
    for option in dataclasses.fields(ServeConfig):
        assert option.metadata["help"] and option.metadata["section"], option.name


@pytest.mark.parametrize(
    "values",
    [
        {"num_blocks": 0},
        {"prefill_chunk": 0},
        {"max_model_len": 1},
        {"resume_min_cached_tokens": -1},
        {"scheduler": "random"},
        {"prefill_order": "longest"},
        {"max_num_batched_tokens": 0},
        {"num_blocks": 3, "max_model_len": 64},  # 3 blocks of 16 hold 48 tokens
    ],
)
def test_engine_config_refuses_what_cannot_work(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        EngineConfig(**{"num_blocks": 10, "max_model_len": 64, **values})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("units", "granularity", "min_units"), [(64, 2, 4), (128, 2, 4), (132, 8, 8), (170, 8, 8), (2, 1, 1), (16, 1, 1)]
)
def test_partitions_fit_the_device(units: int, granularity: int, min_units: int) -> None:
    table = build_partition_table(units, granularity, min_units)
    assert (table.whole.decode_units, table.whole.prefill_units) == (units, units)
    assert table.splits and len(table.splits) == len(table.caps)
    for split in table.splits:
        assert split.decode_units % granularity == 0
        assert min(split.decode_units, split.prefill_units) >= min_units
        assert split.decode_units + split.prefill_units == units
    for cap in table.caps:
        assert cap.decode_units == units and cap.prefill_units < units
    assert table.split_nearest(0.5).kind is PartitionKind.SPLIT


def test_a_single_core_cannot_be_split() -> None:
    table = build_partition_table(1, 1, 1)
    assert table.splits == ()
    assert table.split_nearest(0.5) is table.stream
    with pytest.raises(ConfigError):
        build_partition_table(4, 1, 8)
