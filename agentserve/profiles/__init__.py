"""Shipped device profiles, one JSON file each; `provenance` says whether the numbers were measured."""

from __future__ import annotations

import difflib
import json
from importlib import resources

from agentserve.core.costmodel import DeviceProfile
from agentserve.errors import ConfigError


def available_profiles() -> tuple[str, ...]:
    """Names of the shipped profiles, sorted."""
    files = resources.files(__package__).iterdir()
    return tuple(sorted(file.name.removesuffix(".json") for file in files if file.name.endswith(".json")))


def load_profile(name: str) -> DeviceProfile:
    """Loads a shipped profile. Raises ConfigError that lists the names if there is none of this one."""
    wanted = name.strip().lower().replace("_", "-").replace(" ", "-")
    known = available_profiles()
    if wanted not in known:
        close = difflib.get_close_matches(wanted, known, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ConfigError(f"no profile of a GPU named {name!r}{hint}; there are {', '.join(known)}")
    fields = json.loads((resources.files(__package__) / f"{wanted}.json").read_text(encoding="utf-8"))
    fields["bandwidth_bytes_per_s"] *= fields.pop("bandwidth_efficiency")
    fields["flops_per_s"] *= fields.pop("flops_efficiency")
    return DeviceProfile(**fields)
