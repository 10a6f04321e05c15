"""Why a prompt was not found in the cache: what it was compared with, and where the two part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from agentserve.server.breakers import Difference, find_difference
from agentserve.server.prefix import common_length
from agentserve.server.prompt import Conversation, TokenizedPrompt

TOKEN_BYTES = 4
_NUM_SHOWN_TOKENS = 24
"""On each side of the first token that differs."""


class MissReason(StrEnum):
    """The cause class of a miss."""

    NONE = "none"  # everything that the session had in common with this prompt was found
    NEW_SESSION = "new_session"  # nothing is known of the session
    NEW_CONVERSATION = "new_conversation"  # the session is known, this conversation of it is not
    SALT = "salt"  # the same was read under another cache salt
    EVICTED = "evicted"  # it was computed and has left the cache since
    NOT_COMPUTED = "not_computed"  # the request before was cancelled or failed before it was computed
    SYSTEM = "system"  # the system prompt has changed
    TOOLS = "tools"  # the tools have changed
    HISTORY = "history"  # a message was changed, removed, or put in between
    ANSWER = "answer"  # the last answer is the same, but reads otherwise than it was written
    TOKENIZATION = "tokenization"  # the same text in other tokens
    RENDERING = "rendering"  # the messages are the same, and the template shows them otherwise
    PROMPT = "prompt"  # a prompt that is no conversation goes on otherwise
    DISABLED = "disabled"  # the prefix cache is off


@dataclass(frozen=True, slots=True)
class Reading:
    """A prompt that was read, with what was written behind it as far as it was computed."""

    request_id: str
    packed: bytes
    """Token ids, four bytes each."""
    num_prompt_tokens: int
    conversation: Conversation | None
    complete: bool
    """Whether all of it was computed."""
    answer_digest: bytes | None
    """Of the conversation with its answer; None if the answer is not complete."""
    adapter: str | None = None
    """The LoRA adapter that read it."""

    @property
    def token_ids(self) -> Sequence[int]:
        """The same as numbers, without a copy."""
        return memoryview(self.packed).cast("I")

    @property
    def num_tokens(self) -> int:
        return len(self.packed) // TOKEN_BYTES

    @property
    def num_bytes(self) -> int:
        conversation = self.conversation
        texts = 0 if conversation is None else len(conversation.system) + len(conversation.tools)
        return len(self.packed) + texts + 1024


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where a prompt leaves what was read before."""

    num_common_tokens: int
    reason: MissReason
    message_index: int | None = None
    """The first message that differs, for HISTORY; the leading system messages count as one."""
    role: str | None = None
    differences: tuple[tuple[str, Difference], ...] = ()
    """What has changed in `system` and `tools`."""
    before: str = ""
    here: str = ""
    there: str = ""
    """The text up to the first token that differs, and what follows in the new prompt and in the old one."""

    def describe(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "at_token": self.num_common_tokens,
            "reason": self.reason.value,
            "message": self.message_index,
            "role": self.role,
            "before": self.before,
            "here": self.here,
            "there": self.there,
            "changes": [
                {
                    "part": part,
                    "kind": difference.kind,
                    "at_character": difference.at,
                    "before": difference.before,
                    "old": difference.old,
                    "new": difference.new,
                    "after": difference.after,
                }
                for part, difference in self.differences
            ],
        }


def num_common_tokens(left: bytes, right: bytes) -> int:
    """Token ids that both begin with."""
    return common_length(left, right) // TOKEN_BYTES


def find_divergence(
    prompt: TokenizedPrompt, old: Reading, num_common: int, decode: Callable[[Sequence[int]], str]
) -> Divergence:
    """How `prompt` leaves `old`, with which it has `num_common` tokens in common, fewer than `old` has.

    `decode` gives the text of token ids, special ones included.
    """
    before = _text(prompt.packed, num_common - _NUM_SHOWN_TOKENS, num_common, decode)
    here = _text(prompt.packed, num_common, num_common + _NUM_SHOWN_TOKENS, decode)
    there = _text(old.packed, num_common, num_common + _NUM_SHOWN_TOKENS, decode)
    reason, index, role, differences = _compare(prompt.conversation, old, num_common)
    if reason in (MissReason.ANSWER, MissReason.RENDERING) and _is_same_text(here, there):
        reason = MissReason.TOKENIZATION
    return Divergence(num_common, reason, index, role, differences, before, here, there)


_Found = tuple[MissReason, int | None, str | None, tuple[tuple[str, Difference], ...]]


def _compare(new: Conversation | None, old: Reading, num_common: int) -> _Found:
    before = old.conversation
    if new is None or before is None:
        return MissReason.PROMPT, None, None, ()
    found = (
        ("system", find_difference(before.system, new.system)),
        ("tools", find_difference(before.tools, new.tools)),
    )
    differences = tuple((part, difference) for part, difference in found if difference is not None)
    if new.name != before.name:
        return MissReason.NEW_CONVERSATION, None, None, differences
    if differences:
        return MissReason(differences[0][0]), None, None, differences
    return (*_compare_messages(new, before, old, num_common), ())


def _compare_messages(
    new: Conversation, before: Conversation, old: Reading, num_common: int
) -> tuple[MissReason, int | None, str | None]:
    num_before = len(before.digests)
    digests = [*before.digests, *([] if old.answer_digest is None else [old.answer_digest])]
    for index, (mine, other) in enumerate(zip(new.digests, digests, strict=False)):
        if mine != other:
            return MissReason.HISTORY, index, new.roles[index]
    if len(new.digests) < num_before:
        return MissReason.HISTORY, len(new.digests), before.roles[len(new.digests)]
    # The end of a prompt opens the answer, perhaps with more than the template writes around an old one.
    if len(new.digests) > num_before and num_common >= old.num_prompt_tokens - _NUM_SHOWN_TOKENS:
        known = old.answer_digest is not None
        return (MissReason.ANSWER if known else MissReason.HISTORY), num_before, "assistant"
    return MissReason.RENDERING, None, None


def _text(packed: bytes, start: int, end: int, decode: Callable[[Sequence[int]], str]) -> str:
    data = packed[max(0, start) * TOKEN_BYTES : end * TOKEN_BYTES]
    return decode(memoryview(data).cast("I").tolist())


def _is_same_text(here: str, there: str) -> bool:
    """Whether two texts go on alike, though their tokens do not: one may be longer, or end within a character."""
    length = min(len(here), len(there)) - 1
    return length > 0 and common_length(here, there) >= length
