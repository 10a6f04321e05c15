"""The file format of profiles: JSON with a format version, where the numbers come from, and how well they fit.

{"format_version": 1,
 "origin": {"provenance": "measured" | "fitted" | "estimated", "source": ..., "expected_error": ..., ...},
 "profile": {every field of DeviceProfile but `provenance`, which is the one of the origin and its source},
 "residuals": [every field of Residual, ...]}
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from agentserve.core.costmodel import Contention, DeviceProfile
from agentserve.errors import ConfigError
from agentserve.profiles.residuals import Residual

FORMAT_VERSION = 1
PROVENANCES = ("measured", "fitted", "estimated")


@dataclass(frozen=True, slots=True)
class ProfileOrigin:
    """Where the numbers of a profile come from."""

    provenance: str
    """`measured` on this machine, `fitted` to published measurements, or `estimated` from a data sheet."""
    source: str
    """In words: which measurements, tables or data sheet."""
    expected_error: str
    """In words: how far off a prediction is to be expected, and of what."""
    model: str = ""
    """Which model was measured; empty if none was."""
    dtype: str = ""
    machine: str = ""
    """Processor, memory and system that was measured."""
    commit: str = ""
    """Of this project when it was made."""
    command: str = ""
    """That makes it again."""
    date: str = ""
    """As YYYY-MM-DD."""

    def __post_init__(self) -> None:
        if self.provenance not in PROVENANCES:
            raise ConfigError(f"provenance must be {', '.join(PROVENANCES)}, not {self.provenance!r}")
        if not self.source or not self.expected_error:
            raise ConfigError("a profile must say its source and its expected error")


@dataclass(frozen=True, slots=True)
class ProfileDocument:
    """A profile with what its file says about it."""

    profile: DeviceProfile
    origin: ProfileOrigin
    residuals: tuple[Residual, ...] = ()


def render_document(document: ProfileDocument) -> str:
    """The text of a profile file. Floats keep every digit."""
    profile = dataclasses.asdict(document.profile)
    del profile["provenance"]
    knots = profile.pop("rows")
    value = {
        "format_version": FORMAT_VERSION,
        "origin": dataclasses.asdict(document.origin),
        "profile": {**profile, "rows": "KNOTS"},
        "residuals": [dataclasses.asdict(residual) for residual in document.residuals],
    }
    # A knot a line instead of four.
    lines = ",\n".join(f"      {json.dumps(knot)}" for knot in knots)
    return json.dumps(value, indent=2).replace('"KNOTS"', f"[\n{lines}\n    ]") + "\n"


def parse_document(value: Any, where: str) -> ProfileDocument:
    """Reads the content of a profile file. Raises ConfigError that names `where`, the field and what was expected."""
    reader = _Reader(where)
    fields = reader.mapping(value, "the file")
    version = fields.get("format_version")
    if version != FORMAT_VERSION:
        raise ConfigError(f"profile {where}: format_version is {version!r}, but this version reads {FORMAT_VERSION}")
    reader.names(fields, {"format_version", "origin", "profile", "residuals"}, "the file")
    origin = reader.build(ProfileOrigin, fields["origin"], "origin", {})
    content = reader.mapping(fields["profile"], "profile")
    profile: DeviceProfile = reader.build(
        DeviceProfile,
        {**content, "provenance": f"{origin.provenance}: {origin.source}"},
        "profile",
        {"rows": reader.knots, "contention": lambda v, at: reader.build(Contention, v, at, {})},
    )
    residuals = tuple(
        reader.build(Residual, entry, f"residuals[{index}]", {"worst": reader.texts})
        for index, entry in enumerate(reader.sequence(fields["residuals"], "residuals"))
    )
    return ProfileDocument(profile, origin, residuals)


class _Reader:
    """Checks JSON values against dataclasses; every complaint says where and what."""

    def __init__(self, where: str) -> None:
        self._where = where

    def fail(self, at: str, expected: str, value: Any) -> ConfigError:
        shown = repr(value)
        return ConfigError(f"profile {self._where}: {at} must be {expected}, not {shown[:60]}")

    def mapping(self, value: Any, at: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.fail(at, "an object", value)
        return value

    def sequence(self, value: Any, at: str) -> list[Any]:
        if not isinstance(value, list):
            raise self.fail(at, "a list", value)
        return value

    def names(
        self, value: dict[str, Any], expected: set[str], at: str, optional: set[str] | frozenset[str] = frozenset()
    ) -> None:
        if missing := sorted(expected - optional - value.keys()):
            raise ConfigError(f"profile {self._where}: {at} lacks {', '.join(missing)}")
        if unknown := sorted(value.keys() - expected):
            raise ConfigError(f"profile {self._where}: {at} has unknown fields {', '.join(unknown)}")

    def build(self, kind: Any, value: Any, at: str, special: dict[str, Callable[[Any, str], Any]]) -> Any:
        content = self.mapping(value, at)
        fields = {field.name: field.type for field in dataclasses.fields(kind)}
        optional = {field.name for field in dataclasses.fields(kind) if field.default is not dataclasses.MISSING}
        self.names(content, set(fields), at, optional)
        values = {}
        for name, type_name in fields.items():
            if name not in content:
                continue
            read = special.get(name) or self._readers()[str(type_name)]
            values[name] = read(content[name], f"{at}.{name}")
        try:
            return kind(**values)
        except ConfigError as error:
            raise ConfigError(f"profile {self._where}: {at}: {error}") from None

    def _readers(self) -> dict[str, Callable[[Any, str], Any]]:
        return {"int": self.integer, "float": self.number, "str": self.text, "bool": self.boolean}

    def number(self, value: Any, at: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
            raise self.fail(at, "a finite number", value)
        return float(value)

    def integer(self, value: Any, at: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fail(at, "a whole number", value)
        return value

    def text(self, value: Any, at: str) -> str:
        if not isinstance(value, str):
            raise self.fail(at, "a text", value)
        return value

    def texts(self, value: Any, at: str) -> tuple[str, ...]:
        return tuple(self.text(entry, f"{at}[{i}]") for i, entry in enumerate(self.sequence(value, at)))

    def boolean(self, value: Any, at: str) -> bool:
        if not isinstance(value, bool):
            raise self.fail(at, "true or false", value)
        return value

    def knots(self, value: Any, at: str) -> tuple[tuple[float, float], ...]:
        knots = []
        for index, knot in enumerate(self.sequence(value, at)):
            if not isinstance(knot, list) or len(knot) != 2:
                raise self.fail(f"{at}[{index}]", "a pair [tokens, rows]", knot)
            knots.append((self.number(knot[0], f"{at}[{index}]"), self.number(knot[1], f"{at}[{index}]")))
        return tuple(knots)
