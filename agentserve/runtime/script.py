"""Answers from a file instead of a model, so that clients can be tested without one (`serve --script FILE`).

Each line of the file is a JSON object, and an empty one is skipped:

    {"match": "Weather in Paris", "reply": "<tool_call>...</tool_call>"}
    {"match": "21 degrees", "unless": "title", "turn": 2, "reply": "It is warm.", "finish": "stop"}
    {"reply": "Yes.", "times": 1}

The first line that fits a request answers it. `match` is a text, or a list of texts, that the rendered prompt has;
`unless` one that it does not have; `turn` counts the requests of a session from 1 (all requests without a session are
one); `times` says how often a line may be used. `finish` is `stop`, or `length` for an answer that goes on until
`max_tokens`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from agentserve.core.engine import EngineCore
from agentserve.core.events import Command, SubmitRequest
from agentserve.core.stats import EngineStats
from agentserve.errors import ConfigError
from agentserve.runtime.client import Driver

logger = logging.getLogger(__name__)
_T = TypeVar("_T")
NO_LINE = "No line of the script fits this request."
_FIELDS = {"match", "unless", "turn", "times", "reply", "finish"}
_MAX_SESSIONS = 4096
_MAX_ANSWERS = 65536


class TextCodec(Protocol):
    """What the script needs of a tokenizer."""

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]: ...

    def decode(self, token_ids: tuple[int, ...], *, skip_special_tokens: bool = True) -> str: ...


@dataclass(frozen=True, slots=True)
class ScriptLine:
    """One answer and the requests that it fits."""

    reply: str
    match: tuple[str, ...] = ()
    unless: tuple[str, ...] = ()
    turn: int | None = None
    times: int | None = None
    finish: str = "stop"

    def fits(self, prompt: str, turn: int, num_used: int) -> bool:
        return (
            (self.times is None or num_used < self.times)
            and (self.turn is None or self.turn == turn)
            and all(text in prompt for text in self.match)
            and not any(text in prompt for text in self.unless)
        )


def read_script(path: Path) -> tuple[ScriptLine, ...]:
    """Raises ConfigError that names the line at fault."""
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the script {path}: {error}") from error
    lines = [_parse_line(text, f"{path}:{number}") for number, text in enumerate(texts, start=1) if text.strip()]
    if not lines:
        raise ConfigError(f"the script {path} has no line")
    return tuple(lines)


def _parse_line(text: str, place: str) -> ScriptLine:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place}: not valid JSON: {error}") from None
    if not isinstance(value, dict) or not isinstance(value.get("reply"), str):
        raise ConfigError(f"{place}: must be an object with a reply")
    unknown = value.keys() - _FIELDS
    if unknown:
        raise ConfigError(f"{place}: unknown field {min(unknown)!r}; there are {', '.join(sorted(_FIELDS))}")
    if value.get("finish", "stop") not in ("stop", "length"):
        raise ConfigError(f"{place}: finish must be stop or length")
    for name in ("turn", "times"):
        number = value.get(name)
        if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 1):
            raise ConfigError(f"{place}: {name} must be a positive number")
    return ScriptLine(
        value["reply"],
        _texts(value, "match", place),
        _texts(value, "unless", place),
        value.get("turn"),
        value.get("times"),
        value.get("finish", "stop"),
    )


def _texts(value: Mapping[str, Any], name: str, place: str) -> tuple[str, ...]:
    given = value.get(name, [])
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise ConfigError(f"{place}: {name} must be a text or a list of texts")
    return tuple(texts)


@dataclass(frozen=True, slots=True)
class ScriptedAnswer:
    """The tokens of one answer."""

    token_ids: tuple[int, ...]
    ends: bool
    """Whether the answer ends behind them; else it starts over until `max_tokens`."""


class Script:
    """Chooses the answer of each request when it is submitted, and tells the executor its tokens.

    `begin` is called by whoever submits, `next_token` by the engine thread; both touch single entries of dictionaries.
    """

    def __init__(self, lines: tuple[ScriptLine, ...], codec: TextCodec) -> None:
        self._lines = lines
        self._codec = codec
        self._num_used = [0] * len(lines)
        self._turns: dict[str | None, int] = {}
        self._answers: dict[str, ScriptedAnswer] = {}

    def begin(self, request: SubmitRequest) -> None:
        """Chooses the answer of a request that is about to be submitted."""
        turn = self._turns.pop(request.session_id, 0) + 1
        self._turns[request.session_id] = turn
        if len(self._turns) > _MAX_SESSIONS:
            del self._turns[next(iter(self._turns))]
        prompt = self._codec.decode(request.prompt_token_ids, skip_special_tokens=False)
        reply, ends = NO_LINE, True
        for index, line in enumerate(self._lines):
            if line.fits(prompt, turn, self._num_used[index]):
                self._num_used[index] += 1
                reply, ends = line.reply, line.finish == "stop"
                break
        else:
            logger.warning("no line of the script fits turn %d of session %s", turn, request.session_id or "-")
        self._answers[request.request_id] = ScriptedAnswer(tuple(self._codec.encode(reply)), ends)
        if len(self._answers) > _MAX_ANSWERS:  # many more than can be waiting or running
            del self._answers[next(iter(self._answers))]

    def next_token(self, request_id: str, index: int) -> int | None:
        """The token at `index` of an answer; None behind its end."""
        answer = self._answers.get(request_id)
        if answer is None or not answer.token_ids:
            return None
        if index < len(answer.token_ids):
            return answer.token_ids[index]
        return None if answer.ends else answer.token_ids[index % len(answer.token_ids)]


class ScriptDriver:
    """A driver that lets the script choose the answer of each request before it passes it on."""

    def __init__(self, driver: Driver, script: Script) -> None:
        self._driver = driver
        self._script = script

    def post(self, command: Command) -> None:
        """Raises what the driver raises."""
        if isinstance(command, SubmitRequest):
            self._script.begin(command)
        self._driver.post(command)

    def stats(self) -> EngineStats:
        return self._driver.stats()

    def ask(self, question: Callable[[EngineCore, int], _T]) -> Future[_T]:
        """Raises what the driver raises."""
        return self._driver.ask(question)
