"""Four sources of one table: command line > environment > TOML file > default."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agentserve.config.serve import ServeConfig
from agentserve.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Resolved:
    """A configuration and where each of its values came from."""

    config: ServeConfig
    sources: Mapping[str, str]


def env_name(option: str) -> str:
    return "AGENTSERVE_" + option.upper()


def resolve(
    cli: Mapping[str, str], env: Mapping[str, str], file: Mapping[str, Any], file_name: str = "file"
) -> Resolved:
    """Merges the sources.

    Args:
        cli: option name to text, only those that were given.
        env: the process environment; `AGENTSERVE_*` variables that are no option are errors.
        file: parsed TOML: one table a section, keys as the command line spells them.
        file_name: for error messages.

    Raises ConfigError that names the option and its source.
    """
    options = {f.name: f for f in dataclasses.fields(ServeConfig)}
    from_file = _flatten(file, options, file_name)
    known = {env_name(name) for name in options} | {"AGENTSERVE_CONFIG"}
    for variable in sorted(env):
        if variable.startswith("AGENTSERVE_") and variable not in known:
            raise ConfigError(f"environment variable {variable} is no option of agentserve")
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for name, option in options.items():
        if name in cli:
            text, source = cli[name], "--" + name.replace("_", "-")
        elif env_name(name) in env:
            text, source = env[env_name(name)], env_name(name)
        elif name in from_file:
            text, source = from_file[name], f"{file_name}: {option.metadata['section']}.{name}"
        else:
            sources[name] = "default"
            continue
        try:
            values[name] = option.metadata["parse"](text)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None
        sources[name] = source
    return Resolved(ServeConfig(**values), sources)


def _flatten(file: Mapping[str, Any], options: Mapping[str, dataclasses.Field[Any]], file_name: str) -> dict[str, str]:
    flat: dict[str, str] = {}
    sections = sorted({option.metadata["section"] for option in options.values()})
    for section, table in file.items():
        if section not in sections or not isinstance(table, Mapping):
            raise ConfigError(f"{file_name}: unknown section [{section}]; there are {', '.join(sections)}")
        for key, value in table.items():
            name = key.replace("-", "_")
            if name not in options or options[name].metadata["section"] != section:
                raise ConfigError(f"{file_name}: [{section}] has no option {key!r}")
            if isinstance(value, list):
                separator = options[name].metadata["separator"] or ","
                flat[name] = separator.join(str(item) for item in value)
            elif isinstance(value, bool):
                flat[name] = "true" if value else "false"
            elif isinstance(value, (str, int, float)):
                flat[name] = str(value)
            else:
                raise ConfigError(f"{file_name}: {section}.{key} must be a string, a number, a boolean or a list")
    return flat
