"""`/agentserve/tools/memo`: results of tools, kept so that the same call need not be made twice.

Only for tools whose results stay true for a while: the agent says for how long, and takes part by naming itself in
`X-Agent-Id`. A result is the agent's own unless it was stored as shared; then any agent that takes part finds it.
"""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field

from agentserve.errors import InvalidRequestError
from agentserve.server.body import parse_json_object, read_json_object, validate
from agentserve.server.errors import EndpointNotFoundError
from agentserve.server.identity import identify

MAX_ENTRIES = 4096
MAX_BYTES = 64 << 20
"""Of keys and results, as JSON in UTF-8; what was used longest ago goes first."""
MAX_TTL_S = 86_400.0
_MAX_NAME = 256


class MemoBody(BaseModel):
    """A result to keep."""

    model_config = ConfigDict(strict=True, extra="forbid")

    tool: Annotated[str, Field(min_length=1, max_length=_MAX_NAME)]
    arguments: Annotated[dict[str, Any], Field(description="The order of names does not matter.")]
    result: Annotated[Any, Field(description="Any JSON.")]
    ttl_s: Annotated[float, Field(gt=0, le=MAX_TTL_S, description="For how long it stays true.")]
    shared: Annotated[bool, Field(description="Whether other agents may have it.")] = False


@dataclass(frozen=True, slots=True)
class _Entry:
    result: Any
    expires_s: float
    num_bytes: int


_Key = tuple[str | None, str, str]
"""Agent (None: shared), tool, canonical arguments."""


class ToolMemo:
    """The store. Bounded by entries and bytes; what has expired is not found any more. One event loop."""

    def __init__(self, *, max_bytes: int = MAX_BYTES, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock`: seconds from anywhere."""
        self._max_bytes = max_bytes
        self._clock = clock
        self._entries: OrderedDict[_Key, _Entry] = OrderedDict()
        self.num_bytes = 0
        self.num_stores = 0
        """Since the start, as the four below."""
        self.num_hits = 0
        self.num_misses = 0
        self.num_expirations = 0
        self.num_evictions = 0

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, agent: str, body: MemoBody) -> None:
        """Keeps a result in place of an older one. Raises InvalidRequestError for one that is larger than the store."""
        key = (None if body.shared else agent, body.tool, canonical(body.arguments))
        text = json.dumps(body.result, ensure_ascii=False)
        num_bytes = sum(len(part.encode("utf-8", "replace")) for part in (*key[1:], text))
        if num_bytes > self._max_bytes:
            raise InvalidRequestError(f"result: {num_bytes} bytes do not fit; {self._max_bytes} do", param="result")
        self._remove(key)
        self._entries[key] = _Entry(body.result, self._clock() + body.ttl_s, num_bytes)
        self.num_bytes += num_bytes
        self.num_stores += 1
        while self.num_bytes > self._max_bytes or len(self._entries) > MAX_ENTRIES:
            self._remove(next(iter(self._entries)))
            self.num_evictions += 1

    def get(self, agent: str, tool: str, arguments: dict[str, Any]) -> _Entry | None:
        """The agent's own result, else a shared one; None if there is none that is still true."""
        text = canonical(arguments)
        for owner in (agent, None):
            key = (owner, tool, text)
            entry = self._entries.get(key)
            if entry is None:
                continue
            if entry.expires_s > self._clock():
                self._entries.move_to_end(key)
                self.num_hits += 1
                return entry
            self._remove(key)
            self.num_expirations += 1
        self.num_misses += 1
        return None

    def age_left_s(self, entry: _Entry) -> float:
        """For how long a result stays true."""
        return max(0.0, entry.expires_s - self._clock())

    def _remove(self, key: _Key) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.num_bytes -= entry.num_bytes


def canonical(arguments: dict[str, Any]) -> str:
    """The same text for the same arguments: names in order, no spaces. 1 and 1.0 differ, as they do for tools."""
    return json.dumps(arguments, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


MEMO: web.AppKey[ToolMemo] = web.AppKey("tool_memo", ToolMemo)


async def put_memo(request: web.Request) -> web.Response:
    """Keeps a result. Raises InvalidRequestError for a wrong body or without `X-Agent-Id`."""
    body = validate(MemoBody, await read_json_object(request))
    memo = request.app[MEMO]
    memo.put(_agent(request), body)
    return web.json_response({"num_entries": len(memo), "num_bytes": memo.num_bytes})


async def get_memo(request: web.Request) -> web.Response:
    """The result for `?tool=...&arguments={...}`. Raises EndpointNotFoundError (404) if there is none."""
    agent, tool = _agent(request), request.query.get("tool", "")
    if not 1 <= len(tool) <= _MAX_NAME:
        raise InvalidRequestError("tool: the name of a tool is needed", param="tool")
    arguments = parse_json_object(request.query.get("arguments", "{}").encode("utf-8", "replace"))
    memo = request.app[MEMO]
    entry = memo.get(agent, tool, arguments)
    if entry is None:
        raise EndpointNotFoundError(f"No result of {tool!r} with these arguments is kept.")
    return web.json_response({"result": entry.result, "expires_in_s": round(memo.age_left_s(entry), 3)})


def _agent(request: web.Request) -> str:
    agent = identify(request.headers, {}).agent_id
    if agent is None:
        raise InvalidRequestError("X-Agent-Id is needed: agents take part in this by name", param="x-agent-id")
    return agent
