"""Ids of calls for templates that want nine letters and digits."""

from __future__ import annotations

from typing import Any

import pytest

from agentserve.errors import InvalidRequestError
from agentserve.text.call_ids import demands_short_ids, short_id, with_short_ids
from agentserve.text.chat import ChatTemplate

TEMPLATE = (
    "{% for message in messages %}{% for tool_call in message.tool_calls or [] %}"
    "{% if not tool_call.id is defined or tool_call.id|length != 9 %}{{ raise_exception('length 9!') }}{% endif %}"
    "[{{ tool_call.id }}]{% endfor %}{% if message.role == 'tool' %}"
    "{% if message.tool_call_id|length != 9 %}{{ raise_exception('length 9!') }}{% endif %}({{ message.tool_call_id }})"
    "{% endif %}{% endfor %}"
)


def assistant(*ids: str | None) -> dict[str, Any]:
    calls = [{"function": {"name": "f", "arguments": "{}"}, **({} if name is None else {"id": name})} for name in ids]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def result(name: str | None) -> dict[str, Any]:
    return {"role": "tool", "content": "r", **({} if name is None else {"tool_call_id": name})}


def test_ids_are_short_and_calls_find_their_results() -> None:
    template = ChatTemplate({"default": TEMPLATE}, {})
    long, short = "call_0123456789abcdef01234567", "abcDEF123"
    text = template.render([assistant(long, short), result(short), result(long)])
    assert text == f"[{short_id(long)}][{short}]({short})({short_id(long)})"
    assert len(short_id(long)) == 9 and short_id(long).isalnum()


def test_ids_that_are_missing_are_made_up_in_order() -> None:
    messages = [assistant(None, None), result(None), result(None)]
    renamed = with_short_ids(messages)
    first, second = (call["id"] for call in renamed[0]["tool_calls"])
    assert first != second
    assert [message["tool_call_id"] for message in renamed[1:]] == [first, second]
    assert "id" not in messages[0]["tool_calls"][0]  # the client's own are not changed
    # A conversation that grows keeps its ids.
    assert with_short_ids([*messages, assistant("x")])[:3] == renamed


def test_other_templates_see_the_ids_as_they_are() -> None:
    assert demands_short_ids(TEMPLATE)
    assert not demands_short_ids("{{ message.tool_call_id }}{{ messages|length != 9 }}")
    template = ChatTemplate({"default": "{{ messages[0].tool_calls[0].id }}"}, {})
    assert template.render([assistant("call_1")]) == "call_1"


def test_results_without_any_call() -> None:
    template = ChatTemplate({"default": TEMPLATE}, {})
    assert len(template.render([result(None), result("abc")])) == 22
    with pytest.raises(InvalidRequestError):
        ChatTemplate({"default": TEMPLATE.replace("!= 9", "!= 8")}, {}).render([assistant("call_1")])
