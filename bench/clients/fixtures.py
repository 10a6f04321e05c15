"""Recorded requests as fixtures: without secrets, places and ids of a machine, and without other people's long texts.

A fixture is a JSONL file. Its first line says whose requests these are and what the scripted model answers; every other
line is one request in the order in which the client sent them:

    {"client": "codex", "version": "...", "dialect": "responses", "source": "recorded", "script": [...]}
    {"method": "POST", "path": "/v1/responses", "headers": {...}, "status": 200, "body": {...}}
    {"method": "POST", "path": "/v1/responses", "headers": {...}, "status": 200, "body": {"tools": {"$same_as": 1}}}

`$same_as` stands for the same field of an earlier request, counted from 1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.clients.catalog import ANSWER, READING, TASK, WORD

HEADERS = (
    "accept",
    "anthropic-beta",
    "anthropic-version",
    "content-type",
    "session-id",
    "session_id",
    "user-agent",
    "x-app",
    "x-claude-code-session-id",
    "x-client-request-id",
    "x-session-affinity",
    "x-session-id",
)
"""Those that may change an answer or tell who asks. Keys are never among them."""

_SHARED_FIELDS = ("tools", "system", "instructions")
_HEAD_LENGTH, _LONGEST_TEXT = 120, 240
_KEPT_TEXTS = (TASK, READING, ANSWER, WORD)
"""What the script looks for must survive a cut."""

_IDS = (
    (re.compile(r"(?<![0-9a-f])[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b"), "uuid"),
    (re.compile(r"\b(?:call|toolu|fc|msg|rs|resp|ctc)_[0-9A-Za-z]{16,}\b"), "id"),
    (re.compile(r"\b(?:ses|prt)_[0-9A-Za-z]{16,}\b"), "id"),
    (re.compile(r"\b[0-9a-f]{32,}\b"), "hex"),
)
_SYSTEM = re.compile(r"\(\w+ [\d.]+; x86_64\)")
_MOMENTS = (
    (re.compile(r"\b20\d\d-\d\d-\d\d(?:T[0-9:.]+Z?)?"), "2026-01-01"),
    (re.compile(r"\b(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day, \w+ \d{1,2}, 20\d\d"), "Thursday, January 1, 2026"),
    (re.compile(r"\b(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun) \w{3} \d{1,2} 20\d\d"), "Thursday, January 1, 2026"),
    (re.compile(r"Linux \d+\.[\w.+-]+"), "Linux 6.0"),
)


@dataclass(frozen=True, slots=True)
class FixtureRequest:
    """One request of a client."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: dict[str, Any] | None
    status: int


@dataclass(frozen=True, slots=True)
class Fixture:
    """The requests of one client."""

    client: str
    version: str
    dialect: str
    source: str
    """`recorded` from the real client, or `documented`."""
    script: list[dict[str, Any]]
    requests: list[FixtureRequest]


class Scrubber:
    """Replaces what belongs to a machine or a moment; the same thing always becomes the same."""

    def __init__(self, places: Mapping[str, str]) -> None:
        """`places`: paths and what stands for them, the longest first wins."""
        self._places = sorted(places.items(), key=lambda item: -len(item[0]))
        self._names: dict[str, str] = {}

    def text(self, text: str) -> str:
        for place, name in self._places:
            text = text.replace(place, name)
        for pattern, moment in _MOMENTS:
            text = pattern.sub(moment, text)
        return self.ids(text)

    def ids(self, text: str) -> str:
        """Only ids and the system: the dates in headers are names of versions."""
        text = _SYSTEM.sub("(Linux; x86_64)", text)
        for pattern, kind in _IDS:
            text = pattern.sub(lambda match, kind=kind: self._name(match.group(), kind), text)  # type: ignore[misc]
        return text

    def value(self, value: Any) -> Any:
        """JSON with every text scrubbed, and long ones cut."""
        if isinstance(value, str):
            return cut(self.text(value))
        if isinstance(value, list):
            return [self.value(item) for item in value]
        if isinstance(value, dict):
            return {self.text(key): self.value(item) for key, item in value.items()}
        return value

    def _name(self, found: str, kind: str) -> str:
        number = self._names.setdefault(found, str(len(self._names) + 1))
        if kind == "uuid":
            return f"00000000-0000-4000-8000-{number:0>12}"
        if kind == "hex":
            return f"{number:0>{len(found)}}"
        prefix, _, rest = found.partition("_")
        return f"{prefix}_{number:0>{len(rest)}}"


def cut(text: str) -> str:
    """The head of a long text; what the script needs to find is put behind it."""
    if len(text) <= _LONGEST_TEXT:
        return text
    head = text[:_HEAD_LENGTH]
    kept = [part for part in _KEPT_TEXTS if part in text and part not in head]
    return " ".join([head, f"[... {len(text) - _HEAD_LENGTH} characters cut]", *kept])


def dump(fixture: Fixture) -> str:
    """The fixture as text, fields that requests have in common written once."""
    header = {name: getattr(fixture, name) for name in ("client", "version", "dialect", "source", "script")}
    lines = [header]
    for index, request in enumerate(fixture.requests):
        body = request.body
        if body is not None:
            body = {name: _shared(name, value, fixture.requests[:index]) for name, value in body.items()}
        lines.append(
            {
                "method": request.method,
                "path": request.path,
                "headers": dict(request.headers),
                "status": request.status,
                "body": body,
            }
        )
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _shared(name: str, value: Any, earlier: Sequence[FixtureRequest]) -> Any:
    if name in _SHARED_FIELDS:
        for number, request in enumerate(earlier, start=1):
            if value and request.body is not None and request.body.get(name) == value:
                return {"$same_as": number}
    return value


def load(path: Path) -> Fixture:
    """Reads a fixture and puts shared fields back."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    header, requests = lines[0], list[FixtureRequest]()
    for line in lines[1:]:
        body = line["body"]
        if body is not None:
            body = dict(_restored(body, requests))
        requests.append(FixtureRequest(line["method"], line["path"], line["headers"], body, line["status"]))
    return Fixture(requests=requests, **header)


def _restored(body: Mapping[str, Any], earlier: Sequence[FixtureRequest]) -> Iterator[tuple[str, Any]]:
    for name, value in body.items():
        if isinstance(value, dict) and value.keys() == {"$same_as"}:
            source = earlier[value["$same_as"] - 1].body
            assert source is not None
            yield name, source[name]
        else:
            yield name, value
