"""The order of messages, and tools for templates that know none."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentserve.server.history import arrange
from agentserve.server.tool_text import with_tools_as_text

CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}


def message(role: str, content: str, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def reminder(text: str) -> str:
    return f"<system-reminder>\n{text}\n</system-reminder>"


@pytest.mark.parametrize(
    ("messages", "arranged"),
    [
        ([message("system", "a"), message("developer", "b")], [message("system", "a\n\nb")]),
        ([message("user", "u"), message("system", "s")], [message("user", f"u\n\n{reminder('s')}")]),
        # Never between a call and its result.
        (
            [message("assistant", "", tool_calls=[CALL]), message("system", "s"), message("tool", "t")],
            [message("assistant", "", tool_calls=[CALL]), message("tool", f"t\n\n{reminder('s')}")],
        ),
        (
            [message("assistant", "a"), message("system", "s"), message("user", "u")],
            [message("assistant", "a"), message("user", f"{reminder('s')}\n\nu")],
        ),
        (
            [message("assistant", "a"), message("system", "s"), message("assistant", "b")],
            [message("assistant", "a"), message("user", reminder("s")), message("assistant", "b")],
        ),
        (
            [message("assistant", "a"), message("system", "s")],
            [message("assistant", "a"), message("user", reminder("s"))],
        ),
        ([message("tool", "t"), message("system", "s")], [message("tool", f"t\n\n{reminder('s')}")]),
    ],
)
def test_system_messages_are_folded_at_the_tail(messages: list[dict[str, Any]], arranged: list[dict[str, Any]]) -> None:
    assert arrange(messages) == arranged


def plain(messages: list[dict[str, Any]]) -> str:
    return "".join(f"<{entry['role']}>{entry['content']}" for entry in arrange(messages))


@given(
    st.lists(st.sampled_from(["user", "tool", "assistant", "system"]), min_size=1, max_size=12),
    st.lists(st.sampled_from(["user", "assistant"]), min_size=1, max_size=3),
)
@settings(max_examples=200)
def test_a_conversation_that_grows_renders_as_a_prompt_that_grows(roles: list[str], more: list[str]) -> None:
    """As it does where the client waits for an answer: behind a user's or a tool's message and what follows it."""
    messages = [message(role, f"{role}{at}") for at, role in enumerate([*roles, "user"])]
    grown = [*messages, message("assistant", "answer"), *(message(role, f"more {at}") for at, role in enumerate(more))]
    assert plain(grown).startswith(plain(messages))
    # Nothing is lost.
    assert all(entry["content"] in plain(grown) for entry in grown)


def test_tools_as_text() -> None:
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}
    messages = [
        message("system", "S"),
        message("user", "u"),
        message("assistant", "look", tool_calls=[CALL, CALL]),
        message("tool", "1", tool_call_id="c"),
        message("tool", "2", tool_call_id="c"),
        message("user", "go on"),
    ]
    system, user, assistant, results, last = with_tools_as_text(messages, [tool])
    assert system["content"].startswith("S\n\nYou can call functions.")
    assert '{"type": "function", "function": {"name": "f"' in system["content"]
    assert user == message("user", "u")
    call = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    assert assistant == message("assistant", f"look\n{call}\n{call}")
    assert results == message("user", "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>")
    assert last == message("user", "go on")
    assert with_tools_as_text([message("user", "u")], [tool])[0]["role"] == "system"
    assert with_tools_as_text([message("user", "u")], []) == [message("user", "u")]
