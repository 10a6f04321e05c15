"""What an answer was made of: its token ids, and what its client was shown of it."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Any

from agentserve.server.prompt import TokenizedPrompt
from agentserve.server.token_history import TokenHistory
from agentserve.server.turns import Turn
from agentserve.text.tools.spec import Piece, TextPiece, ToolCallFinished, ToolCallStarted


class AnswerRecorder:
    """Takes one answer while it is written, and keeps it for the next turn if it can be told from its text."""

    def __init__(self, prompt: TokenizedPrompt, history: TokenHistory | None) -> None:
        """Nothing is kept without a `history`."""
        self._prompt = prompt
        self._history = history
        self._token_ids = array("I")
        self._texts: list[str] = []
        self._calls: list[tuple[str, str]] = []
        self._call_ids: list[str] = []
        self._is_whole = True
        self._ends_turn = False
        self.digest: bytes | None = None
        """Of the conversation with this answer, once it is complete."""

    def token(self, token_id: int) -> None:
        """A token that belongs to the answer."""
        self._token_ids.append(token_id)

    def end_turn(self) -> None:
        """The token that ends the turn has come. It is no part of the answer: the template writes it."""
        self._ends_turn = True

    def show(self, pieces: Iterable[Piece]) -> None:
        """What the client sees."""
        for piece in pieces:
            if isinstance(piece, TextPiece):
                self._texts.append(piece.text)
            elif isinstance(piece, ToolCallStarted):
                self._call_ids.append(piece.call_id)
            elif isinstance(piece, ToolCallFinished):
                self._calls.append((piece.name, piece.arguments))
                self._is_whole &= piece.complete

    def hide(self) -> None:
        """The client does not see all that was written."""
        self._is_whole = False

    @property
    def num_tokens(self) -> int:
        """Tokens of the answer, without the one that ended the turn."""
        return len(self._token_ids)

    @property
    def computed_ids(self) -> array[int]:
        """Tokens of the answer whose keys and values were computed: the last one that is sampled never is."""
        return self._token_ids if self._ends_turn else self._token_ids[:-1]

    def message(self) -> dict[str, Any] | None:
        """The complete answer as its client will send it back, in OpenAI's form; None if that cannot be told."""
        if not self._is_whole or not self._token_ids:
            return None
        calls = [
            {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
            for call_id, (name, arguments) in zip(self._call_ids, self._calls, strict=True)
        ]
        return {"role": "assistant", "content": "".join(self._texts), "tool_calls": calls}

    def finish(self) -> None:
        """The answer is complete."""
        conversation = self._prompt.conversation
        if conversation is None or not self._is_whole or not self._token_ids:
            return
        turn = Turn("".join(self._texts), tuple(self._calls))
        self.digest = turn.digest(conversation.digests[-1])
        if self._history is not None and conversation.opening is not None:
            self._history.store(self._prompt.scope, self.digest, conversation.opening, self._token_ids)
