"""Where the answers stand in a rendered conversation, so that their token ids can be put there.

The conversation is rendered once more with marks in place of what its answers say. What stands around the marks is the
template's own: the header that opens the assistant's turn, and the end-of-turn token that closes it. Between the two,
and nowhere else, the text is replaced. How a template opens and closes a turn is learned when it is loaded, from little
conversations. Where anything is not as expected, there is no result and the conversation is tokenized as it is.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentserve.errors import InvalidRequestError
from agentserve.server.prefix import common_length
from agentserve.text.tokenizer import Tokenizer

Render = Callable[[Sequence[Mapping[str, Any]], bool], str]
"""Messages, and whether to open the assistant's turn, to text. Raises InvalidRequestError."""
_Message = dict[str, Any]
_PROBE_ID = "a1b2c3d4e"
"""Some templates want ids of calls to have exactly nine characters."""
_TAG = re.compile(r"\[/?[A-Z_]+\]|<[^<>\s]+>")


@dataclass(frozen=True, slots=True)
class Spliced:
    """A rendered conversation with holes for its answers: `texts[i]`, answer `i`, `texts[i + 1]` and so on."""

    texts: tuple[str, ...]
    """One more than there are answers. Each but the first begins with the token that ends a turn, each but the last
    ends with the header of the assistant's turn."""


@dataclass(frozen=True, slots=True)
class _Edges:
    """What a template writes around an answer."""

    header: str
    """Right before whatever belongs to the answer."""
    closer: str
    """Between the last mark of the answer and the end-of-turn token."""


