"""Forbidden tools: not shown to the model, not to be forced, and stopped at their name if the model calls them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import aiohttp
import pytest

from agentserve.core.agents.policies.tool_allow import ToolAllowList
from agentserve.core.agents.policy import Policy, ToolUse
from agentserve.core.events import HUMAN
from agentserve.core.request import FinishReason
from tests.server import scripted, simulated
from tests.server.daemon import Daemon
from tests.server.scripted import replying
from tests.server.test_chat_tools import ONE
from tests.server.test_turn_notes import BODIES, post

TIME = '<tool_call>\n{"name": "time", "arguments": {"city": "Rome"}}\n</tool_call>'
RULES = ToolAllowList([("clerk", ("weather",))])
CLERK = {"X-Agent-Id": "clerk"}
WHY = "[The call of time was stopped: the agent clerk may call weather here and nothing else.]"


def serve(text: str, *safety: Policy) -> Any:
    return scripted.serve(max_model_len=2000, script=replying(text), safety=safety or (RULES,))


async def ask(daemon: Daemon, path: str, headers: Mapping[str, str] = CLERK, **fields: Any) -> tuple[int, str]:
    return await post(daemon, path, headers, **fields)


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_forbidden_call_never_leaves(path: str, stream: bool) -> None:
    async with serve("I look." + TIME + "and so on") as daemon:
        status, body = await ask(daemon, path, stream=stream)
        assert status == 200
        assert "Rome" not in body and "<tool" not in body
        assert not any(f'"type":"{kind}"' in body for kind in ("function_call", "tool_use", "custom_tool_call"))
        assert '"tool_calls":[' not in body.replace(" ", "")
        # As if the model had ended its answer there: the clients know what to do with that.
        ends = {"/v1/chat/completions": "stop", "/v1/messages": "end_turn", "/v1/responses": "completed"}
        assert ends[path] in body
        assert shown(body, stream) == "I look.\n\n" + WHY
        # The engine need not write on, and knows that no tool runs.
        assert daemon.driver.ended == [(daemon.driver.submitted[0].request_id, FinishReason.STOP)]
        assert [note.tool_name for note in daemon.driver.notes] == [HUMAN]
        assert 'refused_tool_calls_total{model_name="test-model",where="answer"} 1.0' in await metrics(daemon)


def shown(body: str, stream: bool) -> str:
    """The text that a person sees."""
    if not stream:
        whole = json.loads(body)
        if "choices" in whole:
            return str(whole["choices"][0]["message"]["content"])
        (part,) = whole["content"] if "content" in whole else whole["output"][0]["content"]
        return str(part["text"])
    events = [json.loads(line[6:]) for line in body.splitlines() if line.startswith("data: {")]
    texts = []
    for event in events:
        if "choices" in event:
            texts.append(event["choices"][0]["delta"].get("content") or "")
        elif event["type"] == "content_block_delta":
            texts.append(event["delta"]["text"])
        elif event["type"] == "response.output_text.delta":
            texts.append(event["delta"])
    return "".join(texts)


async def metrics(daemon: Daemon) -> str:
    async with aiohttp.ClientSession() as session, session.get(daemon.url + "/metrics") as response:
        return await response.text()


async def test_calls_before_it_are_made() -> None:
    async with serve(ONE + TIME) as daemon:
        _, text = await ask(daemon, "/v1/chat/completions")
        choice = json.loads(text)["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["weather"]
        assert choice["message"]["content"] == WHY
        assert [note.tool_name for note in daemon.driver.notes] == ["weather"]


async def test_others_may() -> None:
    async with serve(TIME) as daemon:
        for headers in ({"X-Agent-Id": "boss"}, {}):
            _, text = await ask(daemon, "/v1/chat/completions", headers)
            assert json.loads(text)["choices"][0]["finish_reason"] == "tool_calls"


async def test_log_probabilities_tell_nothing_of_it() -> None:
    """They are of tokens, markup included: those of what may be a call wait until it may leave."""
    for text, seen in (("I look." + TIME, "I look."), ("I look." + ONE, "I look." + ONE)):
        async with serve(text) as daemon:
            _, body = await ask(daemon, "/v1/chat/completions", logprobs=True)
            entries = json.loads(body)["choices"][0]["logprobs"]["content"]
            assert "".join(entry["token"] for entry in entries) == seen


async def test_the_model_is_not_told_of_forbidden_tools() -> None:
    async with serve("hi") as daemon:
        for headers in (CLERK, {}):
            await ask(daemon, "/v1/chat/completions", headers)
        clerks, others = (bytes(run.prompt_token_ids).decode() for run in daemon.driver.submitted)
        assert ("weather" in clerks, "time" in clerks) == (True, False)
        assert ("weather" in others, "time" in others) == (True, True)


FORCED: dict[str, tuple[Any, Any]] = {
    "/v1/chat/completions": ({"type": "function", "function": {"name": "time"}}, "required"),
    "/v1/messages": ({"type": "tool", "name": "time"}, {"type": "any"}),
    "/v1/responses": ({"type": "function", "name": "time"}, "required"),
}


@pytest.mark.parametrize("path", FORCED)
async def test_a_forbidden_call_cannot_be_forced(path: str) -> None:
    async with serve("hi", ToolAllowList([("clerk", ("weather",)), ("mute", ())])) as daemon:
        named, required = FORCED[path]
        for headers, choice in ((CLERK, named), ({"X-Agent-Id": "mute"}, required)):
            status, text = await ask(daemon, path, headers, tool_choice=choice)
            error = json.loads(text)["error"]
            assert (status, error["type"]) == (403, "permission_error")
            assert "must not be called" in error["message"]
        assert daemon.driver.submitted == []
        assert 'refused_tool_calls_total{model_name="test-model",where="request"} 2.0' in await metrics(daemon)


async def test_a_grammar_has_only_what_is_allowed() -> None:
    """A model that is made to call some tool cannot even begin to write a forbidden name."""
    async with simulated.serve(max_model_len=2000, num_blocks=2000, safety=(RULES,)) as daemon:
        for seed in range(3):
            _, text = await ask(daemon, "/v1/chat/completions", tool_choice="required", max_tokens=400, seed=seed)
            message = json.loads(text)["choices"][0]["message"]
            assert [call["function"]["name"] for call in message["tool_calls"]] == ["weather"]


async def test_an_answer_that_was_cut_off_like_this_is_not_kept() -> None:
    """What the client saw is not what the model wrote."""
    async with serve("I look." + TIME) as daemon:
        await ask(daemon, "/v1/chat/completions", {**CLERK, "Session-Id": "s"})
        history = daemon.state.generation.caching.history
        assert history is not None and history.stats().num_stored_turns == 0


class Broken(Policy):
    def refusal(self, use: ToolUse) -> str | None:
        raise KeyError(use.tool_name)


async def test_what_cannot_be_checked_does_not_leave() -> None:
    async with serve(ONE, Broken()) as daemon:
        _, text = await ask(daemon, "/v1/chat/completions")
        # It is offered no tool either, so what the model writes is text.
        assert json.loads(text)["choices"][0]["finish_reason"] == "stop"
        status, _ = await ask(daemon, "/v1/chat/completions", tool_choice="required")
        assert status == 403


def test_rules_add_up() -> None:
    rules = ToolAllowList([("*", ("read",)), ("coder", ("git_*",)), ("coder", ("bash",))])

    def allowed(agent: str | None) -> set[str]:
        tools = ("read", "git_log", "bash", "rm")
        return {tool for tool in tools if rules.refusal(ToolUse(agent, tool)) is None}

    assert allowed("coder") == {"read", "git_log", "bash"}
    assert allowed("other") == allowed(None) == {"read"}
    assert rules.refusal(ToolUse(None, "rm")) == "an agent without a name may call read here and nothing else"
    assert ToolAllowList([("a", ())]).refusal(ToolUse("a", "rm")) == "the agent a may call no tool here"
    assert ToolAllowList([("a", ("x",))]).refusal(ToolUse("b", "rm")) is None
