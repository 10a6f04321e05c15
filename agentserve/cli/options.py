"""Command-line options, environment and file of `agentserve serve` and verbs that share some of its options.

They are derived from the table in `agentserve.config`.
"""

from __future__ import annotations

import argparse
import dataclasses
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from agentserve.config import Resolved, ServeConfig, boolean, env_name, resolve
from agentserve.errors import ConfigError


def add_options(parser: argparse.ArgumentParser, only: Collection[str] | None = None) -> None:
    """Adds the options of `ServeConfig`, grouped by section, and `--config`. `only`: their names, if not all."""
    parser.add_argument("model_argument", nargs="?", metavar="MODEL", help="the same as --model")
    parser.add_argument("--config", metavar="FILE", help="TOML file with one table a section")
    groups: dict[str, Any] = {}
    for option in dataclasses.fields(ServeConfig):
        if only is not None and option.name not in only:
            continue
        section = option.metadata["section"]
        group = groups.setdefault(section, parser.add_argument_group(section))
        flag = "--" + option.name.replace("_", "-")
        help_text = f"{option.metadata['help']} [{env_name(option.name)}]"
        if option.default not in {None, False, ()}:
            help_text += f" (default: {'on' if option.default is True else option.default})"
        # Values stay text here: every source goes through the same parser in `resolve`.
        if option.metadata["parse"] is boolean:
            group.add_argument(flag, action="store_const", const="true", help=help_text)
            group.add_argument(
                "--no-" + flag[2:], dest=option.name, action="store_const", const="false", help=argparse.SUPPRESS
            )
        elif option.metadata["separator"] is not None:
            group.add_argument(flag, action="append", help=help_text, metavar="X")
        else:
            group.add_argument(flag, *option.metadata["flags"], dest=option.name, help=help_text, metavar="X")


def resolve_options(arguments: argparse.Namespace, env: Mapping[str, str]) -> Resolved:
    """Merges command line, environment and file. Raises ConfigError that names the source of a wrong value."""
    cli: dict[str, str] = {}
    for option in dataclasses.fields(ServeConfig):
        value = getattr(arguments, option.name, None)
        if value is not None:
            separator = option.metadata["separator"] or ","
            cli[option.name] = separator.join(value) if isinstance(value, list) else value
    if arguments.model_argument is not None:
        if "model" in cli and cli["model"] != arguments.model_argument:
            raise ConfigError(f"two models: {arguments.model_argument!r} and --model {cli['model']!r}")
        cli["model"] = arguments.model_argument
    path = _config_path(arguments.config, env)
    return resolve(cli, env, _read_toml(path) if path else {}, str(path))


def _config_path(given: str | None, env: Mapping[str, str]) -> Path | None:
    """The file that was asked for, else the first usual one that exists."""
    asked = given or env.get("AGENTSERVE_CONFIG")
    if asked:
        return Path(asked)
    base = Path(env.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    usual = (base / "agentserve" / "config.toml", Path("/etc/agentserve/config.toml"))
    return next((path for path in usual if path.is_file()), None)


def _read_toml(path: Path) -> Mapping[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