class TurnFinder:
    """Finds answers in what one chat template renders. May be used from any thread."""

    def __init__(self, render: Render, tokenizer: Tokenizer) -> None:
        """`render` renders as for a prompt without tools and without further variables."""
        self._nonce = f"q{secrets.token_hex(8)}z"
        self._mark = re.compile(self._nonce + r"(\d+)x")
        ends = [_special_text(tokenizer, token_id) for token_id in tokenizer.eos_token_ids]
        # Without one there is nothing to find: an expression that never matches.
        self._end = re.compile("|".join(re.escape(text) for text in ends if text) or r"(?!)")
        self._headers: tuple[str, ...] = ()
        self._closers: dict[bool, str] = {}
        """By whether the answer calls tools."""
        self._learn(render)

    @property
    def is_certain(self) -> bool:
        """Whether the template opens and closes turns in a way that can be found at all."""
        return bool(self._headers)

    def opening(self, text: str) -> str | None:
        """What a prompt has behind the header that opens the assistant's turn at its end; None if there is none."""
        found = [(at + len(header)) for header in self._headers if (at := text.rfind(header)) >= 0]
        return text[max(found) :] if found else None

    def splice(
        self, render: Render, messages: Sequence[Mapping[str, Any]], plain: str, indices: Sequence[int]
    ) -> Spliced | None:
        """The conversation with holes for the answers `messages[i]` of `indices`, which ascend.

        `plain` is the conversation as `render` shows it. None if it is not certain where the answers stand.
        """
        marked = list(messages)
        for number, index in enumerate(indices):
            marked[index] = self._marked(messages[index], number)
        try:
            text = render(marked, True)
        except InvalidRequestError:
            return None
        spans = self._find_spans(text, [messages[index] for index in indices])
        if spans is None:
            return None
        edges = [0, *(edge for span in spans for edge in span), len(text)]
        texts = tuple(text[edges[at] : edges[at + 1]] for at in range(0, len(edges), 2))
        if self._mark.search("".join(texts)) or not _surrounds(texts, plain):
            return None
        return Spliced(texts)

    def _find_spans(self, text: str, answers: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]] | None:
        """Begin and end of each answer in the marked text."""
        found: dict[int, tuple[int, int]] = {}
        for match in self._mark.finditer(text):
            number = int(match[1])
            found[number] = (found.get(number, match.span())[0], match.end())
        if list(found) != list(range(len(answers))):  # one is not shown, or they are in another order
            return None
        spans: list[tuple[int, int]] = []
        before = 0
        for answer, (first, last) in zip(answers, found.values(), strict=True):
            starts = [at + len(header) for header in self._headers if (at := text.rfind(header, before, first)) >= 0]
            end = self._end.search(text, last)
            if first < before or not starts or end is None:
                return None
            if text[last : end.start()] != self._closer_of(answer):
                return None
            spans.append((max(starts), end.start()))
            before = end.end()
        return spans

    def _closer_of(self, answer: Mapping[str, Any]) -> str | None:
        """What the template writes behind the last mark of an answer like this one; None if that is not known."""
        calls = answer.get("tool_calls") or ()
        closer = self._closers.get(bool(calls))
        return closer.replace(_PROBE_ID, str(calls[-1].get("id", ""))) if closer and calls else closer

    def _marked(self, message: Mapping[str, Any], number: int) -> _Message:
        """An answer of the same shape that says nothing but marks."""
        mark = f"{self._nonce}{number}x"
        calls = message.get("tool_calls") or ()
        marked: _Message = {
            name: value for name, value in message.items() if name not in ("reasoning_content", "tool_calls")
        }
        marked["content"] = mark if message["content"] or not calls else ""
        if calls:
            marked["tool_calls"] = [
                {**call, "function": {**call["function"], "name": mark, "arguments": "{}"}} for call in calls
            ]
        return marked

    def _learn(self, render: Render) -> None:
        """Sees how turns are opened and closed, behind a user message and behind the result of a tool.

        Nothing is learned of a template that does it in a way that cannot be told from the text.
        """
        user, other = {"role": "user", "content": "U"}, {"role": "user", "content": "V"}
        call = {"id": _PROBE_ID, "type": "function", "function": {"name": "f", "arguments": "{}"}}
        calling = {"role": "assistant", "content": "", "tool_calls": [call]}
        result = {"role": "tool", "content": "R", "name": "f", "tool_call_id": _PROBE_ID}
        answer = {"role": "assistant", "content": "A"}
        first = self._probe(render, [user], answer, other)
        if first is None:
            return
        self._headers, self._closers[False] = (first.header,), first.closer
        called = self._probe(render, [user], calling, result)
        # With another call, since a new question would change how some templates show the calls before it.
        again = self._probe(render, [user, calling, result], calling, result)
        if called is not None and again is not None and again.closer == called.closer:
            self._headers = tuple(dict.fromkeys([first.header, called.header, again.header]))
            self._closers[True] = called.closer

    def _probe(self, render: Render, before: list[_Message], answer: _Message, after: _Message) -> _Edges | None:
        """What stands around `answer` between the messages `before` and `after`; None if that cannot be told."""
        following = {**after, "content": f"{self._nonce}1x"}
        try:
            prompt, closed = render(before, True), render(before, False)
            history = render([*before, self._marked(answer, 0), following], False)
        except InvalidRequestError:
            return None
        marks = list(self._mark.finditer(history))
        own = [mark for mark in marks if mark[1] == "0"]
        if not own or marks[-1][1] != "1" or marks[: len(own)] != own:
            return None
        end = self._end.search(history, own[-1].end(), marks[len(own)].start())
        common = prompt[: common_length(prompt, history[: own[0].start()])]
        if end is None:
            return None
        closer = history[own[-1].end() : end.start()]
        if len(common) > len(closed) and common.startswith(closed):
            return _Edges(common[len(closed) :], closer)
        # Some templates write nothing there: the turn begins behind the token that ends the user's.
        last = max((match.start() for match in _TAG.finditer(common)), default=None)
        return None if last is None or len(prompt) != len(common) else _Edges(common[last:], closer)


def _special_text(tokenizer: Tokenizer, token_id: int) -> str:
    """The text of a special token if that text always means the token; else none."""
    text = tokenizer.decode([token_id], skip_special_tokens=False)
    return text if text and tokenizer.encode(text) == [token_id] else ""


def _surrounds(texts: Sequence[str], plain: str) -> bool:
    """Whether `plain` is `texts` with something between them: nothing but the answers may differ."""
    if not plain.startswith(texts[0]) or not plain.endswith(texts[-1]):
        return False
    at = len(texts[0])
    for text in texts[1:-1]:
        at = plain.find(text, at)
        if at < 0:
            return False
        at += len(text)
    return at + len(texts[-1]) <= len(plain)
