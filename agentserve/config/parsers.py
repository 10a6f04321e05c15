"""Values of options, from their text. Each parser raises ConfigError that says what was expected."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from agentserve.config.names import ORACLES, is_plugin
from agentserve.errors import ConfigError


def positive_int(text: str) -> int:
    value = _int(text)
    if value < 1:
        raise ConfigError(f"must be a positive number, not {text!r}")
    return value


def port_number(text: str) -> int:
    value = _int(text)
    if not 0 <= value <= 65535:
        raise ConfigError(f"must be a port from 0 to 65535, not {text!r}")
    return value


def non_negative_int(text: str) -> int:
    value = _int(text)
    if value < 0:
        raise ConfigError(f"must not be negative, but is {text!r}")
    return value


def positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ConfigError(f"must be a number, not {text!r}") from None
    if not 0.0 < value < float("inf"):
        raise ConfigError(f"must be a positive number, not {text!r}")
    return value


def non_negative_float(text: str) -> float:
    return 0.0 if text.strip() in {"0", "0.0"} else positive_float(text)


def share(text: str) -> float:
    value = positive_float(text)
    if value >= 1.0:
        raise ConfigError(f"must lie between 0 and 1, not {text!r}")
    return value


def boolean(text: str) -> bool:
    lowered = text.strip().lower()
    if lowered in {"1", "true", "yes", "on"}:
        return True
    if lowered in {"0", "false", "no", "off"}:
        return False
    raise ConfigError(f"must be true or false, not {text!r}")


def names(text: str) -> tuple[str, ...]:
    """A list separated by commas."""
    return tuple(part for part in (piece.strip() for piece in text.split(",")) if part)


def patterns(text: str) -> tuple[str, ...]:
    """A list separated by line breaks: a regular expression may have commas."""
    return tuple(line for line in text.split("\n") if line)


def allow_rules(text: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """`AGENT=TOOL,TOOL`, one a line."""
    rules = []
    for line in patterns(text):
        agent, equals, tools = line.partition("=")
        if not equals or not agent.strip():
            raise ConfigError(f"must be AGENT=TOOL,TOOL or *=TOOL,TOOL for every agent, not {line!r}")
        rules.append((agent.strip(), names(tools)))
    return tuple(rules)


def plugin(text: str) -> str:
    """`module:Class`, or the name of an entry point."""
    if not is_plugin(text):
        raise ConfigError(f"must be module:Class of a plug-in, or the name under which it is registered, not {text!r}")
    return text


SEPARATORS: Mapping[Callable[[str], Any], str] = {names: ",", patterns: "\n", allow_rules: "\n"}
"""Of the values of options that may be repeated, by their parser."""
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)


def size_bytes(text: str) -> int:
    """`2GiB`, `512M`, `1.5g` or plain bytes; K, M, G and T are powers of 1024."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"must be a size such as 2GiB or 512MiB, not {text!r}")
    value = int(float(match[1]) * 1024 ** " kmgt".index(match[2].lower() or " "))
    if value < 1:
        raise ConfigError(f"must be a positive size, not {text!r}")
    return value


def choice(*allowed: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in allowed:
            raise ConfigError(f"must be one of {', '.join(allowed)}, not {text!r}")
        return text

    return parse


def without_oracles(policies: tuple[str, ...]) -> tuple[str, ...]:
    """Those that need not know the future."""
    return tuple(name for name in policies if name not in ORACLES)


def servable(policies: tuple[str, ...]) -> Callable[[str], str]:
    """One of `policies`, but no oracle: outside the simulator nobody knows the future."""

    def parse(text: str) -> str:
        if text in policies and text in ORACLES:
            raise ConfigError(f"{text} knows the future: only `agentserve simulate` can run it")
        return simulatable(without_oracles(policies))(text)

    return parse


def simulatable(policies: tuple[str, ...]) -> Callable[[str], str]:
    """One of `policies`, or a plug-in."""

    def parse(text: str) -> str:
        if text not in policies and not is_plugin(text):
            raise ConfigError(f"must be one of {', '.join(policies)}, or module:Class of a plug-in, not {text!r}")
        return text

    return parse


def _int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"must be a whole number, not {text!r}") from None
