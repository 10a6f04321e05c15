"""Profiles of devices: shipped ones, files, fits and data sheets. `provenance` says where the numbers come from."""

from __future__ import annotations

import difflib
import json
from importlib import resources
from pathlib import Path

from agentserve.core.costmodel import DeviceProfile
from agentserve.errors import ConfigError
from agentserve.profiles.document import ProfileDocument, ProfileOrigin, parse_document, render_document
from agentserve.profiles.residuals import Residual

__all__ = [
    "ProfileDocument",
    "ProfileOrigin",
    "available_profiles",
    "load_document",
    "load_profile",
    "save_profile",
]


def available_profiles() -> tuple[str, ...]:
    """Names of the shipped profiles, sorted."""
    files = resources.files(__package__).iterdir()
    return tuple(sorted(file.name.removesuffix(".json") for file in files if file.name.endswith(".json")))


def load_profile(name_or_path: str) -> DeviceProfile:
    """Loads a shipped profile by its name, or a file: what contains a slash or ends in `.json`.

    Raises ConfigError for an unknown name (with the names there are), a file that cannot be read, or one whose content
    is not a profile (with the field and what was expected).
    """
    return load_document(name_or_path).profile


def load_document(name_or_path: str) -> ProfileDocument:
    """Like `load_profile`, with where the numbers come from and how well they fit."""
    wanted = name_or_path.strip()
    if "/" in wanted or wanted.endswith(".json"):
        try:
            text = Path(wanted).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise ConfigError(f"cannot read the profile {wanted}: {reason}") from None
        return _parse(text, wanted)
    name, known = wanted.lower().replace("_", "-").replace(" ", "-"), available_profiles()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ConfigError(f"no profile of a device named {name_or_path!r}{hint}; there are {', '.join(known)}")
    return _parse((resources.files(__package__) / f"{name}.json").read_text(encoding="utf-8"), name)


def save_profile(
    path: Path, profile: DeviceProfile, origin: ProfileOrigin, residuals: tuple[Residual, ...] = ()
) -> None:
    """Writes a profile file, through a temporary name so that readers never see a part.

    Raises ConfigError if that is not possible.
    """
    text = render_document(ProfileDocument(profile, origin, residuals))
    temporary = path.with_name(path.name + ".part")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write the profile {path}: {error.strerror}") from None


def _parse(text: str, where: str) -> ProfileDocument:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"profile {where}: not JSON: {error}") from None
    return parse_document(value, where)
