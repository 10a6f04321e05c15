"""Reading a JSON body that anybody may have written."""

from __future__ import annotations

import json
import logging
import re
from typing import Any, NoReturn, TypeVar

from aiohttp import web
from pydantic import BaseModel, ValidationError

from agentserve.errors import InvalidRequestError, RequestTooLargeError

logger = logging.getLogger(__name__)
_ModelT = TypeVar("_ModelT", bound=BaseModel)
_SURROGATE = re.compile("[\ud800-\udfff]")
_ignored_fields_seen: set[str] = set()
_MAX_FIELDS_SEEN = 256
MAX_DEPTH = 128
"""Levels of a body. Schemas of tools, the deepest part, have a dozen."""


async def read_json_object(request: web.Request) -> dict[str, Any]:
    """The body as a JSON object; its content type does not matter.

    Raises InvalidRequestError for anything else and RequestTooLargeError above the application's limit.
    """
    try:
        data = await request.read()
    except web.HTTPRequestEntityTooLarge as error:
        raise RequestTooLargeError("The body is longer than this server's limit.") from error
    except web.RequestPayloadError as error:
        raise InvalidRequestError(f"The body cannot be read: {error}") from error
    return parse_json_object(data)


def parse_json_object(data: bytes) -> dict[str, Any]:
    """Parses UTF-8 JSON. Raises InvalidRequestError. Halves of surrogate pairs become U+FFFD.

    Clients that cut text in the middle of an emoji send such halves, and would otherwise send them again every turn.
    """
    try:
        text = data.decode("utf-8-sig")
        value = json.loads(text, parse_constant=_refuse_constant)
        if "\\ud" in text or "\\uD" in text:
            value = _replace_surrogates(value)
        _check_depth(value)
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"The body is not valid UTF-8 (byte {error.start}).", code="invalid_json") from error
    except RecursionError as error:
        raise InvalidRequestError("The body is nested too deeply.", code="invalid_json") from error
    except ValueError as error:
        raise InvalidRequestError(f"The body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(value, dict):
        raise InvalidRequestError("The body must be a JSON object.", code="invalid_json")
    return value


def validate(model: type[_ModelT], body: dict[str, Any]) -> _ModelT:
    """Checks the types of a body. Raises InvalidRequestError that names the first field at fault."""
    _log_ignored_fields(model, body)
    try:
        return model.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        param = format_location(first["loc"])
        raise InvalidRequestError(f"{param}: {first['msg']}", param=param) from error
    except RecursionError as error:
        raise InvalidRequestError("The body is nested too deeply.", code="invalid_json") from error


def format_location(location: tuple[int | str, ...]) -> str:
    """`("messages", 0, "role")` as `messages[0].role`."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text or "body"


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _check_depth(value: Any) -> None:
    """What is read here is also written somewhere: into a prompt, or back to the client. Raises InvalidRequestError."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for parent in level
            if isinstance(parent, dict | list)
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise InvalidRequestError("The body is nested too deeply.", code="invalid_json")


def _replace_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value)
    if isinstance(value, list):
        return [_replace_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {_replace_surrogates(key): _replace_surrogates(item) for key, item in value.items()}
    return value


def _log_ignored_fields(model: type[BaseModel], body: dict[str, Any]) -> None:
    """Says once which fields a client sends in vain. Bounded: a client may invent names for ever."""
    for name in body.keys() - model.model_fields.keys() - _ignored_fields_seen:
        if len(_ignored_fields_seen) < _MAX_FIELDS_SEEN:
            _ignored_fields_seen.add(name)
            logger.debug("the request field %.64r is not known and is ignored", name)
